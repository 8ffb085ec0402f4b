"""The prepared learning-rate scheduler, which steps when its optimizer does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LRScheduler

if TYPE_CHECKING:
    from collections.abc import Iterable

    from paceline.accelerator.stepping.optimizer import AcceleratedOptimizer
    from paceline.accelerator.stepping.window import Window

__all__ = ["AcceleratedScheduler", "is_scheduler"]


class AcceleratedScheduler:
    """A learning-rate scheduler that steps once for each optimizer step that was taken, at any world size.

    Args:
        scheduler: The scheduler to step.
        window: The accumulation window.
        optimizers: Whose steps it follows.
        step_with_optimizer: False steps on every call.
    """

    def __init__(
        self,
        scheduler: LRScheduler,
        *,
        window: Window,
        optimizers: Iterable[AcceleratedOptimizer],
        step_with_optimizer: bool = True,
    ) -> None:
        self.scheduler = scheduler
        self._window = window
        self._optimizers = tuple(optimizers)
        self._step_with_optimizer = step_with_optimizer
        self._steps_seen = sum(optimizer.steps_since_start for optimizer in self._optimizers)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step if the optimizer did: not inside a window, and not after a skipped step.

        A call with arguments always steps: a metric (`ReduceLROnPlateau`) or an epoch is the script's own measure and
        belongs to no single step. So does a call after several optimizer steps, such as once an epoch, even when the
        last of them was skipped or was followed by an unfinished window.

        Args:
            args: Passed on to the scheduler inside.
            kwargs: Passed on to the scheduler inside.
        """
        if args or kwargs or not self._step_with_optimizer or self._optimizer_stepped():
            self.advance(*args, **kwargs)

    def advance(self, *args: Any, **kwargs: Any) -> None:
        """Step the scheduler inside: once. A subclass may count otherwise.

        Args:
            args: Passed on to the scheduler inside.
            kwargs: Passed on to the scheduler inside.
        """
        self.scheduler.step(*args, **kwargs)

    def _optimizer_stepped(self) -> bool:
        taken, was_skipped = 0, False
        for optimizer in self._optimizers:
            taken += optimizer.steps_since_start
            was_skipped = was_skipped or optimizer.step_was_skipped
        since, self._steps_seen = taken - self._steps_seen, taken
        if since > len(self._optimizers):
            return True
        return self._window.boundary.sync_gradients and not was_skipped

    def get_last_lr(self) -> list[Any]:
        """The current learning rates, one for each parameter group."""
        return self.scheduler.get_last_lr()

    def get_lr(self) -> Any:
        """What the scheduler inside computes next; scripts want `get_last_lr`."""
        return self.scheduler.get_lr()

    @property
    def last_epoch(self) -> int:
        """How many steps the scheduler has taken."""
        return self.scheduler.last_epoch

    def state_dict(self) -> dict[str, Any]:
        """The state of the scheduler inside."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state into the scheduler inside."""
        self.scheduler.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.scheduler!r})"


def is_scheduler(candidate: object) -> bool:
    """Whether an object is a learning-rate scheduler of torch, or has the methods of one."""
    return isinstance(candidate, LRScheduler) or all(
        callable(getattr(candidate, name, None)) for name in ("step", "get_last_lr", "state_dict")
    )
