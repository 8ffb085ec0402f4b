"""The state of the script's own objects that read a loader's data, beside the position of the loader."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from paceline.environment.object_state import ObjectState, OwnGenerators

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["ReadingState", "SeededCollate"]

_LOG = logging.getLogger(__name__)

# A sampler's own list of indices is shuffled in place, and saved whole.
MAX_SAMPLER_ELEMENTS = 2**22


class ReadingState:
    """The generators and attributes of a loader's sampler, data set and collate function.

    What runs once for an epoch (a sampler), or is read again from the beginning of the epoch to resume (a stream), is
    saved as it was when the iteration began, and its generators are set for each epoch, so that they do not depend on
    how far ahead was read. What reads each batch by itself is saved as it is.

    Args:
        once: What an iteration runs from its beginning, by name.
        each: What reads each batch by itself, in this process.
        without: Objects and generators to leave alone.
        ahead: What reads some batches ahead, so that its attributes belong to no position.
    """

    def __init__(
        self,
        once: Mapping[str, Any],
        each: Mapping[str, Any],
        without: Iterable[Any] = (),
        ahead: Mapping[str, Any] | None = None,
    ) -> None:
        without = list(without)
        self._ahead = ObjectState(ahead or {})
        without_once = [*without, *each.values()]
        self._once = ObjectState(once, without_once, MAX_SAMPLER_ELEMENTS)
        self._epoch_generators = OwnGenerators(once, without_once)
        self._each = ObjectState(each, without)
        self._generators = OwnGenerators(each, without)
        self._at_begin: dict[str, Any] | None = None

    def begin(self, epoch: int) -> None:
        """Prepare for an iteration over `epoch`."""
        self._at_begin = self._once.capture()
        self._epoch_generators.begin(epoch)

    @contextmanager
    def rehearsal(self, epoch: int) -> Iterator[None]:
        """Let what an iteration runs once run in the body as it will in `epoch`, and leave it as it was."""
        self.begin(epoch)
        before = self._at_begin
        assert before is not None
        try:
            yield
        finally:
            self._once.restore(before)

    def state_dict(self, *, within: bool) -> dict[str, Any]:
        """Return what has changed, and all generators; empty if there is nothing.

        Args:
            within: Whether a resumed run begins with the iteration that began last.
        """
        once = self._at_begin
        if once is None or not within:
            once = self._once.capture()
        each, changed = self._each.capture(), self._ahead.capture()
        each["lost"] += [*changed["values"], *changed["lost"]]
        parts = {
            "once": once, "each": each, "epoch_generators": self._epoch_generators.base,
            "generators": self._generators.states(),
        }  # fmt: skip
        is_empty = not any([*once.values(), *each.values(), parts["epoch_generators"], parts["generators"]])
        return {} if is_empty else parts

    def load_state_dict(self, state: Mapping[str, Any], owner: str) -> None:
        """Restore a state, and warn of what could not be saved.

        Args:
            state: What `state_dict` returned.
            owner: The loader, for the warning.
        """
        if not state:
            return
        self._once.restore(state["once"])
        self._each.restore(state["each"])
        self._epoch_generators.base = state["epoch_generators"]
        self._generators.restore(state["generators"])
        lost = [*state["once"]["lost"], *state["each"]["lost"]]
        if lost:
            _LOG.warning(
                "%s of %s had changed when the checkpoint was written, and could not be saved: this run begins with "
                "what the script sets. If the samples depend on that, give the object a state_dict and a "
                "load_state_dict, or a set_epoch",
                ", ".join(lost[:5]), owner,
            )  # fmt: skip


class SeededCollate:
    """A collate function whose own generators are seeded for each batch of a worker, as the global ones are.

    Args:
        collate: The user's collate function.
    """

    _objects_of_script = ("_collate",)

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate
        self._generators: OwnGenerators | None = None

    def __call__(self, samples: Any) -> Any:
        """Collate samples."""
        if self._generators is None:
            self._generators = OwnGenerators({"collate_fn": self._collate})
        self._generators.seed(torch.initial_seed())
        return self._collate(samples)
