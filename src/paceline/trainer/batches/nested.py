"""Batches as they come: tensors, lists and texts in mappings, tuples and lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["first_rows", "is_structure", "leaves_of", "like", "map_leaves", "rows_of"]


def first_rows(batch: Any, count: int, rows: int) -> Any:
    """A batch of `rows` rows without those after `count`; leaves that are no rows stay."""
    return map_leaves(lambda value: value[:count] if rows_of(value) == rows else value, batch)


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply to every leaf of nested mappings, tuples and lists."""
    if isinstance(value, Mapping):
        return {name: map_leaves(function, part) for name, part in value.items()}
    if isinstance(value, tuple | list) and any(is_structure(part) for part in value):
        return like(value, [map_leaves(function, part) for part in value])
    return function(value)


def like(value: Any, parts: Sequence[Any]) -> Any:
    """A tuple, named tuple or list of the same kind."""
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def is_structure(value: Any) -> bool:
    """Whether a value is a tensor or holds others."""
    return isinstance(value, torch.Tensor | np.ndarray | Mapping | tuple | list)


def leaves_of(value: Any) -> Iterator[Any]:
    """Every leaf of nested mappings, tuples and lists."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for part in value:
            yield from leaves_of(part)
    else:
        yield value


def rows_of(value: Any) -> int:
    """How many rows a leaf has; -1 if it has none."""
    if isinstance(value, torch.Tensor):
        return int(value.shape[0]) if value.dim() else -1
    return len(value) if isinstance(value, tuple | list) else -1
