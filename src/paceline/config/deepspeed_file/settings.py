"""Reads DeepSpeed's own JSON, checks it, and finds the values that it shares with the run's configuration.

A value that only the JSON sets becomes the run's value; where both set it they must agree; `"auto"` follows the run.
"""

from __future__ import annotations

import base64
import binascii
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from paceline.config.deepspeed_file.keys import ARGUMENTS, OLD, REFUSED, REMOVED, REMOVED_FROM_ZERO, SECTIONS, TOP
from paceline.errors import Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    _Findings = Iterator[tuple[str, str, str, str]]
    """Key, what is wrong with its value, why, and what to do."""

__all__ = ["AUTO", "Shared", "name_problems", "read_settings", "shared_values", "value_at", "walk", "without_removed"]

AUTO: Final = "auto"
FILE_KEY: Final = "deepspeed_config.deepspeed_config_file"
_PRECISIONS: Final = ("bf16", "fp16")
_COMMUNICATED: Final = ("fp32", "fp16", "bf16")


def read_settings(value: str | Mapping[str, Any], folder: Path | None) -> tuple[dict[str, Any] | None, str, str]:
    """Read DeepSpeed's configuration.

    Args:
        value: A dictionary, a path, JSON text or such a text in base64.
        folder: A second place for relative paths: the folder of the configuration file.

    Returns:
        The settings, the name of their source, and why they cannot be read; None and a reason if they cannot.
    """
    if not isinstance(value, str):
        return dict(value), "hf_ds_config", ""
    if value.lstrip().startswith("{"):
        return (*_parse(value, "the JSON text"),)
    for path in (Path(value).expanduser(), (folder or Path()) / value):
        if path.is_file():
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                return None, str(path), f"cannot be read: {error}"
            return (*_parse(text, path.name),)
    try:
        text = base64.b64decode(value, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None, value, f"there is no file {value}"
    return (*_parse(text, "the base64 text"),)


def _parse(text: str, name: str) -> tuple[dict[str, Any] | None, str, str]:
    try:
        settings = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        from paceline.config.sources.document import describe_json_error

        return None, name, f"{name}:{error.lineno} is not valid JSON: {describe_json_error(error)}"
    except KeyError as error:
        return None, name, f"{name} has the key {error.args[0]!r} twice in one object"
    if not isinstance(settings, dict):
        return None, name, f"{name} holds a {type(settings).__name__}, not a JSON object"
    return settings, name, ""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON; a key that is there twice is an error, since Python's reader ignores the first."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise KeyError(key)
        result[key] = value
    return result


def name_problems(settings: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """Yield what is wrong with the JSON: unknown keys, keys that are not supported, values of a wrong type.

    Args:
        settings: DeepSpeed's own configuration.
        name: Its source, for the problems.
    """
    yield from _top_problems(settings, name)
    yield from _section_problems(settings, name)
    yield from _path_problems(settings, name)
    if not isinstance(settings.get("zero_optimization"), dict):
        hint = 'add it, for example "zero_optimization": {"stage": 2}'
        yield Problem(name, "zero_optimization", "the section is missing", "it sets what is sharded", hint)
    for check in (_batch_sizes, _switches, _two_precisions, _reduction, _checkpointing, _communication):
        for key, what, why, hint in check(settings):
            yield Problem(name, key, what, why, hint)


def _top_problems(settings: Mapping[str, Any], name: str) -> Iterator[Problem]:
    for key, value in settings.items():
        reason = REMOVED.get(key) or REFUSED.get(key)
        if reason is None and key not in TOP:
            yield _unknown(name, key, key, TOP)
        elif reason is not None and not _is_off(value):
            yield Problem(name, key, "is not supported", reason, "remove the key")


def _path_problems(settings: Mapping[str, Any], name: str) -> Iterator[Problem]:
    for path, reason in REFUSED.items():
        if "." in path and not _is_off(value_at(settings, path)):
            yield Problem(name, path, "is not supported", reason, "remove the key")
    for path, other in OLD.items():
        if value_at(settings, path):
            yield Problem(name, path, "is another spelling that is not read", hint=f"write {other}")


def _is_off(value: Any) -> bool:
    """Whether a key that is not supported has a value that changes nothing."""
    if isinstance(value, dict):
        return not value or value.get("enabled") is False
    return value in (None, False) or (type(value) is int and value == 1)


def without_removed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without keys of older releases, which DeepSpeed refuses even where they change nothing."""
    return {key: value for key, value in settings.items() if key not in REMOVED}


def _unknown(name: str, path: str, key: str, known: frozenset[str]) -> Problem:
    """Report a key that is not read where it stands, with the section that reads it, if there is one."""
    readers = [section for section, keys in (*ARGUMENTS.items(), *SECTIONS.items()) if key in keys]
    if readers:
        # A section below this one is the likeliest.
        section = path.removesuffix(key)
        reader = next((reader for reader in readers if section and reader.startswith(section)), readers[0])
        return Problem(name, path, "is not read here", f"it is read in {reader}", "move it there")
    if key in TOP:
        return Problem(name, path, "is not read here", "it is read at the top level", "move it out of the section")
    return Problem(name, path, "unknown key", hint=did_you_mean(key, dict.fromkeys(known)))


def _section_problems(settings: Mapping[str, Any], name: str) -> Iterator[Problem]:
    for path, known in SECTIONS.items():
        section = value_at(settings, path)
        if section is None or (section == AUTO and path in _PRECISIONS):
            continue
        if not isinstance(section, dict):
            yield Problem(name, path, f"{section!r} is not allowed", "it must be an object")
            continue
        for key in section:
            if path == "zero_optimization" and key in REMOVED_FROM_ZERO:
                why = "DeepSpeed 0.19 has removed it"
                yield Problem(name, f"{path}.{key}", "is not supported", why, "remove it")
            elif key not in known:
                yield _unknown(name, f"{path}.{key}", key, known)


def _batch_sizes(settings: Mapping[str, Any]) -> _Findings:
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        value = settings.get(key)
        is_count = type(value) is int and value >= 1
        if value not in (None, AUTO) and not is_count:
            yield key, f"{value!r} is not allowed", 'it must be a whole number of at least 1, or "auto"', ""


def _switches(settings: Mapping[str, Any]) -> _Findings:
    for kind in _PRECISIONS:
        value = value_at(settings, f"{kind}.enabled")
        if value not in (None, AUTO) and not isinstance(value, bool):
            yield f"{kind}.enabled", f"{value!r} is not allowed", 'it must be true, false or "auto"', ""


def _two_precisions(settings: Mapping[str, Any]) -> _Findings:
    if all(value_at(settings, f"{kind}.enabled") is True for kind in _PRECISIONS):
        yield "bf16.enabled", "true, and fp16.enabled too", "they exclude each other", "keep one"


def _reduction(settings: Mapping[str, Any]) -> _Findings:
    value = settings.get("gradient_allreduce_op", "mean")
    if value not in (None, "mean"):
        why = "gradients are averaged over the ranks, whatever their number"
        hint = "remove it, and pass summed losses in the script: backward(loss_sum, weight=count)"
        yield "gradient_allreduce_op", f"{value!r} is not allowed", why, hint


def _checkpointing(settings: Mapping[str, Any]) -> _Findings:
    section = settings.get("activation_checkpointing")
    if not isinstance(section, dict) or not section.get("contiguous_memory_optimization"):
        return
    missing = [key for key in ("partition_activations", "number_checkpoints") if not section.get(key)]
    if missing:
        key = "activation_checkpointing.contiguous_memory_optimization"
        yield key, f"true without {' and '.join(missing)}", "DeepSpeed needs both", "set them"


def _communication(settings: Mapping[str, Any]) -> _Findings:
    value = value_at(settings, "communication_data_type")
    if value not in (None, *_COMMUNICATED):
        why = f"it must be one of {', '.join(_COMMUNICATED)}"
        yield "communication_data_type", f"{value!r} is not allowed", why, ""


@dataclass(frozen=True, slots=True)
class Shared:
    """A value that the JSON and the run's configuration can both set.

    Attributes:
        path: Dotted path in the JSON.
        key: Dotted key in the run's configuration.
        value: The value as the run's configuration writes it.
    """

    path: str
    key: str
    value: Any


_SAME: Final = (
    ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    ("gradient_clipping", "deepspeed_config.gradient_clipping"),
    ("zero_optimization.stage", "deepspeed_config.zero_stage"),
    ("zero_optimization.offload_optimizer.device", "deepspeed_config.offload_optimizer_device"),
    ("zero_optimization.offload_optimizer.nvme_path", "deepspeed_config.offload_optimizer_nvme_path"),
    ("zero_optimization.offload_param.device", "deepspeed_config.offload_param_device"),
    ("zero_optimization.offload_param.nvme_path", "deepspeed_config.offload_param_nvme_path"),
    (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "deepspeed_config.zero3_save_16bit_model",
    ),
)


def shared_values(settings: Mapping[str, Any]) -> Iterator[Shared]:
    """Yield the values of the JSON that the run's configuration can set too; nothing for `"auto"`."""
    for path, key in _SAME:
        value = value_at(settings, path)
        if value is not None and value != AUTO and _is_read(settings, path):
            is_whole = path == "gradient_clipping" and type(value) is int
            yield Shared(path, key, float(value) if is_whole else value)
    precision = _precision(settings)
    if precision is not None:
        yield precision


def _is_read(settings: Mapping[str, Any], path: str) -> bool:
    """Whether DeepSpeed reads a value at all: real files hold keys of stages and devices that they do not use."""
    if "stage3" in path and value_at(settings, "zero_optimization.stage") not in (3, AUTO):
        return False
    if path.endswith("nvme_path"):
        return bool(value_at(settings, path.replace("nvme_path", "device")) == "nvme")
    return True


def _precision(settings: Mapping[str, Any]) -> Shared | None:
    enabled = {kind: value_at(settings, f"{kind}.enabled") for kind in _PRECISIONS}
    for kind, value in enabled.items():
        if value is True:
            return Shared(f"{kind}.enabled", "mixed_precision", kind)
    if set(enabled.values()) == {False}:
        return Shared("bf16.enabled", "mixed_precision", "no")
    return None


def value_at(settings: Any, path: str) -> Any:
    """Return a copy of the value at a dotted path; None where there is none."""
    for key in path.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return copy.copy(settings)


def walk(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is not a section, with its dotted path."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
