"""The order of an epoch's samples: a function of the seed and the epoch, and of nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from paceline.data.randomness import PrivateRandomness, mix_seed
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from paceline.collectives import Group

__all__ = [
    "ListedOrder",
    "Order",
    "OrderSource",
    "RangeOrder",
    "Sampled",
    "Sequential",
    "Shuffled",
    "TensorOrder",
    "draw_together",
    "order_source",
    "own_generators",
    "reach_epoch",
    "sampler_chain",
    "size_of",
]


class Order(Protocol):
    """The keys of an epoch's samples, in the order in which one rank alone would use them."""

    def __len__(self) -> int: ...

    def take(self, start: int, stop: int) -> list[Any]:
        """Return the keys at positions `start` to `stop`, in time that depends on their number only."""
        ...


class RangeOrder:
    """The samples as they are stored."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def take(self, start: int, stop: int) -> list[int]:
        """Return the positions themselves."""
        return list(range(start, min(stop, self._size)))


class TensorOrder:
    """Integer keys, kept in one tensor [n] of int64: 8 bytes a sample."""

    def __init__(self, keys: torch.Tensor) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return self._keys.shape[0]

    def take(self, start: int, stop: int) -> list[int]:
        """Return a slice of the tensor as Python integers."""
        taken: list[int] = self._keys[start:stop].tolist()
        return taken


class ListedOrder:
    """Keys of any kind."""

    def __init__(self, keys: list[Any]) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def take(self, start: int, stop: int) -> list[Any]:
        """Return a slice of the list."""
        return self._keys[start:stop]


class OrderSource(ABC):
    """Gives each epoch its order."""

    @abstractmethod
    def size(self) -> int:
        """Return how many samples an epoch has."""

    @abstractmethod
    def of_epoch(self, seed: int, epoch: int) -> Order:
        """Return the order of one epoch. Collective: every rank must call it."""

    @abstractmethod
    def describe(self, seed: int) -> str:
        """Say in a few words where the order comes from."""


class Sequential(OrderSource):
    """The samples as they are stored, each epoch."""

    def __init__(self, sampler: SequentialSampler) -> None:
        self._sampler = sampler

    def size(self) -> int:
        """See `OrderSource.size`."""
        return len(self._sampler)

    def of_epoch(self, seed: int, epoch: int) -> Order:
        """See `OrderSource.of_epoch`; nothing is exchanged."""
        return RangeOrder(self.size())

    def describe(self, seed: int) -> str:
        """See `OrderSource.describe`."""
        return "in stored order"


class Shuffled(OrderSource):
    """What `RandomSampler` draws, from a generator that starts at (seed, epoch)."""

    def __init__(self, sampler: RandomSampler | DistributedSampler[Any]) -> None:
        self._sampler = sampler

    def size(self) -> int:
        """See `OrderSource.size`."""
        if isinstance(self._sampler, RandomSampler):
            return self._sampler.num_samples
        return len(self._sampler.dataset)  # type: ignore[arg-type]

    def of_epoch(self, seed: int, epoch: int) -> Order:
        """See `OrderSource.of_epoch`; nothing is exchanged."""
        generator = torch.Generator()
        generator.manual_seed(mix_seed(seed, epoch))
        if not isinstance(self._sampler, RandomSampler):
            return TensorOrder(torch.randperm(self.size(), generator=generator))
        stored = len(self._sampler.data_source)
        wanted = self._sampler.num_samples
        if self._sampler.replacement:
            return TensorOrder(torch.randint(stored, (wanted,), generator=generator))
        rounds = [torch.randperm(stored, generator=generator) for _ in range(-(-wanted // stored))]
        return TensorOrder((rounds[0] if len(rounds) == 1 else torch.cat(rounds))[:wanted])

    def describe(self, seed: int) -> str:
        """See `OrderSource.describe`."""
        drawn = isinstance(self._sampler, RandomSampler) and self._sampler.replacement
        return f"{'drawn with replacement' if drawn else 'shuffled'} by (seed {seed}, epoch)"


class Sampled(OrderSource):
    """What any other sampler yields: rank 0 runs it once an epoch and the others get its answer.

    It runs with the random state of `torch`, `random` and `numpy`, and of the generators that it and the
    samplers inside it hold as `generator`, set from (seed, epoch).
    """

    def __init__(self, sampler: Any, group: Group) -> None:
        self._sampler = sampler
        self._group = group

    def size(self) -> int:
        """See `OrderSource.size`."""
        return len(self._sampler)

    def of_epoch(self, seed: int, epoch: int) -> Order:
        """See `OrderSource.of_epoch`."""
        keys = draw_together(self._sampler, self._group, seed, epoch)
        return TensorOrder(keys) if isinstance(keys, torch.Tensor) else ListedOrder(keys)

    def describe(self, seed: int) -> str:
        """See `OrderSource.describe`."""
        return f"ordered by {type(self._sampler).__name__} under (seed {seed}, epoch)"


def order_source(sampler: Any, group: Group) -> OrderSource:
    """Find out how to get a sampler's order without asking it for more than is needed.

    Raises:
        DataError: The sampler hands each rank its own part already, in a way of its own.
    """
    kind = type(sampler)
    if isinstance(sampler, SequentialSampler) and kind.__iter__ is SequentialSampler.__iter__:
        return Sequential(sampler)
    if isinstance(sampler, RandomSampler) and kind.__iter__ is RandomSampler.__iter__:
        return Shuffled(sampler)
    if isinstance(sampler, DistributedSampler):
        return _taken_over(sampler, group)
    return Sampled(sampler, group)


def _taken_over(sampler: DistributedSampler[Any], group: Group) -> OrderSource:
    if type(sampler).__iter__ is DistributedSampler.__iter__:
        if sampler.shuffle:
            return Shuffled(sampler)
        return Sequential(SequentialSampler(sampler.dataset))  # type: ignore[arg-type]
    if sampler.num_replicas == 1:
        return Sampled(sampler, group)
    raise DataError(
        f"The sampler {type(sampler).__name__} yields one part of {sampler.num_replicas}",
        "paceline gives each rank its part itself, and splitting twice would lose samples",
        "Build it with num_replicas=1 and rank=0, so that it yields the whole epoch",
    )


def draw_together(sampler: Iterable[Any], group: Group, seed: int, epoch: int) -> Any:
    """Run a sampler to its end on rank 0 and give every rank what it yielded.

    Returns a tensor [n] of int64 if all that it yielded are integers, else a list. Collective: every rank
    must call it.

    Raises:
        DataError: The sampler raised on rank 0 (on rank 0 itself its own error comes up).
    """
    reach_epoch(sampler, epoch)
    drawn: Any = None
    failure: Exception | None = None
    if group.rank == 0:
        try:
            with PrivateRandomness(mix_seed(seed, epoch), own_generators(sampler))():
                drawn = _compact(list(sampler))
        except Exception as error:
            failure = error
    told = None if failure is None else f"{type(failure).__name__}: {failure}"
    told, drawn = group.broadcast_object((told, drawn))
    if failure is not None:
        raise failure
    if told is not None:
        raise DataError(
            f"The sampler {type(sampler).__name__} failed on rank 0: {told}",
            "All ranks take their order from rank 0",
            "See the traceback of rank 0",
        )
    return drawn


def _compact(keys: list[Any]) -> Any:
    if all(type(key) is int for key in keys):
        return torch.tensor(keys, dtype=torch.int64)
    return keys


def sampler_chain(sampler: Any) -> Iterator[Any]:
    """Yield a sampler and the samplers that it holds as `batch_sampler` or `sampler`, outermost first."""
    seen: set[int] = set()
    waiting = [sampler]
    while waiting:
        current = waiting.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [getattr(current, "batch_sampler", None), getattr(current, "sampler", None)]


def own_generators(sampler: Any) -> list[torch.Generator]:
    """Return the generators that a sampler and the samplers inside it hold as `generator`."""
    held = [getattr(current, "generator", None) for current in sampler_chain(sampler)]
    return list({id(g): g for g in held if isinstance(g, torch.Generator)}.values())


def reach_epoch(sampler: Any, epoch: int) -> None:
    """Call `set_epoch` on a sampler and on every sampler inside it that has one."""
    for current in sampler_chain(sampler):
        set_epoch = getattr(current, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


def size_of(thing: Any) -> int | None:
    """Return `len(thing)`, or None where it has no length."""
    try:
        return len(thing)
    except (TypeError, NotImplementedError):
        return None
