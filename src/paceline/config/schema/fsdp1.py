"""Files written for FSDP version 1, in the words of version 2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from paceline.config.schema.base import Key, Section, slots
from paceline.config.schema.shapes import Shape
from paceline.config.sources.origin import Raw
from paceline.errors import Problem

ShardingStrategy = Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2"]
BackwardPrefetch = Literal["BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"]


class FsdpVersion1(Section):
    """Keys that only FSDP version 1 had."""

    key_prefix: ClassVar[str] = "fsdp_"

    sharding_strategy: ShardingStrategy | None = Field(
        None, description="Version 1 name of fsdp_reshard_after_forward."
    )
    backward_prefetch: Annotated[
        BackwardPrefetch | None, Key("fsdp_backward_prefetch", ("fsdp_backward_prefetch_policy",))
    ] = Field(None, description="Version 1 only; version 2 always prefetches before the backward of a unit.")
    forward_prefetch: bool | None = Field(None, description="Version 1 only; version 2 has no such switch.")
    use_orig_params: bool | None = Field(
        None, description="Version 1 only; version 2 always keeps the original parameters."
    )
    sync_module_states: bool | None = Field(
        None,
        description="Version 1 only; fsdp_cpu_ram_efficient_loading shares out rank 0's weights.",
    )


_VERSION: Final = "fsdp_config.fsdp_version"
_SHARDING: Final = "fsdp_config.fsdp_sharding_strategy"
_RESHARD: Final = "fsdp_config.fsdp_reshard_after_forward"
_STATE_DICT: Final = "fsdp_config.fsdp_state_dict_type"
_REPLICATE: Final = "parallelism_config.parallelism_config_dp_replicate_size"

_CODES: Final = {
    _SHARDING: ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2"),
    _STATE_DICT: ("FULL_STATE_DICT", "LOCAL_STATE_DICT", "SHARDED_STATE_DICT"),
    "fsdp_config.fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"),
    "fsdp_config.fsdp_backward_prefetch": ("BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"),
}
"""What the numbers in old files stand for, from 1."""

_RESHARDS: Final = {
    "FULL_SHARD": True,
    "HYBRID_SHARD": True,
    "SHARD_GRAD_OP": False,
    "HYBRID_SHARD_ZERO2": False,
}

_ALWAYS: Final[dict[str, tuple[object, str]]] = {
    "fsdp_config.fsdp_backward_prefetch": ("BACKWARD_PRE", "version 2 always prefetches before backward"),
    "fsdp_config.fsdp_forward_prefetch": (False, "version 2 has no switch for prefetching in forward"),
    "fsdp_config.fsdp_use_orig_params": (True, "version 2 always keeps the original parameters"),
    "fsdp_config.fsdp_sync_module_states": (
        True,
        "version 2 shares out rank 0's weights under fsdp_cpu_ram_efficient_loading",
    ),
}
"""What version 2 always does instead of each key of version 1."""


_SWITCH: Final = Shape(frozenset({bool}), (), nullable=False)


@dataclass(slots=True)
class Translation:
    """The values of a file in the words of version 2, with one note for each key that changed.

    Attributes:
        raws: Dotted key to value; what only version 1 knew is gone.
        notes: One line for each key that changed.
        problems: What has no counterpart.
        became: What each changed key became, by its dotted key.
    """

    raws: dict[str, Raw]
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    became: dict[str, str] = field(default_factory=dict)

    def note(self, key: str, raw: Raw, became: str) -> None:
        """Say what a key of version 1 became."""
        self.became[key] = became
        self.notes.append(f"{raw.origin.where}: {key.rpartition('.')[2]} {raw} (FSDP version 1): {became}")

    def refuse(self, key: str, raw: Raw, why: str, hint: str) -> None:
        """Say why a key of version 1 has no counterpart."""
        self.problems.append(Problem(raw.origin.where, key, f"{raw} cannot be carried out", why, hint))


def translate(raws: dict[str, Raw]) -> Translation:
    """Translate all that only version 1 knows; values of a wrong type are left for the model to refuse."""
    result = Translation({key: _named(key, raw) for key, raw in raws.items()})
    is_version_1 = _is_version_1(result.raws)
    _translate_version(result)
    _translate_sharding(result, is_version_1)
    _translate_state_dict(result)
    for key, (always, why) in _ALWAYS.items():
        _translate_switch(result, key, always, why, is_version_1)
    return result


def _named(key: str, raw: Raw) -> Raw:
    """Replace an old file's number by its name."""
    names = _CODES.get(key, ())
    text = str(raw.value)
    if isinstance(raw.value, bool) or not text.isdecimal() or not 1 <= int(text) <= len(names):
        return raw
    return Raw(names[int(text) - 1], raw.origin)


def _is_version_1(raws: dict[str, Raw]) -> bool:
    version = raws.get(_VERSION)
    if version is not None:
        return str(version.value) == "1"
    return _name_of(raws.get(_RESHARD)) is not None or any(key in raws for key in (_SHARDING, *_ALWAYS))


def _name_of(raw: Raw | None) -> str | None:
    """Return the sharding strategy that a value names, None when it is something else."""
    word = str(raw.value).upper() if raw is not None else ""
    return word if word in _CODES[_SHARDING] else None


def _translate_version(result: Translation) -> None:
    raw = result.raws.get(_VERSION)
    if raw is not None and str(raw.value) == "1":
        result.raws[_VERSION] = Raw(2, raw.origin)
        result.note(_VERSION, raw, "became fsdp_version 2")


def _translate_sharding(result: Translation, is_version_1: bool) -> None:
    named, reshard = result.raws.get(_SHARDING), result.raws.get(_RESHARD)
    if named is not None and (name := _name_of(named)) is not None:
        del result.raws[_SHARDING]
        if reshard is not None and not _agree(name, reshard):
            where = reshard.origin.where
            result.refuse(_SHARDING, named, f"{where} has fsdp_reshard_after_forward {reshard}", "keep one of them")
            return
        _reshard(result, _SHARDING, named, name, is_version_1)
    elif reshard is not None and (name := _name_of(reshard)) is not None:
        del result.raws[_RESHARD]
        _reshard(result, _RESHARD, reshard, name, is_version_1)


def _agree(name: str, reshard: Raw) -> bool:
    other = _name_of(reshard)
    if other is not None:
        return other == name
    return _RESHARDS.get(name) == _truth(reshard)


def _truth(raw: Raw) -> object:
    return _SWITCH.read(raw.value, raw.style, raw.text)


def _reshard(result: Translation, key: str, raw: Raw, name: str, is_version_1: bool) -> None:
    if name == "NO_SHARD":
        result.refuse(key, raw, "version 2 always shards", "write strategy: ddp and remove fsdp_config")
    elif not is_version_1:
        hint = f"write fsdp_reshard_after_forward: {str(_RESHARDS[name]).lower()}, or fsdp_version: 1"
        why = "names of sharding strategies belong to version 1, and the file says fsdp_version 2"
        if name != "FULL_SHARD" or key == _RESHARD:
            result.refuse(key, raw, why, hint)
        else:
            _set_reshard(result, key, raw, name)
    elif name.startswith("HYBRID") and not _replicates(result.raws):
        hint = (
            "write the number of copies (often that of machines) as parallelism_config: "
            "{parallelism_config_dp_replicate_size: N}"
        )
        result.refuse(key, raw, "version 2 must be told how many copies of the sharded model there are", hint)
    else:
        _set_reshard(result, key, raw, name)


def _set_reshard(result: Translation, key: str, raw: Raw, name: str) -> None:
    result.raws[_RESHARD] = Raw(_RESHARDS[name], raw.origin)
    result.note(key, raw, f"became fsdp_reshard_after_forward {str(_RESHARDS[name]).lower()}")


def _replicates(raws: dict[str, Raw]) -> bool:
    raw = raws.get(_REPLICATE)
    return raw is not None and str(raw.value) != "1"


def _translate_state_dict(result: Translation) -> None:
    raw = result.raws.get(_STATE_DICT)
    if raw is not None and str(raw.value).upper() == "LOCAL_STATE_DICT":
        del result.raws[_STATE_DICT]
        why = "such checkpoints can only be read by as many ranks as wrote them"
        result.refuse(_STATE_DICT, raw, why, "write SHARDED_STATE_DICT")


def _translate_switch(result: Translation, key: str, always: object, why: str, is_version_1: bool) -> None:
    raw = result.raws.get(key)
    if raw is None:
        return
    slot = next(slot for slot in slots(FsdpVersion1) if key.endswith(slot.key))
    value = slot.shape.read(raw.value, raw.style, raw.text)
    if value not in (slot.shape.choices or (True, False)):
        return  # of the wrong type; the model says so
    del result.raws[key]
    if value == always or is_version_1:
        result.note(key, raw, f"left out, {why}")
    else:
        result.refuse(key, raw, f"{why}, and the file says fsdp_version 2", "remove the key")
