"""Decides whether a list or tuple of tensors has one entry per sample, or is a structure with one row per sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.collectives.nested import maybe_children, tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["SampleEvidence", "is_ambiguous", "is_entry_list", "is_uniform_tensor_tuple", "maybe_per_sample"]


@dataclass(frozen=True, slots=True)
class SampleEvidence:
    """What one batch of one rank shows about a sequence of tensors.

    Attributes:
        per_sample: Whether it has as many entries as the batch has samples.
        per_row: Whether every tensor in it has as many rows as the batch has samples, or no dimension.
    """

    per_sample: bool
    per_row: bool

    @classmethod
    def of(cls, value: Sequence[Any], samples: int) -> SampleEvidence:
        """Examine a sequence that belongs to a batch of `samples` samples."""
        shapes = list(_shapes(value))
        per_row = bool(shapes) and all(shape[:1] in ((), (samples,)) for shape in shapes)
        return cls(len(value) == samples, per_row)


def is_entry_list(value: Any) -> bool:
    """Say whether a container is a list of entries whatever the batch, because no entry is a tensor.

    A list of mappings is one, the usual form of targets for single samples, and so is the tuple of strings that torch's
    collate makes.
    """
    if type(value) is tuple:
        return not value or (isinstance(value[0], str | bytes) and all(isinstance(e, str | bytes) for e in value))
    return isinstance(value, list) and not any(map(_holds_tensors, value))


def is_ambiguous(value: Any) -> bool:
    """Say whether a sequence may be one entry per sample or a structure: all its entries are of one kind."""
    if type(value) is tuple:
        candidate = bool(value) and all(isinstance(entry, Mapping) for entry in value)
    else:
        candidate = isinstance(value, list) and any(map(_holds_tensors, value))
    return candidate and len(set(map(_kind, value))) == 1


def is_uniform_tensor_tuple(value: Any) -> bool:
    """Say whether this is a plain tuple of tensors of one kind, which may belong to single samples."""
    if type(value) is not tuple or not all(isinstance(entry, torch.Tensor) for entry in value):
        return False
    return len(set(map(_kind, value))) == 1


def maybe_per_sample(evidence: Iterable[SampleEvidence], kind: type) -> bool | None:
    """Say whether an ambiguous sequence has one entry per sample, from the evidence of all ranks or all batches.

    None if both readings are possible, or neither is; a tuple for which neither is possible is a structure.
    """
    collected = list(evidence)
    per_sample = all(item.per_sample for item in collected)
    per_row = all(item.per_row for item in collected)
    if per_sample != per_row:
        return per_sample
    return False if kind is tuple and not per_sample else None


def _kind(entry: Any) -> Any:
    """What the entries of single samples have in common; their sizes may differ."""
    if isinstance(entry, torch.Tensor | np.ndarray):
        return (str(entry.dtype), entry.ndim)
    if isinstance(entry, Mapping):
        return ("mapping", frozenset(entry))
    if isinstance(entry, list | tuple):
        return (type(entry).__name__, frozenset(map(_kind, entry)))
    return type(entry).__name__


def _holds_tensors(value: Any) -> bool:
    """Say whether a list entry is a tensor or a sequence of tensors; a mapping is neither."""
    if isinstance(value, torch.Tensor):
        return True
    return isinstance(value, list | tuple) and next(tensors(value), None) is not None


def _shapes(value: Any) -> Iterator[tuple[int, ...]]:
    if isinstance(value, torch.Tensor | np.ndarray):
        yield tuple(value.shape)
        return
    for _, child in maybe_children(value) or ():
        yield from _shapes(child)
