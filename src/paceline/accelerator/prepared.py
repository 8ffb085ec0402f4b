"""What was prepared and registered: one object that all parts of an Accelerator share."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paceline.accelerator.stepping import planned_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn
    from torch.utils.data import DataLoader

    from paceline.accelerator.stepping import AcceleratedOptimizer, AcceleratedScheduler, LossScaler, Window
    from paceline.accelerator.strategy_selection import StrategySelector
    from paceline.accelerator.training_state.attributes import AttributeState
    from paceline.accelerator.training_state.state import TrainingState
    from paceline.data import PreparedDataLoader
    from paceline.strategies import Strategy

__all__ = ["Prepared"]


@dataclass(slots=True, eq=False)
class Prepared:
    """The prepared objects, in order; each list stays the same object as it grows.

    Attributes:
        models: As `prepare` returned them.
        optimizers: As `prepare` returned them.
        schedulers: As `prepare` returned them.
        loaders: Those whose position belongs to the training state.
        foreign_loaders: Those of another family, whose position is saved by whoever provides it.
        registered: Objects of the script that checkpoints contain.
    """

    models: list[nn.Module] = field(default_factory=list)
    optimizers: list[AcceleratedOptimizer] = field(default_factory=list)
    schedulers: list[AcceleratedScheduler] = field(default_factory=list)
    loaders: list[PreparedDataLoader] = field(default_factory=list)
    foreign_loaders: list[DataLoader[Any]] = field(default_factory=list)
    registered: list[Any] = field(default_factory=list)
    _attributes: AttributeState | None = field(default=None, init=False)

    @property
    def attributes(self) -> AttributeState:
        """What of models and optimizers is not in their tensors."""
        if self._attributes is None:
            # Not at the start of every program.
            from paceline.accelerator.training_state.attributes import AttributeState

            self._attributes = AttributeState()
        return self._attributes

    def __contains__(self, thing: object) -> bool:
        """Whether a model, optimizer or scheduler was prepared here and not forgotten since."""
        return any(thing is known for kind in (self.models, self.optimizers, self.schedulers) for known in kind)

    @property
    def global_batch_size(self) -> int | None:
        """Samples in a batch of the first loader, over all ranks; None if that is not known."""
        first = next(iter((*self.loaders, *self.foreign_loaders)), None)
        return getattr(first, "total_batch_size", None)

    @property
    def micro_batch(self) -> int | None:
        """Samples in a rank's smallest batch, as far as the loaders know."""
        sizes = [loader.batch_size for loader in (*self.loaders, *self.foreign_loaders)]
        return min((size for size in sizes if size is not None), default=None)

    def remaining_steps(self, window: Window) -> int | None:
        """The optimizer steps that are left, by the schedule, else by three epochs of the longest loader.

        Args:
            window: Says how many batches a step takes.

        Returns:
            None if there is no schedule that ends, and no loader of known length.
        """
        planned = [planned_steps(wrapper.scheduler) for wrapper in self.schedulers]
        if not any(planned):
            from paceline.data.sample_order import maybe_length

            lengths = [maybe_length(loader) for loader in self.loaders]
            planned = [None if length is None else 3 * length // window.num_steps for length in lengths]
        longest = max((steps for steps in planned if steps is not None), default=None)
        done = max((optimizer.num_steps for optimizer in self.optimizers), default=0)
        return None if longest is None else max(0, longest - done)

    def note_attributes(self, strategy: Strategy | None) -> None:
        """Note the attributes of what was prepared, before training changes them."""
        from paceline.accelerator.training_state.attributes import attribute_owners

        self.attributes.note(attribute_owners(strategy, self.models, self.optimizers))

    def state_source(self, selector: StrategySelector, scaler: LossScaler | None) -> Callable[[], TrainingState]:
        """A function that returns the training state, in live memory, for a checkpoint to save or load."""

        def take_state() -> TrainingState:
            from paceline.accelerator.training_state.state import TrainingState

            return TrainingState(
                strategy=selector.current,
                models=self.models,
                optimizers=self.optimizers,
                schedulers=self.schedulers,
                loaders=self.loaders,
                scaler=scaler,
                attributes=self.attributes,
                custom=self.registered,
            )

        return take_state

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Drop what the body has added if it raises: the script never got it, and may prepare the same objects again.

        Otherwise every later step would be checked with the refused optimizer, and checkpoints would contain it.
        """
        lengths = [len(things) for things in self._lists]
        try:
            yield
        except BaseException:
            for things, length in zip(self._lists, lengths, strict=True):
                del things[length:]
            raise

    def forget(self) -> None:
        """Let go of everything but the registered objects."""
        for things in self._lists:
            things.clear()
        self.attributes.clear()

    @property
    def _lists(self) -> tuple[list[Any], ...]:
        return self.models, self.optimizers, self.schedulers, self.loaders, self.foreign_loaders
