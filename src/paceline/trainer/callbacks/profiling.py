"""Profiling of a range of steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.config import ProfileKwargs
from paceline.trainer.arguments.parsing import read_window
from paceline.trainer.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from paceline.accelerator.accelerator import Accelerator
    from paceline.trainer.state import TrainerControl, TrainerState

__all__ = ["ProfileCallback"]


class ProfileCallback(TrainerCallback):
    """Profiles a range of steps; each rank writes a trace into `output_dir/profile`.

    Args:
        accelerator: Runs the profiler.
        steps: `first:last`, in optimizer steps counted from 1.
    """

    def __init__(self, accelerator: Accelerator, steps: str) -> None:
        self._accelerator = accelerator
        self._first, self._last = read_window(steps)
        self._running: AbstractContextManager[Any] | None = None

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Start before the first step of the range."""
        if state.global_step + 1 == self._first:
            folder = Path(args.output_dir) / "profile"
            folder.mkdir(parents=True, exist_ok=True)
            self._running = self._accelerator.profile(ProfileKwargs(output_trace_dir=str(folder)))
            self._running.__enter__()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Stop after the last step of the range."""
        if state.global_step >= self._last:
            self._stop()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Stop at the end of the training."""
        self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._running = None
