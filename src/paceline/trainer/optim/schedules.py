"""Learning-rate schedules by name: each gives a factor of the peak learning rate for an optimizer step."""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from paceline.environment.logging import get_logger
from paceline.errors import ConfigError, Problem, did_you_mean
from paceline.trainer.argument_errors import field_error, field_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.optim import Optimizer

__all__ = ["SCHEDULES", "follows_metric", "make_schedule"]

_LOG = get_logger(__name__)


def _rise(step: int, warmup: int) -> float:
    """Linear warmup from 0 to 1."""
    return step / max(1, warmup)


def _progress(step: int, warmup: int, total: int) -> float:
    """The share of the steps after warmup that is done."""
    return (step - warmup) / max(1, total - warmup)


def constant(step: int, warmup: int, total: int) -> float:
    """The peak rate throughout."""
    return 1.0


def constant_with_warmup(step: int, warmup: int, total: int) -> float:
    """Warmup, then the peak rate."""
    if step < warmup:
        return _rise(step, warmup)
    return 1.0


def linear(step: int, warmup: int, total: int) -> float:
    """Warmup, then linear decay to 0."""
    if step < warmup:
        return _rise(step, warmup)
    return max(0.0, 1.0 - _progress(step, warmup, total))


def cosine(
    step: int,
    warmup: int,
    total: int,
    *,
    num_cycles: float = 0.5,
    min_lr_rate: float = 0.0,
) -> float:
    """Warmup, then cosine decay; half a cycle ends at the minimum.

    Args:
        step: Optimizer steps so far.
        warmup: Optimizer steps of the warmup.
        total: Optimizer steps of the whole training.
        num_cycles: Cosine cycles after the warmup.
        min_lr_rate: Minimum, as a fraction of the peak rate.
    """
    if step < warmup:
        return _rise(step, warmup)
    wave = 0.5 * (1.0 + math.cos(math.pi * 2.0 * num_cycles * _progress(step, warmup, total)))
    return max(0.0, min_lr_rate + (1.0 - min_lr_rate) * wave)


def cosine_with_initial_rate(
    step: int,
    warmup: int,
    total: int,
    *,
    num_cycles: float = 0.5,
    min_lr_rate: float = 0.0,
    warmup_lr_rate: float | None = None,
) -> float:
    """Like `cosine`, but the first step has a rate already, and warmup peaks one step before the decay begins.

    Args:
        step: Optimizer steps so far.
        warmup: Optimizer steps of the warmup.
        total: Optimizer steps of the whole training.
        num_cycles: Cosine cycles after the warmup.
        min_lr_rate: Minimum, as a fraction of the peak rate.
        warmup_lr_rate: The first step's rate, as a fraction of the peak rate; None takes 1 / `warmup`.
    """
    if step < warmup and warmup_lr_rate is not None:
        return warmup_lr_rate + (1.0 - warmup_lr_rate) * step / max(1, warmup - 1)
    if step < warmup:
        return _rise(step + 1, warmup)
    return cosine(step + 1, warmup, total, num_cycles=num_cycles, min_lr_rate=min_lr_rate)


def cosine_with_restarts(step: int, warmup: int, total: int, *, num_cycles: int = 1) -> float:
    """Warmup, then `num_cycles` cosine decays, each from the peak rate to 0."""
    if step < warmup:
        return _rise(step, warmup)
    progress = _progress(step, warmup, total)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0))))


def polynomial(step: int, warmup: int, total: int, *, peak: float, lr_end: float = 1e-7, power: float = 1.0) -> float:
    """Warmup, then polynomial decay to `lr_end`, or to `peak` where that is less; a peak of 0 stays 0."""
    if step < warmup:
        return _rise(step, warmup)
    end = min(lr_end, peak) / peak if peak else 0.0
    if step > total:
        return end
    left = 1.0 - _progress(step, warmup, total)
    return float((1.0 - end) * left**power + end)


def inverse_sqrt(step: int, warmup: int, total: int, *, timescale: int | None = None) -> float:
    """Warmup, then decay with the inverse square root of the step."""
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
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    """Warmup, constant, then decay to `min_lr_ratio`."""
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
    """A curve from 0 to 1."""
    if kind == "linear":
        return share
    if kind == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * share))
    return 1.0 - math.sqrt(1.0 - share)


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
    "cosine_warmup_with_min_lr": cosine_with_initial_rate,
    "warmup_stable_decay": warmup_stable_decay,
}


def make_schedule(
    name: str, optimizer: Optimizer, *, warmup: int, total: int, arguments: dict[str, Any] | None = None
) -> Any:
    """Build a torch scheduler.

    Args:
        name: One of `SCHEDULES`.
        optimizer: Its first parameter group has the peak learning rate.
        warmup: Optimizer steps of the warmup.
        total: Optimizer steps of the whole training.
        arguments: Further arguments of the schedule, under transformers' names.

    Raises:
        ConfigError: An argument is unknown to the schedule, or a required one is missing, or its value cannot be
            followed; all that could only fail at a later step is found here.
    """
    function = SCHEDULES[name]
    group = optimizer.param_groups[0]
    # An earlier schedule has changed "lr", and left what schedules multiply beside it.
    peak = float(group.get("initial_lr", group["lr"]))
    if function is None:
        _check(name, ReduceLROnPlateau, arguments or {})
        return ReduceLROnPlateau(optimizer, **(arguments or {}))
    given = {option: value for option, value in (arguments or {}).items() if value is not None}
    problems = [*_wrong_values(given)] or [*_above_the_peak(given, peak)]
    if problems:
        raise ConfigError(problems)
    options = _relative_to(peak, given)
    _check(name, function, options)
    _check_length(warmup, total, options)
    if name == "polynomial":
        options["peak"] = peak
    return LambdaLR(optimizer, partial(_factor, function, options, warmup, total))


def follows_metric(scheduler: Any) -> bool:
    """Whether a scheduler steps on an evaluation's metric rather than after each optimizer step."""
    return isinstance(scheduler, ReduceLROnPlateau)


def _factor(function: Callable[..., float], options: dict[str, Any], warmup: int, total: int, step: int) -> float:
    return float(function(step, warmup, total, **options))


def _relative_to(peak: float, options: dict[str, Any]) -> dict[str, Any]:
    """Convert absolute learning rates to fractions of the peak rate."""
    min_lr, min_lr_rate = options.get("min_lr"), options.get("min_lr_rate")
    if min_lr is not None and min_lr_rate is not None:
        what = f"both min_lr={min_lr} and min_lr_rate={min_lr_rate}"
        raise field_error("lr_scheduler_kwargs", what, "both set the final rate", "give one of them")
    if min_lr is not None:
        # A peak of 0 stays 0, whatever it is multiplied by.
        rate = min_lr / peak if peak else 0.0
        options = {**options, "min_lr_rate": rate}
        del options["min_lr"]
    return options


# Parameters of a schedule that no argument sets.
_NO_OPTIONS = ("step", "warmup", "total", "peak", "optimizer")
_SHAPES = ("linear", "cosine", "1-sqrt")


def _wrong_values(options: Mapping[str, Any]) -> Iterator[Problem]:
    """What no schedule can compute with: most of it would only fail at the first step of a decay."""
    for name, value in options.items():
        key = f"lr_scheduler_kwargs.{name}"
        if name in ("warmup_type", "decay_type"):
            if value not in _SHAPES:
                hint = did_you_mean(str(value), _SHAPES) or f"the names are {', '.join(_SHAPES)}"
                yield field_problem(key, f"{value!r} is not a decay shape", hint=hint)
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            yield field_problem(key, f"{value!r} is not a number", hint="give a number")
        elif value < 0:
            yield field_problem(key, f"{value} is out of range", "it must be at least 0")
        elif name == "timescale" and value == 0:
            yield field_problem(key, "0 is out of range", "the step is divided by it", "leave it out, or give steps")


def _above_the_peak(options: Mapping[str, Any], peak: float) -> Iterator[Problem]:
    """Final rates above the peak, to which a schedule would rise."""
    why = "a schedule ends at most at its peak"
    for name in ("min_lr", "lr_end"):
        if options.get(name, 0.0) > peak:
            what = f"{options[name]} with a peak learning rate of {peak:g}"
            yield field_problem(f"lr_scheduler_kwargs.{name}", what, why, "give at most that, or set learning_rate")
    for name in ("min_lr_rate", "min_lr_ratio"):
        if options.get(name, 0.0) > 1:
            hint = "it is a fraction of the peak rate: give at most 1"
            yield field_problem(f"lr_scheduler_kwargs.{name}", f"{options[name]} is out of range", why, hint)


def _check_length(warmup: int, total: int, options: Mapping[str, Any]) -> None:
    """Check that warmup and decay fit into the training, and warn of a peak that is never reached."""
    if warmup > total > 0:
        _LOG.warning(
            "The warmup takes %d steps and the training %d: the learning rate never reaches its peak. Shorten the "
            "warmup.",
            warmup,
            total,
        )
    decay = options.get("num_decay_steps", 0)
    if options.get("num_stable_steps") is None and decay and warmup <= total < warmup + decay and total > 0:
        what = f"{decay} with a warmup of {warmup} and a training of {total} steps"
        why = "the decay would begin before the warmup ends, and the rate would jump"
        hint = f"give at most {max(0, total - warmup)}, or train longer"
        raise field_error("lr_scheduler_kwargs.num_decay_steps", what, why, hint)


def _check(name: str, function: Callable[..., object], options: dict[str, Any]) -> None:
    if name.endswith("with_min_lr") and "min_lr_rate" not in options:
        what, hint = "neither min_lr nor min_lr_rate", "write min_lr=1e-6, or min_lr_rate=0.1 of the peak rate"
        raise field_error("lr_scheduler_kwargs", what, f"{name} ends there", hint)
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p for p in parameters if p.name not in _NO_OPTIONS}
    problems = [*_unknown_options(name, options, known), *_missing_options(name, options, known)]
    if problems:
        raise ConfigError(problems)


def _unknown_options(name: str, options: dict[str, Any], known: Mapping[str, inspect.Parameter]) -> Iterator[Problem]:
    for key in options:
        if key not in known:
            hint = did_you_mean(key, known) or f"{name} takes {', '.join(known) or 'none'}"
            yield field_problem(f"lr_scheduler_kwargs.{key}", "unknown name", hint=hint)


def _missing_options(name: str, options: dict[str, Any], known: Mapping[str, inspect.Parameter]) -> Iterator[Problem]:
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in options:
            yield field_problem(f"lr_scheduler_kwargs.{key}", "is missing", f"{name} requires it")
