"""Every name under which a setting can be given, and what was meant by one that nobody knows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, get_args

from paceline.config.schema.base import Section, Slot, slots, slots_by_name
from paceline.config.schema.fsdp import FullyShardedDataParallelPlugin
from paceline.config.schema.fsdp1 import FsdpVersion1
from paceline.config.schema.run import RunConfig
from paceline.errors import did_you_mean

PARADIGMS: Final = {
    "multi_gpu": "MULTI_GPU",
    "use_fsdp": "FSDP",
    "use_deepspeed": "DEEPSPEED",
    "use_megatron_lm": "MEGATRON_LM",
    "tpu": "XLA",
}
"""Flags that stand for a `distributed_type`."""

PARALLELISM_SWITCH: Final = "use_parallelism_config"

_SWITCHES: Final = {
    "multi_gpu": "Train with DDP on several devices (distributed_type MULTI_GPU).",
    "use_fsdp": "Train with FSDP (distributed_type FSDP).",
    "use_deepspeed": "Train with DeepSpeed (distributed_type DEEPSPEED).",
    "use_megatron_lm": "Train with Megatron-LM (distributed_type MEGATRON_LM).",
    "tpu": "Train on a TPU (distributed_type XLA).",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One flag of `paceline launch`.

    Attributes:
        key: The dotted YAML key that the flag sets.
        flag: The flag without its dashes; also what `resolve` expects in `flags`.
        kind: What sort of value the flag takes.
        choices: The allowed words of a choice.
        description: One sentence.
        section: The YAML section, empty for the top level.
        default: The value without the flag.
    """

    key: str
    flag: str
    kind: Literal["bool", "int", "float", "str", "choice"]
    choices: tuple[str, ...] = ()
    description: str
    section: str = ""
    default: object = None


@cache
def sections() -> dict[str, tuple[type[Section], ...]]:
    """Map each section of the file to the models whose keys it may hold, the current one first."""
    found: dict[str, tuple[type[Section], ...]] = {}
    for slot in slots(RunConfig):
        parts = get_args(slot.info.annotation) or (slot.info.annotation,)
        models = tuple(part for part in parts if isinstance(part, type) and issubclass(part, Section))
        if models:
            old = (FsdpVersion1,) if models == (FullyShardedDataParallelPlugin,) else ()
            found[slot.field] = models + old
    return found


@cache
def keys_of(section: str) -> dict[str, Slot]:
    """Map every spelling of a key in a section (empty: at the top level) to its slot."""
    models = sections()[section] if section else (RunConfig,)
    names: dict[str, Slot] = {}
    for model in models:
        for name, slot in slots_by_name(model).items():
            names.setdefault(name, slot)
    return names


@cache
def places() -> dict[str, Slot]:
    """Map every dotted key of a value to its slot; sections themselves are not among them."""
    found = {slot.key: slot for slot in slots(RunConfig) if slot.field not in sections()}
    for section, models in sections().items():
        found.update({f"{section}.{slot.key}": slot for model in models for slot in slots(model)})
    return found


@cache
def flag_names() -> dict[str, str]:
    """Map every name that a flag or a PACELINE_ variable may have to the dotted key that it sets."""
    names: dict[str, str] = {}
    for dotted, slot in places().items():
        if slot.has_flag:
            for name in (slot.flag, slot.key, *slot.aliases):
                names.setdefault(name, dotted)
    return names


@cache
def options() -> tuple[Option, ...]:
    """List every flag of `paceline launch` that sets something of the configuration."""
    switches = [
        Option(key="distributed_type", flag=flag, kind="bool", description=text, default=False)
        for flag, text in _SWITCHES.items()
    ]
    switches.append(
        Option(
            key="parallelism_config",
            flag=PARALLELISM_SWITCH,
            kind="bool",
            description="Say that parallelism_config is meant to be used; its keys alone say so too.",
            section="parallelism_config",
            default=False,
        )
    )
    return (*(_option(dotted, slot) for dotted, slot in places().items() if slot.has_flag), *switches)


def _option(dotted: str, slot: Slot) -> Option:
    kind = slot.shape.kind
    choices = (*slot.more_choices, *map(str, slot.shape.choices)) if kind == "choice" else ()
    return Option(
        key=dotted,
        flag=slot.flag,
        kind=kind,
        choices=choices,
        description=slot.info.description or "",
        section=dotted.rpartition(".")[0],
        default=slot.default,
    )


def key_hint(name: str, section: str) -> str:
    """Say what an unknown key of a file was probably meant to be."""
    for place in ("", *sections()):
        if place != section and name in {*_proper_names(place), *(sections() if not place else ())}:
            return f"it belongs in {place}" if place else "it belongs at the top level"
    here = did_you_mean(name, [*keys_of(section)])
    return here or _elsewhere(name, section)


def flag_hint(name: str) -> str:
    """Say what an unknown flag was probably meant to be."""
    return did_you_mean(name, [*flag_names(), *PARADIGMS, PARALLELISM_SWITCH])


def _proper_names(section: str) -> list[str]:
    """The full spellings of a section's keys, which no other section shares."""
    return [name for slot in keys_of(section).values() for name in (slot.key, *slot.aliases)]


def _elsewhere(name: str, section: str) -> str:
    for place in ("", *sections()):
        hint = "" if place == section else did_you_mean(name, _proper_names(place))
        if hint:
            return f"{hint[:-1]} {'in ' + place if place else 'at the top level'}?"
    return ""
