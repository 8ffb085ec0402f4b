"""Lists and tuples of tensors: one entry a sample, or a set of tensors that have a row a sample each?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.collectives.nested import maybe_children, tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Evidence", "is_plain_entries", "is_unclear", "maybe_per_sample", "tensors_alike"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one batch of one rank says about a sequence that holds tensors.

    Attributes:
        per_sample: It has as many entries as the batch has samples.
        per_row: Every tensor in it has as many rows as the batch has samples, or no dimension.
    """

    per_sample: bool
    per_row: bool

    @classmethod
    def of(cls, value: Sequence[Any], samples: int) -> Evidence:
        """Look at a sequence that belongs to a batch of so many samples."""
        shapes = list(_shapes(value))
        per_row = bool(shapes) and all(shape[:1] in ((), (samples,)) for shape in shapes)
        return cls(len(value) == samples, per_row)


def is_plain_entries(value: Any) -> bool:
    """Say whether a container is a list of entries whatever the batch: no tensor lies in it by itself.

    A list of mappings is one, for that is how the targets of single samples come, and so is the tuple of strings that
    torch's collate makes.
    """
    if type(value) is tuple:
        return not value or (isinstance(value[0], str | bytes) and all(isinstance(e, str | bytes) for e in value))
    return isinstance(value, list) and not any(map(_holds_tensors, value))


def is_unclear(value: Any) -> bool:
    """Say whether a sequence may be one entry a sample or a set of tensors: its entries are all of one kind."""
    if type(value) is tuple:
        candidate = bool(value) and all(isinstance(entry, Mapping) for entry in value)
    else:
        candidate = isinstance(value, list) and any(map(_holds_tensors, value))
    return candidate and len(set(map(_kind, value))) == 1


def tensors_alike(value: Any) -> bool:
    """Say whether this is a plain tuple of tensors of one kind, which might belong to single samples."""
    if type(value) is not tuple or not all(isinstance(entry, torch.Tensor) for entry in value):
        return False
    return len(set(map(_kind, value))) == 1


def maybe_per_sample(evidence: Iterable[Evidence], kind: type) -> bool | None:
    """Say whether an unclear sequence is one entry a sample, from the evidence of all ranks or all batches.

    None if that cannot be told: it may be either, or it is neither; a tuple that is neither is a set of tensors.
    """
    seen = list(evidence)
    per_sample, per_row = all(one.per_sample for one in seen), all(one.per_row for one in seen)
    if per_sample != per_row:
        return per_sample
    return False if kind is tuple and not per_sample else None


def _kind(entry: Any) -> Any:
    """What entries of single samples have in common: never their sizes."""
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
