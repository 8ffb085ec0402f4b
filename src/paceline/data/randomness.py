"""Seeds that depend on nothing but their parts, and randomness that leaves the program's own alone."""

from __future__ import annotations

import hashlib
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from paceline.data.epochs import tell_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["PrivateRandomness", "SeededKeys", "kept_randomness", "mix_seed", "seed_batches", "seed_program"]


def mix_seed(*parts: int) -> int:
    """Return a number of 63 bits that depends on every part and on their order.

    Adding the epoch to the seed would make epoch 1 of seed 0 the same as epoch 0 of seed 1.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# numpy's stubs leave out the two functions that change its global bit generator. `numpy.random` is imported when it
# is first used.
_NUMPY: Any = np


class SeededKeys(list[Any]):
    """The keys of one batch, and the seed of what is drawn while a worker reads them.

    A worker gets them through a queue. There they arrive as a plain list, and the worker's random numbers (of
    `torch`, `random` and `numpy`) then start at the seed: what `__getitem__` draws depends on the batch, not on which
    worker reads it or what that worker has read before. With an `epoch` the worker's copy of the data set is told.
    """

    def __init__(self, keys: Iterable[Any], seed: int, epoch: int | None = None) -> None:
        super().__init__(keys)
        self.seed = seed
        self.epoch = epoch

    def __reduce__(self) -> tuple[Callable[..., list[Any]], tuple[list[Any], int, int | None]]:
        return _arrive, (list(self), self.seed, self.epoch)


def _arrive(keys: list[Any], seed: int, epoch: int | None) -> list[Any]:
    info = get_worker_info()
    if info is not None:
        if epoch is not None:
            tell_worker(info.dataset, epoch)
        seed_program(seed)
    return keys


def seed_program(seed: int) -> None:
    """Seed the program's own generators: those of `torch` (CPU), `random` and `numpy`."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def seed_batches(
    batches: Iterable[list[Any]], *parts: int, start: int = 0, epoch: int | None = None
) -> Iterator[SeededKeys]:
    """Give each batch of keys a seed of its own, out of `parts` and its number, which counts from `start`."""
    return (SeededKeys(keys, mix_seed(*parts, number), epoch) for number, keys in enumerate(batches, start))


@contextmanager
def kept_randomness() -> Iterator[None]:
    """Put the random state of `torch` (CPU), `random` and `numpy` back after the body."""
    outside = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(outside[0])
        random.setstate(outside[1])
        np.random.set_state(outside[2])


class PrivateRandomness:
    """The random state of `torch` (CPU), `random` and `numpy` that some code has for itself.

    Args:
        seed: Where the private state starts.
        generators: Further generators that the code draws from; they are private as well.
    """

    def __init__(self, seed: int, generators: Iterable[torch.Generator] = ()) -> None:
        self._generators = (torch.default_generator, *generators)
        # numpy's state is put in place whole: to read and to write it would take a hundred times as long.
        self._numpy = np.random.MT19937()
        with self._kept():
            _NUMPY.random.set_bit_generator(self._numpy)
            for generator in self._generators:
                generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
            self._state = self._read()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run the body with the private state, which goes on where it was; put back the program's own."""
        with self._kept():
            self._write(self._state)
            try:
                yield
            finally:
                self._state = self._read()

    def adopt(self) -> None:
        """Make the private state the program's own."""
        self._write(self._state)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        outside = self._read()
        try:
            yield
        finally:
            self._write(outside)

    def _read(self) -> tuple[list[torch.Tensor], Any, Any]:
        return [g.get_state() for g in self._generators], random.getstate(), _NUMPY.random.get_bit_generator()

    def _write(self, state: tuple[list[torch.Tensor], Any, Any]) -> None:
        tensors, python, numpy = state
        for generator, tensor in zip(self._generators, tensors, strict=True):
            generator.set_state(tensor)
        random.setstate(python)
        _NUMPY.random.set_bit_generator(numpy)
