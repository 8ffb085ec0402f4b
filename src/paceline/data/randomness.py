"""Derives seeds, and isolates the random numbers of data loading from those of the program."""

from __future__ import annotations

import hashlib
import random
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from paceline.data.epochs import set_worker_epoch
from paceline.environment.object_state import OwnGenerators
from paceline.environment.random_generators import set_rng_states, state_of, uninterrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["IsolatedRng", "SeededKeys", "mix_seed", "read_global_rngs", "seed_batches", "seed_global_rngs"]


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
        _seed_own_generators(info.dataset, seed)
    return keys


# The generators of this worker's copy of the data set, once they were looked for.
_worker_generators: OwnGenerators | None = None


def _seed_own_generators(dataset: Any, seed: int) -> None:
    """Seed the generators that a worker's copy of the data set has of its own."""
    global _worker_generators
    if _worker_generators is None:
        _worker_generators = OwnGenerators({"dataset": dataset})
    if _worker_generators:
        _worker_generators.seed(seed)


def seed_global_rngs(seed: int) -> None:
    """Seed the global generators of `torch` (CPU), `random` and `numpy`."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def read_global_rngs() -> dict[str, Any]:
    """Return the states of the global generators of `torch` (CPU), `random` and `numpy`, for `set_rng_states`.

    Not as lists, which takes longer: this is called for each batch of some streams.
    """
    return {
        "torch": state_of(torch.default_generator),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }


def seed_batches(
    batches: Iterable[list[Any]], *parts: int, start: int = 0, epoch: int | None = None
) -> Iterator[SeededKeys]:
    """Give each batch of keys a seed derived from `parts` and the number of the batch, counted from `start`."""
    return (SeededKeys(keys, mix_seed(*parts, number), epoch) for number, keys in enumerate(batches, start))


class _Unseeded:
    """Makes a new bit generator of numpy in a third of the time, with a state that is not random."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        """Return `n_words` zeros, which numpy takes for random words."""
        return np.zeros(n_words, dtype)


@cache
def _unseeded() -> Any:
    _NUMPY.random.bit_generator.ISeedSequence.register(_Unseeded)
    return _Unseeded()


def _read_cached_normal() -> float | None:
    """Return the normal number that `np.random.randn` has computed for its next call, if there is one.

    They come in pairs, and `set_bit_generator` drops the second. `np.random.get_state` has it, too, but takes twenty
    times as long, because it copies the whole state; so the bit generator is away while it is read. No other code
    sees that, because no other thread runs meanwhile.
    """
    generator: Any = np.random.mtrand._rand
    bit_generator = generator._bit_generator
    stand_in = SimpleNamespace(state={"bit_generator": "none", "state": None})
    _, state, _ = uninterrupted(
        partial(setattr, generator, "_bit_generator", stand_in),
        partial(generator.get_state, legacy=False),
        partial(setattr, generator, "_bit_generator", bit_generator),
    )
    return state["gauss"] if state["has_gauss"] else None


def _write_cached_normal(number: float | None) -> None:
    if number is not None:
        state: Any = np.random.get_state(legacy=False)
        np.random.set_state({**state, "has_gauss": 1, "gauss": number})


class _RngState(NamedTuple):
    """The state of the global generators.

    Attributes:
        torch: Those of torch.
        python: That of `random`.
        numpy: The bit generator that numpy uses.
        normal: The normal number that numpy has computed for the next call.
    """

    torch: list[torch.Tensor]
    python: Any
    numpy: Any
    normal: float | None


class IsolatedRng:
    """A random state of `torch` (CPU), `random` and `numpy` that is separate from the global one.

    Calling it gives a context manager in which the global generators have this state.

    Args:
        seed: The seed of the state.
        generators: Further generators to isolate.
    """

    def __init__(self, seed: int, generators: Iterable[torch.Generator] = ()) -> None:
        self._seed = seed
        self._start: dict[str, Any] | None = None
        self._generators = (torch.default_generator, *generators)
        # Exchanging numpy's whole bit generator is a hundred times faster than reading and writing its state. It is
        # seeded when it is first used.
        self._numpy = np.random.MT19937(_unseeded())
        self._state: _RngState | None = None
        self._is_global = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run the body with this state, continued from the last time; then restore the global one.

        Within another body of its own it changes nothing.
        """
        if self._is_global:
            yield
            return
        saved = self._read()
        self._is_global = True
        try:
            self.make_global()
            yield
        finally:
            self._is_global = False
            self._state = self._read()
            self._write(saved)

    @property
    def continues(self) -> bool:
        """Whether it begins with a saved state."""
        return self._start is not None

    def start_at(self, state: dict[str, Any]) -> None:
        """Begin with what `read_global_rngs` returned instead of the seed."""
        self._start, self._state = state, None
        if self._is_global:
            self.make_global()

    def make_global(self) -> None:
        """Make this the state of the global generators."""
        if self._state is not None:
            self._write(self._state)
            return
        _NUMPY.random.set_bit_generator(self._numpy)
        if self._start is not None:
            set_rng_states(self._start, torch.device("cpu"))
            return
        seed_global_rngs(self._seed)
        for generator in self._generators:
            generator.manual_seed(self._seed)

    def _read(self) -> _RngState:
        return _RngState(
            [state_of(generator) for generator in self._generators],
            random.getstate(),
            _NUMPY.random.get_bit_generator(),
            _read_cached_normal(),
        )

    def _write(self, state: _RngState) -> None:
        for generator, tensor in zip(self._generators, state.torch, strict=True):
            generator.set_state(tensor)
        random.setstate(state.python)
        _NUMPY.random.set_bit_generator(state.numpy)
        _write_cached_normal(state.normal)
