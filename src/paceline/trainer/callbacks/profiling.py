"""A window of steps under torch's profiler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.config import ProfileKwargs
from paceline.errors import ConfigError, Problem
from paceline.trainer.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from paceline.accelerator.accelerator import Accelerator
    from paceline.trainer.state import TrainerControl, TrainerState

__all__ = ["ProfileCallback", "read_window"]


def read_window(text: str) -> tuple[int, int]:
    """The first and the last step of `first:last`, or of one number.

    Raises:
        ConfigError: It is neither.
    """
    first, _, last = text.partition(":")
    try:
        window = int(first), int(last or first)
    except ValueError:
        window = (0, 0)
    if not 1 <= window[0] <= window[1]:
        what = f"{text!r} is no window of steps"
        raise ConfigError([Problem("TrainingArguments(…)", "profile_steps", what, hint="write first:last, from 1 on")])
    return window


class ProfileCallback(TrainerCallback):
    """Profiles the steps from `first` to `last`; each rank writes a trace into `output_dir/profile`.

    Args:
        accelerator: Runs the profiler.
        steps: `first:last`, counted from 1.
    """

    def __init__(self, accelerator: Accelerator, steps: str) -> None:
        self._accelerator = accelerator
        self._first, self._last = read_window(steps)
        self._running: AbstractContextManager[Any] | None = None

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Begin before the first step of the window."""
        if state.global_step + 1 == self._first:
            folder = Path(args.output_dir) / "profile"
            folder.mkdir(parents=True, exist_ok=True)
            self._running = self._accelerator.profile(ProfileKwargs(output_trace_dir=str(folder)))
            self._running.__enter__()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """End after the last step of the window."""
        if state.global_step >= self._last:
            self._end()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """End with the training."""
        self._end()

    def _end(self) -> None:
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._running = None
