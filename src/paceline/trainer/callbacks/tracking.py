"""What a Trainer tells experiment trackers, through the Accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.trainer.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from paceline.trainer.core import TrainerCore
    from paceline.trainer.state import TrainerControl, TrainerState

__all__ = ["TrackingCallback"]


class TrackingCallback(TrainerCallback):
    """Opens the trackers of `report_to` when there is something to say, and hands them every log entry.

    `metrics.jsonl` and `run.json` are always written into `output_dir`. What is evaluated after a training belongs to
    the same run, so the trackers are closed by `Trainer.end`, or when the process ends.
    """

    def __init__(self, trainer: TrainerCore) -> None:
        self._trainer = trainer
        self._is_open = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Open the trackers."""
        self._open()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Hand on the entry."""
        self._open()
        trainer = self._trainer
        facts = {"tokens_seen": trainer.tokens_seen} if trainer.tokens_seen else {}
        trainer.accelerator.log(things["logs"], step=state.global_step, log_kwargs={"jsonl": facts})

    def _open(self) -> None:
        if self._is_open:
            return
        self._is_open = True
        trainer, args = self._trainer, self._trainer.args
        config = {**args.to_dict(), "origins": args.origins()}
        trainer.accelerator.init_trackers(args.project, config, run_name=args.run_name)
