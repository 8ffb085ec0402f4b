"""Wraps any iterable of batches as a `DataLoader`."""

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

__all__ = ["IterableLoader", "as_loader", "looks_like_batches"]


class _BatchDataset(IterableDataset[Any]):
    """An iterable of batches as an iterable data set."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self._begun = False

    def __iter__(self) -> Iterator[Any]:
        iterator: Iterator[Any] = iter(self.batches)
        if iterator is self.batches and self._begun:
            raise DataError(
                f"A second epoch was begun over a {type(self.batches).__name__}",
                "It is an iterator, which yields its batches only once",
                "Pass a list, or an object whose __iter__ starts again; or train for one epoch",
            )
        self._begun = True
        return iterator

    def set_epoch(self, epoch: int) -> None:
        """Call the `set_epoch` of the iterable, if it has one."""
        inner_set_epoch = getattr(self.batches, "set_epoch", None)
        if callable(inner_set_epoch):
            inner_set_epoch(epoch)


class IterableLoader(DataLoader[Any]):
    """A loader that yields what an iterable yields, each item as one batch.

    Args:
        batches: A list, a generator, or a loader of another library.
    """

    def __init__(self, batches: Any) -> None:
        super().__init__(_BatchDataset(batches), batch_size=None)
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(self.dataset)

    def __len__(self) -> int:
        return len(self.batches)


class _StatefulIterableLoader(IterableLoader):
    """An `IterableLoader` over an iterable with `state_dict` and `load_state_dict`."""

    def state_dict(self) -> Any:
        """Return the state of the iterable."""
        return self.batches.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Load a state into the iterable; the next iteration continues there."""
        self.batches.load_state_dict(state)


def as_loader(value: Any) -> DataLoader[Any]:
    """Return a `DataLoader` as it is, and wrap any other iterable of batches.

    Raises:
        DataError: It does not yield batches: it is a data set, or not an iterable.
    """
    if isinstance(value, DataLoader):
        return value
    kind = type(value).__name__
    if _is_dataset(value):
        raise DataError(
            f"A {kind}, which is a data set, was passed as a loader",
            "It yields single samples, not batches",
            f"Pass DataLoader({kind.lower()}, batch_size=…)",
        )
    if not hasattr(value, "__iter__") or isinstance(value, str | bytes | Mapping):
        why = "It is not an iterable of batches"
        raise DataError(f"A {kind} was passed as a loader", why, "Pass a DataLoader, or a list of batches")
    return _StatefulIterableLoader(value) if isinstance(value, Stateful) else IterableLoader(value)


def looks_like_batches(value: Any) -> bool:
    """Whether an argument was probably meant as a loader: it is a data set, or an iterable of batches.

    Args:
        value: Any argument.

    Returns:
        False for a `DataLoader`, which is one without a guess.
    """
    if isinstance(value, DataLoader | nn.Module | torch.Tensor | np.ndarray | str | bytes | Mapping | Set | type):
        return False
    if isinstance(value, list | tuple):
        return bool(value) and any(not isinstance(tensor, nn.Parameter) for tensor in tensors(value[0]))
    return _is_dataset(value) or hasattr(type(value), "__iter__")


def _is_dataset(value: Any) -> bool:
    return isinstance(value, Dataset) or type(value).__module__.startswith("datasets.")
