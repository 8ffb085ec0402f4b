"""DeepSpeed's own JSON: reading it, checking its names, and finding what it shares with the run's configuration.

A value that both can hold has one owner. What only the JSON says becomes the run's value; what both say must agree;
`"auto"` follows the run.
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
from paceline.config.sources.document import describe_json_error
from paceline.errors import Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["AUTO", "Shared", "name_problems", "read_settings", "shared_values", "value_at", "walk", "without_removed"]

AUTO: Final = "auto"
FILE_KEY: Final = "deepspeed_config.deepspeed_config_file"
_PRECISIONS: Final = ("bf16", "fp16")
_COMMUNICATED: Final = ("fp32", "fp16", "bf16")


def read_settings(value: str | Mapping[str, Any], folder: Path | None) -> tuple[dict[str, Any] | None, str, str]:
    """Read DeepSpeed's configuration from a dictionary, a path, JSON text or base64 of such a text.

    Args:
        value: What stands in the configuration.
        folder: Where a relative path may also lie: beside the configuration file.

    Returns:
        The settings, the name of their source, and what is wrong with it; no settings if something is.
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
        settings = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        return None, name, f"{name}:{error.lineno} is not valid JSON: {describe_json_error(error)}"
    except KeyError as error:
        return None, name, f"{name} has the key {error.args[0]!r} twice in one place"
    if not isinstance(settings, dict):
        return None, name, f"{name} holds a {type(settings).__name__}, not a JSON object"
    return settings, name, ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, each key of which is there once: the first of two would silently lose."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise KeyError(key)
        made[key] = value
    return made


def name_problems(settings: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """Yield the keys that DeepSpeed does not know, those that cannot be carried out, and values of a wrong kind."""
    for key, value in settings.items():
        reason = REMOVED.get(key) or REFUSED.get(key)
        if reason is None and key not in TOP:
            yield _unknown(name, key, key, TOP)
        elif reason is not None and not _is_off(value):
            yield Problem(name, key, "is not carried out", reason, "remove the key")
    yield from _section_problems(settings, name)
    for path, reason in REFUSED.items():
        if "." in path and not _is_off(value_at(settings, path)):
            yield Problem(name, path, "is not carried out", reason, "remove the key")
    for path, other in OLD.items():
        if value_at(settings, path):
            yield Problem(name, path, "is another spelling that is not read", hint=f"write {other}")
    if not isinstance(settings.get("zero_optimization"), dict):
        hint = 'add it, for example "zero_optimization": {"stage": 2}'
        yield Problem(name, "zero_optimization", "the section is missing", "it says what is sharded", hint)
    yield from _value_problems(settings, name)


def _is_off(value: Any) -> bool:
    """Whether a key that would do nothing asks for nothing."""
    if isinstance(value, dict):
        return not value or value.get("enabled") is False
    return value in (None, False) or (type(value) is int and value == 1)


def without_removed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without keys of older releases, which DeepSpeed refuses even where they ask for nothing."""
    return {key: value for key, value in settings.items() if key not in REMOVED}


def _unknown(name: str, path: str, key: str, known: frozenset[str]) -> Problem:
    """The problem of a key that is not read where it stands, with the place where it is read, if there is one."""
    places = [place for place, keys in (*ARGUMENTS.items(), *SECTIONS.items()) if key in keys]
    if places:
        # What lies below the section at hand is nearest.
        section = path.removesuffix(key)
        place = next((place for place in places if section and place.startswith(section)), places[0])
        return Problem(name, path, "is not read here", f"it is read in {place}", "move it there")
    if key in TOP:
        return Problem(name, path, "is not read here", "it is read at the top level", "move it out of the section")
    return Problem(name, path, "unknown key", hint=did_you_mean(key, dict.fromkeys(known)))


def _section_problems(settings: Mapping[str, Any], name: str) -> Iterator[Problem]:
    for path, known in SECTIONS.items():
        section = value_at(settings, path)
        if section is None or (section == AUTO and path in _PRECISIONS):
            continue
        if not isinstance(section, dict):
            yield Problem(name, path, f"{section!r} is not allowed", "it holds keys and values")
            continue
        for key in section:
            if path == "zero_optimization" and key in REMOVED_FROM_ZERO:
                yield Problem(name, f"{path}.{key}", "is not carried out", "DeepSpeed 0.19 has removed it", "remove it")
            elif key not in known:
                yield _unknown(name, f"{path}.{key}", key, known)


def _value_problems(settings: Mapping[str, Any], name: str) -> Iterator[Problem]:
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        value = settings.get(key)
        if value not in (None, AUTO) and (type(value) is not int or value < 1):
            yield Problem(name, key, f"{value!r} is not allowed", 'it must be a whole number from 1 on, or "auto"')
    for path in (f"{kind}.enabled" for kind in _PRECISIONS):
        value = value_at(settings, path)
        if value not in (None, AUTO) and not isinstance(value, bool):
            yield Problem(name, path, f"{value!r} is not allowed", 'it must be true, false or "auto"')
    if all(value_at(settings, f"{kind}.enabled") is True for kind in _PRECISIONS):
        yield Problem(name, "bf16.enabled", "true together with fp16.enabled", "they exclude each other", "keep one")
    if settings.get("gradient_allreduce_op", "mean") not in (None, "mean"):
        why = "a gradient is the mean over the ranks, whatever their number"
        hint = "remove it, and add losses up in the script: backward(loss_sum, weight=count)"
        yield Problem(name, "gradient_allreduce_op", f"{settings['gradient_allreduce_op']!r} is not allowed", why, hint)
    checkpointing = settings.get("activation_checkpointing")
    if isinstance(checkpointing, dict) and checkpointing.get("contiguous_memory_optimization"):
        needed = [key for key in ("partition_activations", "number_checkpoints") if not checkpointing.get(key)]
        path = "activation_checkpointing.contiguous_memory_optimization"
        if needed:
            yield Problem(name, path, "true without " + " and ".join(needed), "DeepSpeed needs both", "set them")
    kind = value_at(settings, "communication_data_type")
    if kind not in (None, *_COMMUNICATED):
        yield Problem(
            name, "communication_data_type", f"{kind!r} is not allowed", f"it must be one of {', '.join(_COMMUNICATED)}"
        )


@dataclass(frozen=True, slots=True)
class Shared:
    """A value of the JSON that the run's configuration can hold as well.

    Attributes:
        path: Dotted, in the JSON.
        key: Dotted, in the run's configuration.
        value: As the run's configuration writes it.
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
    """Yield what the JSON says of values that the run's configuration owns; nothing for `"auto"`."""
    for path, key in _SAME:
        value = value_at(settings, path)
        if value is not None and value != AUTO and _counts(settings, path):
            is_count = path == "gradient_clipping" and type(value) is int
            yield Shared(path, key, float(value) if is_count else value)
    precision = _precision(settings)
    if precision is not None:
        yield precision


def _counts(settings: Mapping[str, Any], path: str) -> bool:
    """Whether DeepSpeed reads a value at all: files in use carry keys of stages and devices that they do not use."""
    if "stage3" in path and value_at(settings, "zero_optimization.stage") not in (3, AUTO):
        return False
    if path.endswith("nvme_path"):
        return bool(value_at(settings, path.replace("nvme_path", "device")) == "nvme")
    return True


def _precision(settings: Mapping[str, Any]) -> Shared | None:
    said = {kind: value_at(settings, f"{kind}.enabled") for kind in _PRECISIONS}
    for kind, enabled in said.items():
        if enabled is True:
            return Shared(f"{kind}.enabled", "mixed_precision", kind)
    if set(said.values()) == {False}:
        return Shared("bf16.enabled", "mixed_precision", "no")
    return None


def value_at(settings: Any, path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    for key in path.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return copy.copy(settings)


def walk(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is no section, by its dotted path."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
