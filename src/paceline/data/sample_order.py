"""Determines the order of an epoch's samples from the seed and the epoch alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from paceline.data.randomness import IsolatedRng, mix_seed
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from paceline.collectives import Group

__all__ = [
    "ListOrder",
    "OrderSource",
    "RangeOrder",
    "SampleOrder",
    "SamplerSource",
    "SequentialSource",
    "ShuffledSource",
    "TensorOrder",
    "maybe_length",
    "order_source",
    "run_sampler_on_rank_0",
    "sampler_chain",
    "sampler_generators",
    "set_sampler_epoch",
]

_READ_AT_ONCE = 65_536
# More than any epoch of a sampler that does not know its length, and few enough for the memory of a machine.
_MOST_SAMPLES = 2**26
_MANY_SAMPLES = 1_000_000


class SampleOrder(Protocol):
    """The keys of an epoch's samples, in the order in which a single rank would read them."""

    def __len__(self) -> int: ...

    def take(self, start: int, stop: int) -> list[Any]:
        """Return the keys at positions `start` to `stop` (exclusive), in time proportional to their number."""
        ...

    def take_batches(self, start: int, size: int, step: int, number: int) -> list[list[Any]]:
        """Return `number` batches of `size` keys whose first keys are `step` positions apart; all must exist."""
        ...


class RangeOrder:
    """The samples in stored order."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def take(self, start: int, stop: int) -> list[int]:
        """Return the positions themselves."""
        return list(range(start, min(stop, self._size)))

    def take_batches(self, start: int, size: int, step: int, number: int) -> list[list[int]]:
        """See `SampleOrder.take_batches`."""
        return [list(range(first, first + size)) for first in range(start, start + number * step, step)]


class TensorOrder:
    """Integer keys in one tensor [n] of int64, 8 bytes per sample."""

    def __init__(self, keys: torch.Tensor) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return self._keys.shape[0]

    def take(self, start: int, stop: int) -> list[int]:
        """Return a slice of the tensor as Python integers."""
        keys: list[int] = self._keys[start:stop].tolist()
        return keys

    def take_batches(self, start: int, size: int, step: int, number: int) -> list[list[int]]:
        """See `SampleOrder.take_batches`."""
        (stride,) = self._keys.stride()
        offset = self._keys.storage_offset() + start * stride
        batches: list[list[int]] = self._keys.as_strided((number, size), (step * stride, stride), offset).tolist()
        return batches


class ListOrder:
    """Keys of any kind."""

    def __init__(self, keys: list[Any]) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def take(self, start: int, stop: int) -> list[Any]:
        """Return a slice of the list."""
        return self._keys[start:stop]

    def take_batches(self, start: int, size: int, step: int, number: int) -> list[list[Any]]:
        """See `SampleOrder.take_batches`."""
        return [self._keys[first : first + size] for first in range(start, start + number * step, step)]


class OrderSource(ABC):
    """Provides the order of each epoch."""

    @abstractmethod
    def size(self) -> int:
        """Return the number of samples in an epoch."""

    @abstractmethod
    def of_epoch(self, seed: int, epoch: int) -> SampleOrder:
        """Return the order of one epoch. Collective: every rank must call it."""

    @abstractmethod
    def describe(self, seed: int) -> str:
        """Describe in a few words where the order comes from."""


class SequentialSource(OrderSource):
    """Stored order in every epoch."""

    def __init__(self, sampler: SequentialSampler) -> None:
        self._sampler = sampler

    def size(self) -> int:
        """See `OrderSource.size`."""
        return len(self._sampler)

    def of_epoch(self, seed: int, epoch: int) -> SampleOrder:
        """See `OrderSource.of_epoch`; nothing is exchanged."""
        return RangeOrder(self.size())

    def describe(self, seed: int) -> str:
        """See `OrderSource.describe`."""
        return "in stored order"


class ShuffledSource(OrderSource):
    """The order that `RandomSampler` draws from a generator seeded with (seed, epoch)."""

    def __init__(self, sampler: RandomSampler | DistributedSampler[Any]) -> None:
        self._sampler = sampler

    def size(self) -> int:
        """See `OrderSource.size`."""
        if isinstance(self._sampler, RandomSampler):
            return self._sampler.num_samples
        return len(self._sampler.dataset)  # type: ignore[arg-type]

    def of_epoch(self, seed: int, epoch: int) -> SampleOrder:
        """See `OrderSource.of_epoch`; nothing is exchanged."""
        generator = torch.Generator()
        generator.manual_seed(mix_seed(seed, epoch))
        if not isinstance(self._sampler, RandomSampler):
            return TensorOrder(torch.randperm(self.size(), generator=generator))
        dataset_size = len(self._sampler.data_source)
        num_samples = self._sampler.num_samples
        if self._sampler.replacement:
            return TensorOrder(torch.randint(dataset_size, (num_samples,), generator=generator))
        repetitions = -(-num_samples // dataset_size)
        permutations = [torch.randperm(dataset_size, generator=generator) for _ in range(repetitions)]
        keys = permutations[0] if repetitions == 1 else torch.cat(permutations)
        return TensorOrder(keys[:num_samples])

    def describe(self, seed: int) -> str:
        """See `OrderSource.describe`."""
        replaces = isinstance(self._sampler, RandomSampler) and self._sampler.replacement
        return f"{'drawn with replacement' if replaces else 'shuffled'} by (seed {seed}, epoch)"


class SamplerSource(OrderSource):
    """The order that any other sampler yields: rank 0 runs it once per epoch and broadcasts the keys.

    It runs with the random state of `torch`, `random` and `numpy`, and of the `generator` attributes of it and the
    samplers inside it, seeded with (seed, epoch).
    """

    def __init__(self, sampler: Any, group: Group) -> None:
        self._sampler = sampler
        self._group = group

    def size(self) -> int:
        """See `OrderSource.size`."""
        return len(self._sampler)

    def of_epoch(self, seed: int, epoch: int) -> SampleOrder:
        """See `OrderSource.of_epoch`."""
        keys = run_sampler_on_rank_0(self._sampler, self._group, seed, epoch)
        return TensorOrder(keys) if isinstance(keys, torch.Tensor) else ListOrder(keys)

    def describe(self, seed: int) -> str:
        """See `OrderSource.describe`."""
        return f"ordered by {type(self._sampler).__name__} under (seed {seed}, epoch)"


def order_source(sampler: Any, group: Group) -> OrderSource:
    """Return the cheapest way to get a sampler's order.

    Raises:
        DataError: The sampler is a `DistributedSampler` subclass that already splits the data in its own way.
    """
    kind = type(sampler)
    if isinstance(sampler, SequentialSampler) and kind.__iter__ is SequentialSampler.__iter__:
        return SequentialSource(sampler)
    if isinstance(sampler, RandomSampler) and kind.__iter__ is RandomSampler.__iter__:
        return ShuffledSource(sampler)
    if isinstance(sampler, DistributedSampler):
        return _order_of_distributed_sampler(sampler, group)
    return SamplerSource(sampler, group)


def _order_of_distributed_sampler(sampler: DistributedSampler[Any], group: Group) -> OrderSource:
    if type(sampler).__iter__ is DistributedSampler.__iter__:
        if sampler.shuffle:
            return ShuffledSource(sampler)
        return SequentialSource(SequentialSampler(sampler.dataset))  # type: ignore[arg-type]
    if sampler.num_replicas == 1:
        return SamplerSource(sampler, group)
    raise DataError(
        f"The sampler {type(sampler).__name__} yields one part of {sampler.num_replicas}",
        "paceline splits the samples between ranks itself; splitting twice would lose samples",
        "Create it with num_replicas=1 and rank=0, so that it yields the whole epoch",
    )


def run_sampler_on_rank_0(sampler: Iterable[Any], group: Group, seed: int, epoch: int) -> Any:
    """Run a sampler to its end on rank 0 and give every rank what it yielded.

    Collective: every rank must call it.

    Returns:
        A tensor [n] of int64 if the sampler yields only integers, else a list.

    Raises:
        DataError: The sampler raised on rank 0 (rank 0 raises the sampler's own error).
    """
    set_sampler_epoch(sampler, epoch)
    keys: Any = None
    failure: Exception | None = None
    if group.rank == 0:
        try:
            with IsolatedRng(mix_seed(seed, epoch), sampler_generators(sampler))():
                keys = _compact(_read_to_end(sampler))
        except Exception as error:
            failure = error
    reason = None if failure is None else f"{type(failure).__name__}: {failure}"
    reason, keys = group.broadcast_object((reason, keys))
    if failure is not None:
        raise failure
    if reason is not None:
        raise DataError(
            f"The sampler {type(sampler).__name__} failed on rank 0: {reason}",
            "All ranks get the order of the samples from rank 0",
            "See the traceback of rank 0",
        )
    return keys


def _read_to_end(sampler: Iterable[Any]) -> list[Any]:
    """Read what a sampler yields in an epoch.

    Raises:
        DataError: It does not end.
    """
    size = maybe_length(sampler)
    # A length that is merely wrong is reported at the end of the epoch.
    limit = _MOST_SAMPLES if size is None else max(_MANY_SAMPLES, 100 * size)
    samples = 0
    keys: list[Any] = []
    iterator = iter(sampler)
    while part := list(islice(iterator, _READ_AT_ONCE)):
        keys += part
        samples += sum(len(key) if isinstance(key, list) else 1 for key in part)
        if samples > limit:
            raise DataError(
                f"The sampler {type(sampler).__name__} has yielded {samples:,} samples and does not end",
                "paceline reads the order of a whole epoch before the epoch begins",
                "Let it end after an epoch, or remove its __len__: it is then read batch by batch",
            )
    return keys


def _compact(keys: list[Any]) -> Any:
    if set(map(type, keys)) <= {int}:
        return torch.tensor(keys, dtype=torch.int64)
    return keys


def sampler_chain(sampler: Any) -> Iterator[Any]:
    """Yield a sampler and those in its `batch_sampler` and `sampler` attributes, outermost first."""
    seen: set[int] = set()
    waiting = [sampler]
    while waiting:
        current = waiting.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [getattr(current, "batch_sampler", None), getattr(current, "sampler", None)]


def sampler_generators(sampler: Any) -> list[torch.Generator]:
    """Return the `generator` attributes of a sampler and the samplers inside it, each once."""
    generators = [getattr(current, "generator", None) for current in sampler_chain(sampler)]
    return list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())


def set_sampler_epoch(sampler: Any, epoch: int) -> None:
    """Call `set_epoch` on a sampler and on every sampler inside it that has one."""
    for current in sampler_chain(sampler):
        set_epoch = getattr(current, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


def maybe_length(value: Any) -> int | None:
    """Return `len(value)`, or None if it has no length."""
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None
