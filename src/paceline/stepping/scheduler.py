"""The scheduler that moves when its optimizer does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LRScheduler

if TYPE_CHECKING:
    from collections.abc import Iterable

    from paceline.stepping.optimizer import AcceleratedOptimizer
    from paceline.stepping.window import Window

__all__ = ["AcceleratedScheduler", "is_scheduler"]


class AcceleratedScheduler:
    """A learning-rate scheduler that moves once for each optimizer step that was taken, at any world size."""

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
        self._seen = self._steps()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Move on, if the optimizer did: not inside a window, and not after a skipped step.

        What is called with an argument always moves: a metric (`ReduceLROnPlateau`) or an epoch is measured by the
        script and belongs to no single step. So does a schedule that is called after several optimizer steps, once a
        pass say, when the last of them was skipped or was followed by an unfinished window.
        """
        if args or kwargs or not self._step_with_optimizer or self._follows_a_step():
            self.scheduler.step(*args, **kwargs)

    def _follows_a_step(self) -> bool:
        taken = self._steps()
        since, self._seen = taken - self._seen, taken
        if since > len(self._optimizers):
            return True
        return self._window.sync_gradients and not any(o.step_was_skipped for o in self._optimizers)

    def _steps(self) -> int:
        return sum(optimizer.num_steps_here for optimizer in self._optimizers)

    def get_last_lr(self) -> list[Any]:
        """The learning rates in force, one a group."""
        return self.scheduler.get_last_lr()

    def get_lr(self) -> Any:
        """What the scheduler inside computes; `get_last_lr` is what scripts want."""
        return self.scheduler.get_lr()

    @property
    def last_epoch(self) -> int:
        """How many steps the schedule has moved."""
        return self.scheduler.last_epoch

    def state_dict(self) -> dict[str, Any]:
        """The state of the scheduler inside."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the scheduler inside."""
        self.scheduler.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.scheduler!r})"


def is_scheduler(thing: object) -> bool:
    """Whether something is a learning-rate scheduler of torch, or acts as one."""
    return isinstance(thing, LRScheduler) or all(
        callable(getattr(thing, name, None)) for name in ("step", "get_last_lr", "state_dict")
    )
