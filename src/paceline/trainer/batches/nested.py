"""Nested batches: tensors, arrays and text in mappings, tuples and lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["is_structure", "leaves_of", "like", "map_leaves"]


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to every leaf of nested mappings, tuples and lists."""
    if isinstance(value, Mapping):
        return {name: map_leaves(function, part) for name, part in value.items()}
    if isinstance(value, tuple | list) and any(is_structure(part) for part in value):
        return like(value, [map_leaves(function, part) for part in value])
    return function(value)


def like(value: Any, parts: Sequence[Any]) -> Any:
    """A tuple, named tuple or list of the same type as `value`, with other elements."""
    if hasattr(value, "_fields"):
        return type(value)(*parts)
    return type(value)(parts)


def is_structure(value: Any) -> bool:
    """Whether a value is a tensor, an array or a container."""
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
