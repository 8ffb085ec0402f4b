"""Derives seeds, and isolates the random numbers of data loading from those of the program."""

from __future__ import annotations

import hashlib
import random
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from paceline.data.epochs import set_worker_epoch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["IsolatedRng", "SeededKeys", "mix_seed", "preserved_rng", "seed_batches", "seed_global_rngs"]


def mix_seed(*parts: int) -> int:
    """Return a seed of 63 bits that depends on every part and on their order.

    A sum of seed and epoch would make epoch 1 of seed 0 the same as epoch 0 of seed 1.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# numpy's stubs lack `get_bit_generator` and `set_bit_generator`. `numpy.random` is imported when it is first used.
_NUMPY: Any = np


class SeededKeys(list[Any]):
    """The keys of one batch, and the seed of the random numbers that are drawn while a worker reads them.

    Unpickling them in a worker gives a plain list and seeds the worker's generators (of `torch`, `random` and `numpy`).
    So what `__getitem__` draws depends on the batch, not on which worker reads it or what it has read before.

    Args:
        keys: The keys of the samples.
        seed: Set in the worker before it reads them.
        epoch: Set on the worker's copy of the data set; None leaves that unchanged.
    """

    def __init__(self, keys: Iterable[Any], seed: int, epoch: int | None = None) -> None:
        super().__init__(keys)
        self.seed = seed
        self.epoch = epoch

    def __reduce__(self) -> tuple[Callable[..., list[Any]], tuple[list[Any], int, int | None]]:
        return _unpickle_keys, (list(self), self.seed, self.epoch)


def _unpickle_keys(keys: list[Any], seed: int, epoch: int | None) -> list[Any]:
    info = get_worker_info()
    if info is not None:
        if epoch is not None:
            set_worker_epoch(info.dataset, epoch)
        seed_global_rngs(seed)
    return keys


def seed_global_rngs(seed: int) -> None:
    """Seed the global generators of `torch` (CPU), `random` and `numpy`."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def seed_batches(
    batches: Iterable[list[Any]], *parts: int, start: int = 0, epoch: int | None = None
) -> Iterator[SeededKeys]:
    """Give each batch of keys a seed derived from `parts` and the number of the batch, counted from `start`."""
    return (SeededKeys(keys, mix_seed(*parts, number), epoch) for number, keys in enumerate(batches, start))


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the random state of `torch` (CPU), `random` and `numpy` after the body."""
    saved = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(saved[0])
        random.setstate(saved[1])
        np.random.set_state(saved[2])


class _Unseeded:
    """Makes a new bit generator of numpy in a third of the time, with a state that is not random."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        """Return `n_words` zeros, which numpy takes for random words."""
        return np.zeros(n_words, dtype)


@cache
def _unseeded() -> Any:
    _NUMPY.random.bit_generator.ISeedSequence.register(_Unseeded)
    return _Unseeded()


class IsolatedRng:
    """A random state of `torch` (CPU), `random` and `numpy` that is separate from the global one.

    Calling it gives a context manager in which the global generators have this state.

    Args:
        seed: The seed of the state.
        generators: Further generators to isolate.
    """

    def __init__(self, seed: int, generators: Iterable[torch.Generator] = ()) -> None:
        self._generators = (torch.default_generator, *generators)
        # Exchanging numpy's whole bit generator is a hundred times faster than reading and writing its state. It is
        # seeded below.
        self._numpy = np.random.MT19937(_unseeded())
        with self._restoring():
            _NUMPY.random.set_bit_generator(self._numpy)
            for generator in self._generators:
                generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
            self._state = self._read()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run the body with this state, continued from the last time; then restore the global one."""
        with self._restoring():
            self._write(self._state)
            try:
                yield
            finally:
                self._state = self._read()

    def make_global(self) -> None:
        """Make this the state of the global generators."""
        self._write(self._state)

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        saved = self._read()
        try:
            yield
        finally:
            self._write(saved)

    def _read(self) -> tuple[list[torch.Tensor], Any, Any]:
        return [g.get_state() for g in self._generators], random.getstate(), _NUMPY.random.get_bit_generator()

    def _write(self, state: tuple[list[torch.Tensor], Any, Any]) -> None:
        tensors, python, numpy = state
        for generator, tensor in zip(self._generators, tensors, strict=True):
            generator.set_state(tensor)
        random.setstate(python)
        _NUMPY.random.set_bit_generator(numpy)
