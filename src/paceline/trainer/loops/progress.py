"""The Trainer's own part of a checkpoint."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from paceline.trainer.loops.resuming import Pace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.trainer.core import TrainerCore
    from paceline.trainer.loops.training import TrainingLoop

__all__ = ["Progress"]


class Progress:
    """Where a training is, what is still due, what callbacks keep, and losses that were not logged yet."""

    def __init__(self, trainer: TrainerCore) -> None:
        self._trainer = trainer
        self.loop: TrainingLoop | None = None
        # Of the run whose state was loaded; None before.
        self.saved_pace: Pace | None = None

    def before_save(self) -> None:
        """Bring together what is spread over ranks. Collective: every rank must call it."""
        trainer = self._trainer
        trainer.state.stateful_callbacks = trainer.callback_handler.states()
        if self.loop is not None:
            self.loop.meter.settle()
            if self.loop.tokens is not None:
                trainer.state.num_input_tokens_seen = self.loop.tokens.read()

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        loop = self.loop
        return {
            "state": self._trainer.state.state_dict(),
            "control": dataclasses.asdict(self._trainer.control),
            "losses": {} if loop is None else loop.meter.state_dict(),
            "logged_at": 0 if loop is None else loop.logged_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        trainer, loop = self._trainer, self.loop
        self.saved_pace = Pace.saved(state["state"])
        trainer.state.load_state_dict(state["state"])
        for name in ("should_log", "should_evaluate", "should_save"):
            setattr(trainer.control, name, bool(state["control"][name]))
        trainer.callback_handler.load_states(trainer.state.stateful_callbacks)
        if loop is not None:
            loop.meter.load_state_dict(state["losses"])
            loop.logged_at = int(state["logged_at"])
            if loop.tokens is not None:
                loop.tokens.go_on_from(trainer.state.num_input_tokens_seen)
