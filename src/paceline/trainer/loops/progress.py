"""The Trainer's part of a checkpoint."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from paceline.trainer.loops.length import StepSize

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.trainer.loops.training import TrainingLoop
    from paceline.trainer.protocol import TrainerHooks

__all__ = ["Progress"]


class Progress:
    """Saves and restores the state, pending requests, the state of callbacks, and losses that were not logged yet.

    Attributes:
        loop: The current training loop; None before a training.
        saved_step_size: The size of an optimizer step in the run that wrote the loaded checkpoint; None if none was
            loaded.
    """

    def __init__(self, hooks: TrainerHooks) -> None:
        self._hooks = hooks
        self.loop: TrainingLoop | None = None
        self.saved_step_size: StepSize | None = None

    def before_save(self) -> None:
        """Sum over ranks what each of them counts. Collective: every rank must call it."""
        state = self._hooks.state
        state.stateful_callbacks = self._hooks.callback_handler.states()
        if self.loop is not None:
            self.loop.meter.reduce_pending()
            if self.loop.tokens is not None:
                state.num_input_tokens_seen = self.loop.tokens.read()

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        loop = self.loop
        return {
            "state": self._hooks.state.state_dict(),
            "control": dataclasses.asdict(self._hooks.control),
            "losses": {} if loop is None else loop.meter.state_dict(),
            "logged_at": 0 if loop is None else loop.logged_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore everything."""
        hooks, loop = self._hooks, self.loop
        self.saved_step_size = StepSize.of_state(state["state"])
        hooks.state.load_state_dict(state["state"])
        for name in ("should_log", "should_evaluate", "should_save"):
            setattr(hooks.control, name, bool(state["control"][name]))
        hooks.callback_handler.load_states(hooks.state.stateful_callbacks)
        if loop is not None:
            loop.meter.load_state_dict(state["losses"])
            loop.logged_at = int(state["logged_at"])
            if loop.tokens is not None:
                loop.tokens.restore(hooks.state.num_input_tokens_seen)
