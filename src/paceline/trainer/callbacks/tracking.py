"""Reporting of the log to experiment trackers, through the Accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from paceline.trainer.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from paceline.accelerator.accelerator import Accelerator
    from paceline.trainer.state import TrainerControl, TrainerState

__all__ = ["TrackedRun", "TrackingCallback"]


class TrackedRun(Protocol):
    """The part of a Trainer that is reported."""

    accelerator: Accelerator
    tokens_seen: int


class TrackingCallback(TrainerCallback):
    """Starts the trackers of `report_to` with the first log entry, and passes every entry on to them.

    `metrics.jsonl` and `run.json` are always written into `output_dir`. An evaluation after the training belongs to
    the same run, so trackers are closed only by `Trainer.end`, or when the process ends.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._is_open = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Start the trackers."""
        self._open(args)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Pass on the entry."""
        self._open(args)
        extra = {"tokens_seen": self._run.tokens_seen} if self._run.tokens_seen else {}
        self._run.accelerator.log(things["logs"], step=state.global_step, log_kwargs={"jsonl": extra})

    def _open(self, args: Any) -> None:
        if self._is_open:
            return
        self._is_open = True
        config = {**args.to_dict(), "origins": args.origins()}
        self._run.accelerator.init_trackers(args.project, config, run_name=args.run_name)
