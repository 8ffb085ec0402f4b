"""A check for schedules that were made for another number of steps than the training takes."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, SequentialLR

if TYPE_CHECKING:
    from collections.abc import Sized

    from paceline.accelerator.stepping.scheduler import AcceleratedScheduler
    from paceline.accelerator.stepping.window import Window

__all__ = ["ScheduleLengthCheck", "planned_steps"]

_ATTRIBUTES = ("total_steps", "T_max", "total_iters", "total_num_steps")
_ARGUMENT = "num_training_steps"


class PreparedLoader(Protocol):
    """What the check needs to know of a prepared loader."""

    @property
    def epoch(self) -> int:
        """How many epochs it has given."""
        ...

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        ...


def planned_steps(scheduler: Any) -> int | None:
    """How many optimizer steps a schedule is made for; None where that is unknown.

    Known are the schedules of torch that end, and those that transformers' functions make: their `num_training_steps`
    is an argument of the function inside a `LambdaLR`.
    """
    if isinstance(scheduler, SequentialLR):
        last = planned_steps(scheduler._schedulers[-1])
        return None if last is None else scheduler._milestones[-1] + last
    if isinstance(scheduler, ChainedScheduler):
        lengths = [planned_steps(part) for part in scheduler._schedulers]
        return max((length for length in lengths if length is not None), default=None)
    if isinstance(scheduler, LambdaLR):
        candidates = [_argument_of(function) for function in scheduler.lr_lambdas]
    else:
        candidates = [getattr(scheduler, name, None) for name in _ATTRIBUTES]
    length = next(filter(None, candidates), None)
    return int(length) if isinstance(length, int | float) and math.isfinite(length) else None


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


class ScheduleLengthCheck:
    """Finds schedules whose length was counted in batches before `prepare`, of all ranks or without accumulation.

    Such a length is an exact multiple of the steps that were taken, and the learning rate ends at a value that nobody
    wanted. Only when no further epoch begins is the training known to be over, so the warning waits until then.

    Args:
        ranks: How many share the data.
        window: Tells how many micro-batches a step takes.

    Attributes:
        pending: The warning to log if no further epoch begins. It holds text only, so that it may outlive the run.
    """

    def __init__(self, ranks: int, window: Window) -> None:
        self.pending: list[str] = []
        self._ranks = ranks
        self._window = window
        # Loaders keep this check alive, which must not keep schedulers and optimizers alive in turn.
        self._schedulers: WeakSet[AcceleratedScheduler] = WeakSet()
        self._lengths_before: WeakKeyDictionary[PreparedLoader, int] = WeakKeyDictionary()

    def add_scheduler(self, scheduler: AcceleratedScheduler) -> None:
        """Watch a prepared scheduler."""
        self._schedulers.add(scheduler)

    def add_loader(self, loader: Sized, prepared: PreparedLoader) -> None:
        """Watch a prepared loader, if its length is known now and was before `prepare`."""
        with contextlib.suppress(TypeError, NotImplementedError):
            before, _after = len(loader), len(prepared)
            self._lengths_before[prepared] = before

    def begin_epoch(self, loader: Any) -> None:
        """Drop the warning: training goes on, if it trains on this loader."""
        if self.pending and loader in self._lengths_before:
            self.pending.clear()

    def end_epoch(self, loader: Any) -> None:
        """Compare the schedules with the steps in the epochs of a loader so far."""
        before = self._lengths_before.get(loader)
        if before is None:
            return
        for scheduler in self._schedulers:
            text = self._compare(scheduler, before, loader)
            if text:
                self.pending[:] = [text]

    def _compare(self, scheduler: AcceleratedScheduler, before: int, loader: PreparedLoader) -> str:
        """The warning about a schedule; empty if there is none."""
        planned = planned_steps(scheduler.scheduler)
        epochs, window, batches = loader.epoch, self._window.num_steps, len(loader)
        steps = getattr(scheduler.scheduler, "last_epoch", 0)
        expected = epochs * math.ceil(batches / window)
        if not planned or not expected or abs(steps - expected) > epochs or planned <= expected + epochs:
            return ""
        reason = self._explain(planned, epochs, before, batches)
        if not reason:
            return ""
        name = type(scheduler.scheduler).__name__
        count = f"{epochs} * len(loader)" if window == 1 else f"{epochs} * math.ceil(len(loader) / {window})"
        return (
            f"{name} was made for {planned} optimizer steps, and the training took {steps}, so that the learning rate "
            f"ended at {scheduler.get_last_lr()[0]:.3g}: {reason}. A prepared scheduler steps once for each "
            f"optimizer step, on any number of ranks: prepare the loader first, and make the schedule for "
            f"{count} = {expected} steps"
        )

    def _explain(self, planned: int, epochs: int, before: int, batches: int) -> str:
        """Which wrong count the length of a schedule is; empty if it is none of them."""
        window = self._window.num_steps
        whole = epochs * math.ceil(before / window)
        counts = [
            (whole, "len(loader) was taken before prepare, where it counts the batches of all ranks"),
            (whole * self._ranks, "it was multiplied by the number of ranks"),
            (epochs * math.ceil(batches / window) * self._ranks, "it was multiplied by the number of ranks"),
            (epochs * batches, f"it counts batches, and a step takes {window} of them"),
            (epochs * before, f"it counts the batches of all ranks, and a step takes {window} of one rank's"),
            (epochs * before * self._ranks, "it counts batches, times the number of ranks"),
        ]
        return next((text for count, text in counts if count == planned), "")
