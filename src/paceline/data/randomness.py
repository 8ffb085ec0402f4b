"""Seeds that depend on nothing but their parts, and randomness that leaves the program's own alone."""

from __future__ import annotations

import hashlib
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["PrivateRandomness", "kept_randomness", "mix_seed"]


def mix_seed(*parts: int) -> int:
    """Return a number of 63 bits that depends on every part and on their order.

    Adding the epoch to the seed would make epoch 1 of seed 0 the same as epoch 0 of seed 1.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


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
        with self._kept():
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
        return [g.get_state() for g in self._generators], random.getstate(), np.random.get_state()

    def _write(self, state: tuple[list[torch.Tensor], Any, Any]) -> None:
        tensors, python, numpy = state
        for generator, tensor in zip(self._generators, tensors, strict=True):
            generator.set_state(tensor)
        random.setstate(python)
        np.random.set_state(numpy)
