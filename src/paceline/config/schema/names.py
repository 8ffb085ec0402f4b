"""Every name of every setting, and hints for unknown names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, get_args

from paceline.config.schema.base import Section, Setting, settings_by_name, settings_of
from paceline.config.schema.fp8 import OTHER_LIBRARIES
from paceline.config.schema.fsdp import FsdpVersion1, FullyShardedDataParallelPlugin
from paceline.config.schema.run import RunConfig
from paceline.errors import did_you_mean

PARADIGMS: Final = {
    "multi_gpu": "MULTI_GPU",
    "use_fsdp": "FSDP",
    "use_deepspeed": "DEEPSPEED",
    "use_megatron_lm": "MEGATRON_LM",
    "tpu": "XLA",
}
"""Flags that set a `distributed_type`."""

_STRATEGY_KEYS: Final = {"fsdp": "FSDP", "deepspeed": "DEEPSPEED", "ddp": "MULTI_GPU"}
"""What a file is likely to call a `distributed_type`."""

PARALLELISM_SWITCH: Final = "use_parallelism_config"

_SWITCHES: Final = {
    "multi_gpu": "Train with DDP on several devices (distributed_type MULTI_GPU).",
    "use_fsdp": "Train with FSDP (distributed_type FSDP).",
    "use_deepspeed": "Train with DeepSpeed (distributed_type DEEPSPEED).",
    "use_megatron_lm": "Train with Megatron-LM (distributed_type MEGATRON_LM).",
    "tpu": "Train on a TPU (distributed_type XLA).",
}


_TOPICS: Final = {
    "": "What runs where",
    "ddp_config": "DDP",
    "fsdp_config": "FSDP",
    "deepspeed_config": "DeepSpeed",
    "parallelism_config": "Mesh",
    "fp8_config": "fp8",
    "dynamo_config": "torch.compile",
    "mpirun_config": "MPI",
    "megatron_lm_config": "Megatron-LM",
}
"""What the flags of each section are about; those of the top level come first."""


TPU_KEYS: Final = (
    "tpu_name",
    "tpu_zone",
    "tpu_use_cluster",
    "tpu_use_sudo",
    "tpu_vm",
    "tpu_env",
    "downcast_bf16",
    "commands",
    "command_file",
    "main_training_function",
)
"""Settings that only a TPU would read."""

_UNSUPPORTED_SWITCHES: Final = ("use_megatron_lm", "tpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One flag of `paceline launch`.

    Attributes:
        key: The dotted YAML key that the flag sets.
        flag: The flag without its dashes; also what `resolve` expects in `flags`.
        kind: The kind of value that the flag takes.
        choices: The allowed values of a choice.
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

    @property
    def topic(self) -> str:
        """The heading under which help lists the flag."""
        return _TOPICS.get(self.section, self.section)

    @property
    def is_supported(self) -> bool:
        """Whether help shows the flag: one that is not supported is read, and answered with what to do instead."""
        if self.section == "fp8_config":
            return all_settings()[self.key].field not in OTHER_LIBRARIES
        if self.section == "megatron_lm_config" or self.flag in _UNSUPPORTED_SWITCHES:
            return False
        return self.key not in TPU_KEYS


@cache
def sections() -> dict[str, tuple[type[Section], ...]]:
    """Map each section of the file to the models whose keys it can hold, the current one first."""
    found: dict[str, tuple[type[Section], ...]] = {}
    for setting in settings_of(RunConfig):
        parts = get_args(setting.info.annotation) or (setting.info.annotation,)
        models = tuple(part for part in parts if isinstance(part, type) and issubclass(part, Section))
        if models:
            old = (FsdpVersion1,) if models == (FullyShardedDataParallelPlugin,) else ()
            found[setting.field] = models + old
    return found


@cache
def settings_by_key(section: str) -> dict[str, Setting]:
    """Map every spelling of a key in a section (empty: at the top level) to its setting."""
    models = sections()[section] if section else (RunConfig,)
    names: dict[str, Setting] = {}
    for model in models:
        for name, setting in settings_by_name(model).items():
            names.setdefault(name, setting)
    return names


@cache
def all_settings() -> dict[str, Setting]:
    """Map every dotted key to its setting; sections themselves have none."""
    found = {setting.key: setting for setting in settings_of(RunConfig) if setting.field not in sections()}
    for section, models in sections().items():
        found.update({f"{section}.{setting.key}": setting for model in models for setting in settings_of(model)})
    return found


@cache
def flag_names() -> dict[str, str]:
    """Map every name of a flag or PACELINE_ variable to the dotted key that it sets."""
    names: dict[str, str] = {}
    for dotted, setting in all_settings().items():
        if setting.has_flag:
            for name in (setting.flag, setting.key, *setting.aliases):
                names.setdefault(name, dotted)
    return names


@cache
def options() -> tuple[Option, ...]:
    """List every flag of `paceline launch` that sets a part of the configuration."""
    switches = [
        Option(key="distributed_type", flag=flag, kind="bool", description=text, default=False)
        for flag, text in _SWITCHES.items()
    ]
    switches.append(
        Option(
            key="parallelism_config",
            flag=PARALLELISM_SWITCH,
            kind="bool",
            description="Use parallelism_config; setting one of its sizes does so too.",
            section="parallelism_config",
            default=False,
        )
    )
    return (*(_option(dotted, setting) for dotted, setting in all_settings().items() if setting.has_flag), *switches)


def _option(dotted: str, setting: Setting) -> Option:
    kind = setting.shape.kind
    choices: tuple[str, ...] = ()
    if kind == "choice":
        choices = (*setting.more_choices, *map(str, setting.shape.choices))
    return Option(
        key=dotted,
        flag=setting.flag,
        kind=kind,
        choices=choices,
        description=setting.info.description or "",
        section=dotted.rpartition(".")[0],
        default=setting.default,
    )


def key_hint(name: str, section: str) -> str:
    """Return a hint for an unknown key of a file."""
    if section and name in {*_proper_names(""), *sections()}:
        return "it belongs at the top level"
    for place in sections():
        if place != section and name in _proper_names(place):
            return f"it belongs in {place}"
    paradigm = {**PARADIGMS, **_STRATEGY_KEYS}.get(name)
    if paradigm is not None:
        return f"in a file, write distributed_type: {paradigm}"
    if name in flag_names():
        return f"that is a flag; in a file, its key is {flag_names()[name]}"
    here = did_you_mean(name, [*settings_by_key(section)])
    return here or _in_other_section(name, section)


def flag_hint(name: str) -> str:
    """Return a hint for an unknown flag."""
    return did_you_mean(name, [*flag_names(), *PARADIGMS, PARALLELISM_SWITCH])


def _proper_names(section: str) -> list[str]:
    """Return the full spellings of a section's keys, which no other section shares."""
    return [name for setting in settings_by_key(section).values() for name in (setting.key, *setting.aliases)]


def _in_other_section(name: str, section: str) -> str:
    for place in ("", *sections()):
        hint = ""
        if place != section:
            hint = did_you_mean(name, _proper_names(place))
        if hint:
            return f"{hint[:-1]} {'in ' + place if place else 'at the top level'}?"
    return ""
