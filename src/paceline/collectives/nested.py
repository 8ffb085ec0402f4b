"""Batches as users make them: tensors inside lists, tuples, named tuples, mappings and dataclasses.

Every function keeps the structure and its types: a named tuple stays one, so does an `OrderedDict` or any
other mapping, and a dataclass.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import torch

from paceline.errors import CollectiveError

__all__ = [
    "Path",
    "concatenate",
    "find_batch_size",
    "is_namedtuple",
    "leaves",
    "map_leaves",
    "map_tensors",
    "maybe_children",
    "path_text",
    "rebuild",
    "send_to_device",
    "slice_tensors",
    "tensors",
]

# The way from the top to a leaf: a position of a sequence, a key of a mapping, a field of a dataclass.
Path: TypeAlias = tuple[object, ...]


def is_namedtuple(value: object) -> bool:
    """Say whether `value` is an instance of a named tuple's class."""
    return isinstance(value, tuple) and hasattr(value, "_fields") and hasattr(value, "_make")


def maybe_children(value: Any) -> list[tuple[object, Any]] | None:
    """Return the (key, child) pairs of a list, tuple, mapping or dataclass, and None for a leaf.

    A dataclass that is also a mapping, as model outputs are, counts as the mapping.
    """
    if isinstance(value, torch.Tensor):
        return None
    if isinstance(value, Mapping):
        return list(value.items())
    if is_namedtuple(value):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return None


def rebuild(like: Any, children: list[Any]) -> Any:
    """Make a container of the type of `like` with new children, in the order of `maybe_children`.

    `like` itself is left untouched.
    """
    if isinstance(like, Mapping):
        return _rebuild_mapping(like, dict(zip(like, children, strict=True)))
    if is_namedtuple(like):
        return type(like)._make(children)
    if isinstance(like, list | tuple):
        return _rebuild_sequence(like, children)
    return _rebuild_dataclass(like, children)


def _rebuild_sequence(like: Any, children: list[Any]) -> Any:
    kind = type(like)
    if kind in (list, tuple):
        return kind(children)
    if isinstance(like, list):
        fresh = copy.copy(like)
        fresh[:] = children
        return fresh
    return kind(children)


def _rebuild_mapping(like: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    kind = type(like)
    if kind is dict:
        return items
    if isinstance(like, defaultdict):
        return type(like)(like.default_factory, items)
    if isinstance(like, MappingProxyType):
        return MappingProxyType(items)
    if isinstance(like, dict | UserDict):
        # A subclass may ask its constructor for other arguments and carry attributes: go past the constructor
        # and fill it key by key, as some refuse `update`.
        fresh = copy.copy(like) if isinstance(like, UserDict) else _bare_copy(like)
        for key, value in items.items():
            fresh[key] = value
        return fresh
    return cast("Callable[[dict[Any, Any]], Any]", kind)(items)


def _bare_copy(like: dict[Any, Any]) -> Any:
    """Return an instance with the attributes of `like` and none of its items."""
    fresh = type(like).__new__(type(like))
    if hasattr(like, "__dict__"):
        fresh.__dict__.update(like.__dict__)
    return fresh


def _rebuild_dataclass(like: Any, children: list[Any]) -> Any:
    fresh = copy.copy(like)
    for field, value in zip(dataclasses.fields(like), children, strict=True):
        # Past the guard of a frozen dataclass: the copy is nobody else's yet.
        object.__setattr__(fresh, field.name, value)
    return fresh


def leaves(data: Any, is_leaf: Callable[[Any], bool] | None = None) -> Iterator[tuple[Path, Any]]:
    """Yield every leaf with the path to it, depth first.

    Args:
        data: The nested batch.
        is_leaf: Says of a container whether it is to be taken for a leaf.
    """
    children = None if is_leaf is not None and is_leaf(data) else maybe_children(data)
    if children is None:
        yield (), data
        return
    for key, child in children:
        for path, leaf in leaves(child, is_leaf):
            yield (key, *path), leaf


def tensors(data: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor, depth first."""
    for _, leaf in leaves(data):
        if isinstance(leaf, torch.Tensor):
            yield leaf


def path_text(path: Path, root: str = "data") -> str:
    """Write a path as the subscripts that lead there: `data['logits'][0]`."""
    return root + "".join(f"[{key!r}]" for key in path)


def map_leaves(function: Callable[[Any], Any], data: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Return the same structure with `function(leaf)` in place of every leaf, visited depth first.

    Args:
        function: Called once per leaf.
        data: The nested batch.
        is_leaf: Says of a container whether it is to be taken for a leaf.
    """
    children = None if is_leaf is not None and is_leaf(data) else maybe_children(data)
    if children is None:
        return function(data)
    return rebuild(data, [map_leaves(function, child, is_leaf) for _, child in children])


def map_tensors(function: Callable[[torch.Tensor], Any], data: Any) -> Any:
    """Return the same structure with `function(tensor)` in place of every tensor; other leaves stay."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, data)


def send_to_device(
    data: Any,
    device: torch.device | str | int,
    non_blocking: bool = False,
    skip_keys: str | Collection[str] | None = None,
) -> Any:
    """Return the same structure with everything that can move on `device`.

    Tensors move, and so does any other object with a method `to`, a container among them; all else stays as
    it is.

    Args:
        data: The nested batch.
        device: Where to.
        non_blocking: Do not make the host wait for a copy out of pinned memory.
        skip_keys: Keys of mappings whose values stay where they are, at any depth.
    """
    skipped = (skip_keys,) if isinstance(skip_keys, str) else tuple(skip_keys or ())
    return _send(data, device, non_blocking, skipped)


def _send(data: Any, device: torch.device | str | int, non_blocking: bool, skipped: Collection[str]) -> Any:
    if isinstance(data, torch.Tensor):
        return data.to(device, non_blocking=non_blocking)
    is_mapping = isinstance(data, Mapping)
    movable = callable(getattr(data, "to", None)) and not isinstance(data, type)
    if movable and not (skipped and is_mapping):
        return _move(data, device, non_blocking)
    children = maybe_children(data)
    if children is None:
        return data
    moved = [
        child if is_mapping and key in skipped else _send(child, device, non_blocking, skipped)
        for key, child in children
    ]
    return rebuild(data, moved)


def _move(data: Any, device: torch.device | str | int, non_blocking: bool) -> Any:
    try:
        return data.to(device, non_blocking=non_blocking)
    except TypeError as error:
        # Only a `to` that does not know the keyword is asked again without it.
        if "non_blocking" not in str(error):
            raise
        return data.to(device)


def find_batch_size(data: Any) -> int:
    """Return the size of dimension 0 of the first tensor that has one.

    Raises:
        CollectiveError: There is no such tensor.
    """
    for tensor in tensors(data):
        if tensor.dim():
            return tensor.shape[0]
    raise CollectiveError(
        f"A {type(data).__name__} without any tensor that has a dimension was given",
        "The batch size is read off dimension 0 of the first tensor",
        "Give a batch that holds at least one tensor",
    )


def slice_tensors(data: Any, rows: slice) -> Any:
    """Return the same structure with `tensor[rows]` for every tensor that has a dimension."""
    return map_tensors(lambda tensor: tensor[rows] if tensor.dim() else tensor, data)


def concatenate(batches: list[Any], dim: int = 0) -> Any:
    """Join batches of one structure: every tensor is the concatenation of the batches' tensors along `dim`.

    Tensors without dimensions become one dimension; other leaves are taken from the first batch.

    Raises:
        CollectiveError: The list is empty, or the structures differ.
    """
    if not batches:
        raise CollectiveError(
            "An empty list of batches was given", "There is nothing to join", "Give one batch or more"
        )
    first = batches[0]
    if isinstance(first, torch.Tensor):
        return torch.cat([batch if batch.dim() else batch.reshape(1) for batch in batches], dim=dim)
    children = maybe_children(first)
    if children is None:
        return first
    columns = [maybe_children(batch) for batch in batches]
    keys = [key for key, _ in children]
    for index, column in enumerate(columns):
        if column is None or [key for key, _ in column] != keys:
            raise CollectiveError(
                f"Batch {index} has not the structure of batch 0, a {type(first).__name__} with {keys}",
                "Batches are joined leaf by leaf",
                "Give every batch the same keys in the same order",
            )
    parts = [[column[i][1] for column in columns if column is not None] for i in range(len(keys))]
    return rebuild(first, [concatenate(part, dim) for part in parts])
