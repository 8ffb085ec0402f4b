"""Batches that somebody else has made: any iterable in the place of a `DataLoader`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from paceline.collectives.nested import tensors
from paceline.data.stateful import Stateful
from paceline.errors import DataError

__all__ = ["ReadyBatches", "as_loader", "looks_like_batches"]


class _Batches(IterableDataset[Any]):
    """An iterable of batches, as a data set that is asked for one after the other."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self._begun = False

    def __iter__(self) -> Iterator[Any]:
        iterator: Iterator[Any] = iter(self.batches)
        if iterator is self.batches and self._begun:
            raise DataError(
                f"A second pass over a {type(self.batches).__name__} was begun",
                "It yields its batches once, and has none left",
                "Give a list, or an object whose __iter__ begins anew; or train for one pass only",
            )
        self._begun = True
        return iterator

    def set_epoch(self, epoch: int) -> None:
        """Tell the iterable, if it wants to know."""
        told = getattr(self.batches, "set_epoch", None)
        if callable(told):
            told(epoch)


class ReadyBatches(DataLoader[Any]):
    """A loader that hands on what an iterable yields, each thing as one batch.

    Args:
        batches: A list, a generator, or a loader of another library.
    """

    def __init__(self, batches: Any) -> None:
        super().__init__(_Batches(batches), batch_size=None)
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(self.dataset)

    def __len__(self) -> int:
        return len(self.batches)


class _StatefulBatches(ReadyBatches):
    """The same of an iterable that knows where it is."""

    def state_dict(self) -> Any:
        """Return where the iterable is."""
        return self.batches.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Let the next iteration go on there."""
        self.batches.load_state_dict(state)


def as_loader(thing: Any) -> DataLoader[Any]:
    """A `DataLoader` as it is, and any other iterable of batches as one.

    Raises:
        DataError: It yields no batches: it is a data set, or nothing that can be iterated.
    """
    if isinstance(thing, DataLoader):
        return thing
    kind = type(thing).__name__
    if _is_dataset(thing):
        raise DataError(
            f"A {kind}, which is a data set, was handed over as a loader",
            "It yields single samples and no batches",
            f"Hand over DataLoader({kind.lower()}, batch_size=…)",
        )
    if not hasattr(thing, "__iter__") or isinstance(thing, str | bytes | Mapping):
        why = "Nothing can be read from it batch by batch"
        raise DataError(f"A {kind} was handed over as a loader", why, "Hand over a DataLoader, or a list of batches")
    return _StatefulBatches(thing) if isinstance(thing, Stateful) else ReadyBatches(thing)


def looks_like_batches(thing: Any) -> bool:
    """Whether something that is no `DataLoader` was probably meant as one: a data set, or an iterable of batches."""
    if isinstance(thing, DataLoader | nn.Module | torch.Tensor | np.ndarray | str | bytes | Mapping | Set | type):
        return False
    if isinstance(thing, list | tuple):
        return bool(thing) and any(not isinstance(found, nn.Parameter) for found in tensors(thing[0]))
    return _is_dataset(thing) or hasattr(type(thing), "__iter__")


def _is_dataset(thing: Any) -> bool:
    return isinstance(thing, Dataset) or type(thing).__module__.startswith("datasets.")
