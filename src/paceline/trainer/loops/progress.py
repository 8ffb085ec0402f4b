"""The Trainer's part of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

from paceline.checkpoint import from_plain, to_plain
from paceline.environment.logging import get_logger
from paceline.environment.object_state import ObjectState, OwnGenerators
from paceline.trainer.loops.length import StepSize

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from paceline.trainer.loops.training import TrainingLoop
    from paceline.trainer.protocol import TrainerHooks

__all__ = ["Progress"]

logger = get_logger(__name__)


class Progress:
    """Saves and restores the state, pending requests, losses that were not logged yet, and the script's own objects.

    These are callbacks, the attributes that a subclass adds to the Trainer, and the functions that it was given.

    Attributes:
        loop: The current training loop; None before a training.
        saved_step_size: The size of an optimizer step in the run that wrote the loaded checkpoint; None if none was
            loaded.
    """

    def __init__(self, hooks: TrainerHooks) -> None:
        self._hooks = hooks
        self.loop: TrainingLoop | None = None
        self.saved_step_size: StepSize | None = None
        self._attributes: ObjectState | None = None
        self._generators: OwnGenerators | None = None
        # Of all ranks, between `before_save` and the save.
        self._of_ranks: list[dict[str, Any]] | None = None

    def begin(self, loop: TrainingLoop) -> None:
        """Belong to a training that begins; note the attributes of the script's objects without a `state_dict`."""
        self.loop, hooks = loop, self._hooks
        # By class: a setting may add a built-in callback in front of them.
        counts: Counter[str] = Counter()
        objects: dict[str, Any] = {"trainer": hooks}
        for callback in hooks.callback_handler.callbacks:
            name = type(callback).__name__
            if not hasattr(callback, "state_dict"):
                objects[f"{name}_{counts[name]}"] = callback
            counts[name] += 1
        # They may know what is saved elsewhere.
        own = vars(hooks)
        known = [own[name] for name in own if name not in hooks._objects_of_script]
        known += [loop, loop.model, loop.loader, *hooks.callback_handler.things.values()]
        known = [thing for thing in known if hasattr(thing, "__dict__")]
        known += [*loop.model.modules(), *loop.model.parameters(), *loop.model.buffers()]
        self._attributes = ObjectState(objects, known, weights=True)
        self._generators = OwnGenerators(objects, known)

    def before_save(self) -> None:
        """Sum over ranks what each of them counts. Collective: every rank must call it."""
        state = self._hooks.state
        state.stateful_callbacks = self._hooks.callback_handler.states()
        self._of_ranks = self._hooks.accelerator.gather_object([self._objects()])
        if self.loop is not None:
            self.loop.meter.reduce_pending()
            if self.loop.tokens is not None:
                state.num_input_tokens_seen = self.loop.tokens.read()

    def _objects(self) -> dict[str, Any]:
        """What the script's objects keep on this rank, as JSON values."""
        if self._attributes is None or self._generators is None:
            return {}
        states = {"attributes": self._attributes.capture(), "generators": self._generators.states()}
        plain: dict[str, Any] = to_plain(states, "trainer")
        return plain

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        loop = self.loop
        of_ranks, self._of_ranks = self._of_ranks, None
        return {
            "state": self._hooks.state.state_dict(),
            "control": dataclasses.asdict(self._hooks.control),
            "losses": {} if loop is None else loop.meter.state_dict(),
            "logged_at": 0 if loop is None else loop.logged_at,
            "objects": [self._objects()] if of_ranks is None else of_ranks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore everything."""
        hooks, loop = self._hooks, self.loop
        self.saved_step_size = StepSize.of_state(state["state"])
        hooks.state.load_state_dict(state["state"])
        for name in ("should_log", "should_evaluate", "should_save", "should_epoch_stop"):
            setattr(hooks.control, name, bool(state["control"][name]))
        hooks.callback_handler.load_states(hooks.state.stateful_callbacks)
        self._restore_objects([from_plain(objects) for objects in state.get("objects", ())])
        if loop is not None:
            loop.meter.load_state_dict(state["losses"])
            loop.logged_at = int(state["logged_at"])
            if loop.tokens is not None:
                loop.tokens.restore(hooks.state.num_input_tokens_seen)

    def _restore_objects(self, of_ranks: list[dict[str, Any]]) -> None:
        """Restore what `_objects` returned on each rank; ranks that were not there get that of rank 0."""
        if self._attributes is None or self._generators is None or not any(of_ranks):
            return
        rank = self._hooks.accelerator.process_index
        is_there = rank < len(of_ranks)
        own = of_ranks[rank if is_there else 0]
        self._attributes.restore(own["attributes"])
        if is_there or _are_equal(objects["generators"] for objects in of_ranks):
            self._generators.restore(own["generators"])
        if lost := own["attributes"]["lost"]:
            logger.warning(
                "%s of callbacks or of the Trainer had changed when the checkpoint was written, and could not be "
                "saved: give the object a state_dict and a load_state_dict if the training depends on that",
                ", ".join(lost[:5]),
            )  # fmt: skip


def _are_equal(states: Iterable[Any]) -> bool:
    """Whether all ranks had generators in the same states, as one that all of them share by its seed."""
    return len({repr(to_plain(state, "generators")) for state in states}) == 1
