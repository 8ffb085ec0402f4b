"""The Trainer's part of a checkpoint."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from paceline.environment.logging import get_logger
from paceline.environment.object_state import ObjectState, OwnGenerators
from paceline.trainer.loops.length import StepSize

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.trainer.loops.training import TrainingLoop
    from paceline.trainer.protocol import TrainerHooks

__all__ = ["Progress"]

logger = get_logger(__name__)


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
        self._callbacks: ObjectState | None = None
        self._generators: OwnGenerators | None = None

    def begin(self, loop: TrainingLoop) -> None:
        """Belong to a training that begins; note the attributes of callbacks without a `state_dict`."""
        self.loop = loop
        callbacks = [c for c in self._hooks.callback_handler.callbacks if not hasattr(c, "state_dict")]
        named = {f"{type(callback).__name__}_{index}": callback for index, callback in enumerate(callbacks)}
        # A callback may know what is saved elsewhere.
        known = [self._hooks, loop.model, loop.accelerator, self._hooks.args, self._hooks.state]
        self._callbacks = ObjectState(named, known)
        self._generators = OwnGenerators(named, known)

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
            "callbacks": None if self._callbacks is None else self._callbacks.capture(),
            "callback_generators": None if self._generators is None else self._generators.states(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore everything."""
        hooks, loop = self._hooks, self.loop
        self.saved_step_size = StepSize.of_state(state["state"])
        hooks.state.load_state_dict(state["state"])
        for name in ("should_log", "should_evaluate", "should_save", "should_epoch_stop"):
            setattr(hooks.control, name, bool(state["control"][name]))
        hooks.callback_handler.load_states(hooks.state.stateful_callbacks)
        if self._callbacks is not None and state.get("callbacks"):
            self._callbacks.restore(state["callbacks"])
            if lost := state["callbacks"]["lost"]:
                logger.warning(
                    "%s of callbacks had changed when the checkpoint was written, and could not be saved: give the "
                    "callback a state_dict and a load_state_dict if the training depends on that", ", ".join(lost[:5]),
                )  # fmt: skip
        if self._generators is not None and state.get("callback_generators"):
            self._generators.restore(state["callback_generators"])
        if loop is not None:
            loop.meter.load_state_dict(state["losses"])
            loop.logged_at = int(state["logged_at"])
            if loop.tokens is not None:
                loop.tokens.restore(hooks.state.num_input_tokens_seen)
