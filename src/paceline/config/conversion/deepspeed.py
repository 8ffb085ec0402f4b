"""Converts DeepSpeed's JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from paceline.config.conversion.result import Conversion, ConvertedKey
from paceline.config.deepspeed_file.settings import AUTO, FILE_KEY, name_problems, read_settings, shared_values, walk
from paceline.config.deepspeed_file.values import left_open
from paceline.config.sources.document import read_document
from paceline.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from typing import Any

__all__ = ["convert_deepspeed", "deepspeed_problems", "is_deepspeed"]

_OWNED: Final = {
    "train_batch_size": "paceline computes it",
    "train_micro_batch_size_per_gpu": "paceline takes it from the prepared loader",
    "gradient_accumulation_steps": "it follows the run",
    "gradient_clipping": "it is what the script clips to",
    "bf16.enabled": "it follows mixed_precision",
    "fp16.enabled": "it follows mixed_precision",
}
"""Why an "auto" can be left out."""


def is_deepspeed(names: Iterable[str]) -> bool:
    """Whether the keys at the top of a file are those of DeepSpeed's JSON."""
    keys = set(names)
    return bool(keys & {"zero_optimization", *_OWNED}) and not keys & {"distributed_type", "strategy"}


def deepspeed_problems(path: Path) -> Sequence[Problem] | None:
    """Return everything that is wrong with DeepSpeed's JSON; None for another file."""
    items, problems = read_document(path)
    if problems or not is_deepspeed(item.name for item in items):
        return None
    settings, name, wrong = read_settings(str(path), None)
    if settings is None:
        return [Problem(name, "", wrong)]
    return list(name_problems(settings, name))


def convert_deepspeed(path: Path) -> Conversion:
    """Convert DeepSpeed's JSON.

    Args:
        path: The file.

    Returns:
        The settings as keys of paceline; if some have no counterpart, the new file names the JSON instead.
    """
    settings, name, wrong = read_settings(str(path), None)
    result = Conversion(str(path), is_changed=True)
    if settings is None:
        result.problems.append(Problem(name, "", wrong))
        return result
    result.values["strategy"] = "deepspeed"
    problems = list(name_problems(settings, name))
    counterparts = _counterparts(settings)
    has_counterparts = all(key in counterparts or _changes_nothing(key, value) for key, value in walk(settings))
    filled = dict(left_open(settings))
    for key, value in walk(settings):
        problem = _problem_of(key, problems)
        if problem is not None:
            result.refuse(name, key, value, problem)
        elif not has_counterparts:
            became = _meaning_in_json(key, counterparts, filled)
            result.keys.append(ConvertedKey(name, key, value, f"stays in {path.name}, {became}"))
        elif key in counterparts:
            result.put(name, key, value, *counterparts[key])
        else:
            result.leave_out(name, key, value, _OWNED.get(key, "it changes nothing"))
    if not has_counterparts:
        result.values[FILE_KEY] = str(path.absolute())
    result.problems.extend(problem for problem in problems if problem not in result.problems)
    return result


def _problem_of(key: str, problems: Sequence[Problem]) -> Problem | None:
    return next((p for p in problems if key == p.key or key.startswith(f"{p.key}.")), None)


def _counterparts(settings: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Map paths of the JSON to the dotted keys and values with the same meaning."""
    counterparts = {shared.path: (shared.key, shared.value) for shared in shared_values(settings)}
    precision = next((pair for pair in counterparts.values() if pair[0] == "mixed_precision"), None)
    if precision is not None:
        # One switch is on and the other off; both together are one value of mixed_precision.
        counterparts |= dict.fromkeys(("bf16.enabled", "fp16.enabled"), precision)
    return counterparts


def _changes_nothing(key: str, value: Any) -> bool:
    """Whether a key can be left out without any change."""
    unused = key.startswith("zero_optimization.offload_") and value in (None, "none")
    return unused or (value == AUTO and key in _OWNED)


def _meaning_in_json(key: str, counterparts: Mapping[str, tuple[str, Any]], filled: Mapping[str, str]) -> str:
    if key in counterparts:
        dotted, new = counterparts[key]
        return f"and is {dotted} {new} of the run"
    if key in filled:
        return f"to be filled by the run: {filled[key] or _OWNED.get(key, 'nothing fills it')}"
    return "which the new file names"
