"""How long a schedule is, and whether it was counted as another number of steps than were taken."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, SequentialLR

from paceline.environment.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.utils.data import DataLoader

    from paceline.data import PreparedDataLoader
    from paceline.stepping.scheduler import AcceleratedScheduler

__all__ = ["ScheduleLengths", "planned_steps", "say"]

_LOG = get_logger(__name__)
_ATTRIBUTES = ("total_steps", "T_max", "total_iters", "total_num_steps")
_ARGUMENT = "num_training_steps"


def planned_steps(scheduler: Any) -> int | None:
    """How many optimizer steps a schedule is made for; None where it does not say.

    Known are the schedules of torch that end, and those that transformers' functions make: their `num_training_steps`
    is an argument of the function inside a `LambdaLR`.
    """
    if isinstance(scheduler, SequentialLR):
        last = planned_steps(scheduler._schedulers[-1])
        return None if last is None else scheduler._milestones[-1] + last
    if isinstance(scheduler, ChainedScheduler):
        known = [planned_steps(one) for one in scheduler._schedulers]
        return max((steps for steps in known if steps is not None), default=None)
    if isinstance(scheduler, LambdaLR):
        found = next((steps for function in scheduler.lr_lambdas if (steps := _argument_of(function))), None)
    else:
        found = next((steps for name in _ATTRIBUTES if (steps := getattr(scheduler, name, None))), None)
    return int(found) if isinstance(found, int | float) and math.isfinite(found) else None


def _argument_of(function: Any) -> Any:
    if isinstance(function, partial):
        return function.keywords.get(_ARGUMENT)
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    if _ARGUMENT not in names:
        return None
    try:
        return function.__closure__[names.index(_ARGUMENT)].cell_contents
    except ValueError:  # an empty cell
        return None


class ScheduleLengths:
    """Notices schedules that were counted in batches before `prepare`, of all ranks or of no accumulation.

    Such a schedule is an exact multiple of the steps that the training took, and ends at a learning rate that nobody
    asked for. Only when no further pass begins is it known that the training is over, so that is when it is said.

    Args:
        ranks: How many share the data.
        accumulation: Tells how many micro-batches a step takes.
    """

    def __init__(self, ranks: int, accumulation: Callable[[], int]) -> None:
        self._ranks = ranks
        # Loaders hold this, and must not keep what is prepared beside them.
        self._schedulers: WeakSet[AcceleratedScheduler] = WeakSet()
        self._accumulation = accumulation
        self._before: WeakKeyDictionary[PreparedDataLoader, int] = WeakKeyDictionary()
        # What to say if nothing more comes; it holds text alone, so that it may outlive the run.
        self.verdict: list[str] = []

    def add_scheduler(self, scheduler: AcceleratedScheduler) -> None:
        """Watch a prepared schedule."""
        self._schedulers.add(scheduler)

    def add_loader(self, given: DataLoader[Any], prepared: PreparedDataLoader) -> None:
        """Watch a prepared loader, if it knows its length, which may be another than it had before."""
        with contextlib.suppress(TypeError, NotImplementedError):
            before, _after = len(given), len(prepared)
            self._before[prepared] = before

    def begin_pass(self, loader: Any) -> None:
        """Note that the training goes on, if it trains on this loader."""
        if self.verdict and loader in self._before:
            self.verdict.clear()

    def end_pass(self, loader: Any) -> None:
        """Compare the schedules with the steps of the passes over a loader so far."""
        before = self._before.get(loader)
        if before is None:
            return
        for scheduler in self._schedulers:
            text = self._compare(scheduler, before, loader)
            if text:
                self.verdict[:] = [text]

    def _compare(self, scheduler: AcceleratedScheduler, before: int, loader: PreparedDataLoader) -> str:
        planned = planned_steps(scheduler.scheduler)
        passes, window, batches = loader.epoch, self._accumulation(), len(loader)
        moved = getattr(scheduler.scheduler, "last_epoch", 0)
        taken = passes * math.ceil(batches / window)
        if not planned or not taken or abs(moved - taken) > passes:
            return ""
        why = self._explain(planned, passes, before, batches)
        if planned <= taken + passes or not why:
            return ""
        name = type(scheduler.scheduler).__name__
        count = f"{passes} * len(loader)" if window == 1 else f"{passes} * math.ceil(len(loader) / {window})"
        return (
            f"{name} was made for {planned} optimizer steps, and the training took {moved}, so that the learning rate "
            f"ended at {scheduler.get_last_lr()[0]:.3g}: {why}. A prepared schedule moves once for each "
            f"optimizer step, on any number of ranks: prepare the loader first, and make the schedule for "
            f"{count} = {taken} steps"
        )

    def _explain(self, planned: int, passes: int, before: int, batches: int) -> str:
        """Which wrong count a schedule's length is; empty if it is none of them."""
        window = self._accumulation()
        whole = passes * math.ceil(before / window)
        counts = [
            (whole, "len(loader) was taken before prepare, where it counts the batches of all ranks"),
            (whole * self._ranks, "it was multiplied by the number of ranks"),
            (passes * math.ceil(batches / window) * self._ranks, "it was multiplied by the number of ranks"),
            (passes * batches, f"it counts batches, and a step takes {window} of them"),
            (passes * before, f"it counts the batches of all ranks, and a step takes {window} of a rank's own"),
            (passes * before * self._ranks, "it counts batches, times the number of ranks"),
        ]
        return next((text for count, text in counts if count == planned), "")


def say(verdict: list[str]) -> None:
    """Warn of what was found, once."""
    while verdict:
        _LOG.warning("%s", verdict.pop())
