"""Translates files written for FSDP version 1 to the keys of version 2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from paceline.config.schema.base import settings_of
from paceline.config.schema.fsdp import FsdpVersion1
from paceline.config.schema.shapes import Shape
from paceline.config.sources.origin import Raw
from paceline.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Translation", "translate"]

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
        "version 2 broadcasts rank 0's weights under fsdp_cpu_ram_efficient_loading",
    ),
}
"""What version 2 always does instead of each key of version 1."""

_BOOL: Final = Shape(frozenset({bool}), (), nullable=False)


@dataclass(slots=True)
class Translation:
    """The values of a file under the keys of version 2.

    Attributes:
        raws: Dotted key to value; keys that only version 1 has are gone.
        notes: One line for each key that changed.
        problems: Values without a counterpart in version 2.
        became: What each changed key became, by its dotted key.
    """

    raws: dict[str, Raw]
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    became: dict[str, str] = field(default_factory=dict)

    def note(self, key: str, raw: Raw, became: str) -> None:
        """Record what a key of version 1 became."""
        self.became[key] = became
        self.notes.append(f"{raw.origin.where}: {key.rpartition('.')[2]} {raw} (FSDP version 1): {became}")

    def refuse(self, key: str, raw: Raw, why: str, hint: str) -> None:
        """Record why a value of version 1 has no counterpart."""
        self.problems.append(Problem(raw.origin.where, key, f"{raw} has no counterpart in FSDP2", why, hint))


def translate(raws: Mapping[str, Raw]) -> Translation:
    """Translate the keys of version 1; values of a wrong type are left for the models to refuse.

    Args:
        raws: Dotted key to value, as the sources gave it.

    Returns:
        A new mapping, with notes on what changed.
    """
    result = Translation({key: _spell_out(key, raw) for key, raw in raws.items()})
    is_version_1 = _is_version_1(result.raws)
    _translate_version(result)
    _translate_sharding(result, is_version_1)
    _translate_state_dict(result)
    for key in _ALWAYS:
        _translate_switch(result, key, is_version_1)
    return result


def _spell_out(key: str, raw: Raw) -> Raw:
    """Replace the number in an old file by the name it stands for."""
    names = _CODES.get(key, ())
    text = str(raw.value)
    if isinstance(raw.value, bool) or not text.isdecimal() or not 1 <= int(text) <= len(names):
        return raw
    return Raw(names[int(text) - 1], raw.origin)


def _is_version_1(raws: Mapping[str, Raw]) -> bool:
    version = raws.get(_VERSION)
    if version is not None:
        return str(version.value) == "1"
    return _sharding_name(raws.get(_RESHARD)) is not None or any(key in raws for key in (_SHARDING, *_ALWAYS))


def _sharding_name(raw: Raw | None) -> str | None:
    """Return the sharding strategy that a value names; None when it is something else."""
    word = ""
    if raw is not None:
        word = str(raw.value).upper()
    return word if word in _CODES[_SHARDING] else None


def _translate_version(result: Translation) -> None:
    raw = result.raws.get(_VERSION)
    if raw is not None and str(raw.value) == "1":
        result.raws[_VERSION] = Raw(2, raw.origin)
        result.note(_VERSION, raw, "became fsdp_version 2")


def _translate_sharding(result: Translation, is_version_1: bool) -> None:
    """Translate a sharding strategy, which may stand under its own key or under fsdp_reshard_after_forward."""
    strategy, reshard = result.raws.get(_SHARDING), result.raws.get(_RESHARD)
    name = _sharding_name(strategy)
    if strategy is not None and name is not None:
        del result.raws[_SHARDING]
        if reshard is not None and not _agree(name, reshard):
            why = f"{reshard.origin.where} has fsdp_reshard_after_forward {reshard}, which contradicts it"
            result.refuse(_SHARDING, strategy, why, "keep one of them")
        else:
            _set_reshard(result, _SHARDING, strategy, name, is_version_1)
        return
    name = _sharding_name(reshard)
    if reshard is not None and name is not None:
        del result.raws[_RESHARD]
        _set_reshard(result, _RESHARD, reshard, name, is_version_1)


def _agree(name: str, reshard: Raw) -> bool:
    other = _sharding_name(reshard)
    if other is not None:
        return other == name
    return _RESHARDS.get(name) == _BOOL.read(reshard.value, reshard.style, reshard.text)


def _set_reshard(result: Translation, key: str, raw: Raw, name: str, is_version_1: bool) -> None:
    """Write a sharding strategy as fsdp_reshard_after_forward, or say why that cannot be done."""
    if name == "NO_SHARD":
        result.refuse(key, raw, "version 2 always shards", "write strategy: ddp and remove fsdp_config")
        return
    reshard = _RESHARDS[name]
    # Files of version 2 in use carry fsdp_sharding_strategy FULL_SHARD, which changes nothing.
    if not is_version_1 and (name != "FULL_SHARD" or key == _RESHARD):
        why = "names of sharding strategies belong to version 1, and the file has fsdp_version 2"
        hint = f"write fsdp_reshard_after_forward: {str(reshard).lower()}, or fsdp_version: 1"
        result.refuse(key, raw, why, hint)
    elif is_version_1 and name.startswith("HYBRID") and not _replicates(result.raws):
        why = "version 2 needs the number of replicas"
        hint = (
            "write it (often the number of machines) as parallelism_config: {parallelism_config_dp_replicate_size: N}"
        )
        result.refuse(key, raw, why, hint)
    else:
        result.raws[_RESHARD] = Raw(reshard, raw.origin)
        result.note(key, raw, f"became fsdp_reshard_after_forward {str(reshard).lower()}")


def _replicates(raws: Mapping[str, Raw]) -> bool:
    raw = raws.get(_REPLICATE)
    return raw is not None and str(raw.value) != "1"


def _translate_state_dict(result: Translation) -> None:
    raw = result.raws.get(_STATE_DICT)
    if raw is not None and str(raw.value).upper() == "LOCAL_STATE_DICT":
        del result.raws[_STATE_DICT]
        why = "only the same number of ranks can load such checkpoints"
        result.refuse(_STATE_DICT, raw, why, "write SHARDED_STATE_DICT")


def _translate_switch(result: Translation, key: str, is_version_1: bool) -> None:
    """Drop a key of version 1 where version 2 always does what it says."""
    raw = result.raws.get(key)
    if raw is None:
        return
    setting = next(setting for setting in settings_of(FsdpVersion1) if key.endswith(setting.key))
    value = setting.shape.read(raw.value, raw.style, raw.text)
    if value not in (setting.shape.choices or (True, False)):
        return  # of the wrong type; the model says so
    del result.raws[key]
    always, why = _ALWAYS[key]
    if value == always or is_version_1:
        result.note(key, raw, f"left out, {why}")
    else:
        result.refuse(key, raw, f"{why}, and the file has fsdp_version 2", "remove the key")
