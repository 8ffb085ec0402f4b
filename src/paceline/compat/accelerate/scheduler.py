"""The prepared learning-rate scheduler, which counts one step for each rank: schedules are made for one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.accelerator import stepping
from paceline.accelerator.stepping import Window
from paceline.collectives import SoloGroup
from paceline.compat.accelerate.state import AcceleratorState, GradientState, InnermostLoader

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["AcceleratedScheduler"]


class AcceleratedScheduler(stepping.AcceleratedScheduler):
    """Steps the scheduler inside as often as there are ranks, where the optimizer stepped.

    Args:
        scheduler: The scheduler to step.
        optimizers: Whose steps it follows: one, or several.
        step_with_optimizer: False steps once on every call.
        split_batches: Whether the global batch does not grow with the number of ranks, so that one step counts once.
        window: What the core hands over.
        splits_batches: Returns `split_batches`, as it is when the scheduler steps; goes before the value.
    """

    # Whether it stands for a schedule that belongs to an engine, which counts each step once.
    is_of_engine = False

    def __init__(
        self,
        scheduler: Any,
        optimizers: Any = (),
        step_with_optimizer: bool = True,
        split_batches: bool = False,
        *,
        window: Window | None = None,
        splits_batches: Callable[[], bool] | None = None,
    ) -> None:
        self.optimizers = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
        if window is None:
            # Made by a program: whether to step is asked of the GradientState in any case.
            window = Window(1, InnermostLoader(), SoloGroup(AcceleratorState().device))
        super().__init__(scheduler, window=window, optimizers=(), step_with_optimizer=step_with_optimizer)
        self.step_with_optimizer = step_with_optimizer
        self.gradient_state = GradientState()
        self._split_batches = split_batches
        self._splits_batches = splits_batches

    @property
    def split_batches(self) -> bool:
        """Whether one step counts once, whatever the number of ranks."""
        return self._split_batches if self._splits_batches is None else self._splits_batches()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step if the optimizer did: not inside a window, and not after a skipped step.

        Args:
            args: Passed on to the scheduler inside.
            kwargs: Passed on to the scheduler inside.
        """
        if not self.step_with_optimizer:
            self.scheduler.step(*args, **kwargs)
        elif not self.gradient_state.sync_gradients:
            if self.gradient_state.adjust_scheduler:
                self.scheduler._step_count += 1
        elif not any(optimizer.step_was_skipped for optimizer in self.optimizers):
            self.advance(*args, **kwargs)

    def advance(self, *args: Any, **kwargs: Any) -> None:
        """Step the scheduler inside once for each rank, but not beyond the end of a schedule that has one.

        Args:
            args: Passed on to the scheduler inside.
            kwargs: Passed on to the scheduler inside.
        """
        is_once = self.split_batches or self.is_of_engine
        if is_once:
            self.scheduler.step(*args, **kwargs)
            return
        last = getattr(self.scheduler, "total_steps", None)
        for _ in range(AcceleratorState().num_processes):
            if last is None or self.scheduler._step_count <= last:
                self.scheduler.step(*args, **kwargs)

    def print_lr(self, *args: Any, **kwargs: Any) -> None:
        """Print the learning rate, with schedulers of torch that still can."""
        inner: Any = self.scheduler
        inner.print_lr(*args, **kwargs)
