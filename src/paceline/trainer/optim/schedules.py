"""The course of the learning rate: a factor of the highest rate for each optimizer step."""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from paceline.errors import ConfigError, Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

__all__ = ["SCHEDULES", "make_schedule"]


def _rise(step: int, warmup: int) -> float:
    """The straight way up from 0 to 1."""
    return step / max(1, warmup)


def _progress(step: int, warmup: int, total: int) -> float:
    """How much of the way down is done, from 0 on."""
    return (step - warmup) / max(1, total - warmup)


def constant(step: int, warmup: int, total: int) -> float:
    """The highest rate all the time."""
    return 1.0


def constant_with_warmup(step: int, warmup: int, total: int) -> float:
    """Up, then the highest rate."""
    return _rise(step, warmup) if step < warmup else 1.0


def linear(step: int, warmup: int, total: int) -> float:
    """Up, then straight down to 0."""
    return _rise(step, warmup) if step < warmup else max(0.0, 1.0 - _progress(step, warmup, total))


def cosine(
    step: int,
    warmup: int,
    total: int,
    *,
    num_cycles: float = 0.5,
    min_lr_rate: float = 0.0,
) -> float:
    """Up, then down along cosine waves; half a wave ends at the lowest rate.

    Args:
        step: The optimizer step.
        warmup: Steps of the way up.
        total: Steps of everything.
        num_cycles: Waves after the way up.
        min_lr_rate: Lowest rate, as a share of the highest.
    """
    if step < warmup:
        return _rise(step, warmup)
    wave = 0.5 * (1.0 + math.cos(math.pi * 2.0 * num_cycles * _progress(step, warmup, total)))
    return max(0.0, min_lr_rate + (1.0 - min_lr_rate) * wave)


def cosine_from_a_start(
    step: int,
    warmup: int,
    total: int,
    *,
    num_cycles: float = 0.5,
    min_lr_rate: float = 0.0,
    warmup_lr_rate: float | None = None,
) -> float:
    """As `cosine`, but the way up may begin at `warmup_lr_rate`, and reaches the top one step before the way down."""
    if step < warmup and warmup_lr_rate is not None:
        return warmup_lr_rate + (1.0 - warmup_lr_rate) * step / max(1, warmup - 1)
    if step < warmup:
        return _rise(step, warmup)
    return cosine(step + 1, warmup, total, num_cycles=num_cycles, min_lr_rate=min_lr_rate)


def cosine_with_restarts(step: int, warmup: int, total: int, *, num_cycles: int = 1) -> float:
    """Up, then several times down along half a cosine wave, each from the highest rate on."""
    if step < warmup:
        return _rise(step, warmup)
    progress = _progress(step, warmup, total)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0))))


def polynomial(
    step: int, warmup: int, total: int, *, highest: float, lr_end: float = 1e-7, power: float = 1.0
) -> float:
    """Up, then down to `lr_end` along a power of what is left."""
    if step < warmup:
        return _rise(step, warmup)
    if step > total:
        return lr_end / highest
    left = 1.0 - _progress(step, warmup, total)
    return float((highest - lr_end) * left**power + lr_end) / highest


def inverse_sqrt(step: int, warmup: int, total: int, *, timescale: int | None = None) -> float:
    """Up, then down with the square root of the steps."""
    if step < warmup:
        return _rise(step, warmup)
    scale = timescale or warmup or 10_000
    return 1.0 / math.sqrt((step + scale - warmup) / scale)


def warmup_stable_decay(
    step: int,
    warmup: int,
    total: int,
    *,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "linear",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    """Up, level, then down to `min_lr_ratio`."""
    stable = total - warmup - num_decay_steps if num_stable_steps is None else num_stable_steps
    if step < warmup:
        return _shape(warmup_type, step / max(1, warmup)) * (1.0 - min_lr_ratio) + min_lr_ratio
    if step < warmup + stable:
        return 1.0
    if step < warmup + stable + num_decay_steps:
        done = (step - warmup - stable) / max(1, num_decay_steps)
        if decay_type == "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * 2.0 * num_cycles * done))
        else:
            left = _shape(decay_type, 1.0 - done)
        return max(0.0, left * (1.0 - min_lr_ratio) + min_lr_ratio)
    return min_lr_ratio


def _shape(kind: str, share: float) -> float:
    """A way from 0 to 1."""
    if kind == "linear":
        return share
    if kind == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * share))
    if kind == "1-sqrt":
        return 1.0 - math.sqrt(1.0 - share)
    hint = did_you_mean(kind, ("linear", "cosine", "1-sqrt"))
    raise ConfigError([Problem("TrainingArguments(…)", "lr_scheduler_kwargs", f"{kind!r} is no shape", hint=hint)])


SCHEDULES: dict[str, Callable[..., float] | None] = {
    "linear": linear,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "polynomial": polynomial,
    "constant": constant,
    "constant_with_warmup": constant_with_warmup,
    "inverse_sqrt": inverse_sqrt,
    "reduce_lr_on_plateau": None,
    "cosine_with_min_lr": cosine,
    "cosine_warmup_with_min_lr": cosine_from_a_start,
    "warmup_stable_decay": warmup_stable_decay,
}


def make_schedule(
    name: str, optimizer: Optimizer, *, warmup: int, total: int, arguments: dict[str, Any] | None = None
) -> Any:
    """A scheduler of torch.

    Args:
        name: One of `SCHEDULES`.
        optimizer: Whose rate.
        warmup: Optimizer steps of the way up.
        total: Optimizer steps of everything.
        arguments: More arguments, by transformers' names.

    Raises:
        ConfigError: An argument that the schedule does not have, or one that is missing.
    """
    function = SCHEDULES[name]
    highest = float(optimizer.param_groups[0]["lr"])
    said = _in_rates(dict(arguments or {}), highest)
    if function is None:
        return ReduceLROnPlateau(optimizer, **said)
    if name == "polynomial":
        said["highest"] = highest
    _check(name, function, said)
    return LambdaLR(optimizer, partial(_at, function, said, warmup, total))


def _at(function: Callable[..., float], said: dict[str, Any], warmup: int, total: int, step: int) -> float:
    return float(function(step, warmup, total, **said))


def _in_rates(said: dict[str, Any], highest: float) -> dict[str, Any]:
    """Turn learning rates into shares of the highest."""
    if said.get("min_lr") is not None and said.get("min_lr_rate") is not None:
        what, why = f"both min_lr={said['min_lr']} and min_lr_rate={said['min_lr_rate']}", "both say where it ends"
        raise ConfigError([Problem("TrainingArguments(…)", "lr_scheduler_kwargs", what, why, "give one of them")])
    if said.get("min_lr") is not None:
        said["min_lr_rate"] = said.pop("min_lr") / highest
    return {name: value for name, value in said.items() if value is not None}


def _check(name: str, function: Callable[..., float], said: dict[str, Any]) -> None:
    key = "lr_scheduler_kwargs"
    if name.endswith("with_min_lr") and "min_lr_rate" not in said:
        what, hint = "neither min_lr nor min_lr_rate", "write min_lr=1e-6, or min_lr_rate=0.1 of the highest rate"
        raise ConfigError([Problem("TrainingArguments(…)", key, what, f"{name} ends there", hint)])
    known = {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    problems = []
    for key in said:
        if key not in known:
            hint = did_you_mean(key, known) or f"{name} takes {', '.join(known) or 'none'}"
            problems.append(Problem("TrainingArguments(…)", f"lr_scheduler_kwargs.{key}", "unknown name", hint=hint))
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in said:
            why = f"{name} cannot do without"
            problems.append(Problem("TrainingArguments(…)", f"lr_scheduler_kwargs.{key}", "is missing", why))
    if problems:
        raise ConfigError(problems)
