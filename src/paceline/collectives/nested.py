"""Walks, rebuilds and moves nested batches: tensors in lists, tuples, named tuples, mappings and dataclasses.

Every function keeps the structure and its types, such as named tuples, `OrderedDict`s and dataclasses.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar, cast

import torch

from paceline.errors import CollectiveError

__all__ = [
    "Path",
    "common_order",
    "concatenate",
    "find_batch_size",
    "in_own_order",
    "is_flat",
    "is_namedtuple",
    "leaves",
    "map_leaves",
    "map_tensors",
    "maybe_children",
    "path_text",
    "rebuild",
    "rebuild_tensors",
    "send_to_device",
    "slice_tensors",
    "tensors",
]

# The way from the top to a leaf: a position of a sequence, a key of a mapping, a field of a dataclass.
Path: TypeAlias = tuple[object, ...]

T = TypeVar("T")


def is_namedtuple(value: object) -> bool:
    """Say whether `value` is an instance of a named tuple's class."""
    return isinstance(value, tuple) and hasattr(value, "_fields") and hasattr(value, "_make")


def maybe_children(value: Any) -> list[tuple[object, Any]] | None:
    """Return the (key, child) pairs of a list, tuple, mapping or dataclass, and None for a leaf.

    A dataclass that is also a mapping, as model outputs are, counts as the mapping.
    """
    if isinstance(value, torch.Tensor):
        return None
    # The usual containers first: whether something is a Mapping takes longer to find out.
    kind = type(value)
    if kind is dict:
        return list(value.items())
    if kind is list or kind is tuple:
        return list(enumerate(value))
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
    kind = type(like)
    if kind is list or kind is tuple:
        return kind(children)
    if isinstance(like, Mapping):
        return _rebuild_mapping(like, dict(zip(like, children, strict=True)))
    if is_namedtuple(like):
        return type(like)._make(children)
    if isinstance(like, list | tuple):
        return _rebuild_sequence(like, children)
    return _rebuild_dataclass(like, children)


def _rebuild_sequence(like: Any, children: list[Any]) -> Any:
    if isinstance(like, list):
        fresh = copy.copy(like)
        fresh[:] = children
        return fresh
    return type(like)(children)


def _rebuild_mapping(like: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    kind = type(like)
    if kind is dict:
        return items
    if isinstance(like, defaultdict):
        return type(like)(like.default_factory, items)
    if isinstance(like, MappingProxyType):
        return MappingProxyType(items)
    if isinstance(like, dict | UserDict):
        # A subclass may have attributes and a constructor with other arguments, so the constructor is not called. It
        # is filled key by key, as some reject `update`.
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
        # Works for frozen dataclasses, too; nobody else has seen the copy yet.
        object.__setattr__(fresh, field.name, value)
    return fresh


def leaves(data: Any, is_leaf: Callable[[Any], bool] | None = None) -> Iterator[tuple[Path, Any]]:
    """Yield every leaf with the path to it, depth first.

    Args:
        data: The nested batch.
        is_leaf: Says of a container whether to treat it as a leaf.
    """
    children = None
    if is_leaf is None or not is_leaf(data):
        children = maybe_children(data)
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


def common_order(paths: Sequence[Path]) -> list[int]:
    """Return the indices of leaves in an order that is the same on all ranks.

    Ranks may have put the keys of their mappings in at different times, such as the losses of tasks by name. Only keys
    that are text or integers have an order; with any other, it is that of the leaves.

    Args:
        paths: Of each leaf.
    """
    if not all(isinstance(key, str | int) for path in paths for key in path):
        return list(range(len(paths)))
    return sorted(range(len(paths)), key=lambda index: [(isinstance(key, str), key) for key in paths[index]])


def in_own_order(values: Iterable[T], order: Sequence[int]) -> list[T]:
    """Bring values of the leaves from an order that `common_order` returned back into the order of the leaves."""
    return [value for _, value in sorted(zip(order, values, strict=True), key=lambda pair: pair[0])]


def path_text(path: Path, root: str = "data") -> str:
    """Format a path as subscripts: `data['logits'][0]`."""
    return root + "".join(f"[{key!r}]" for key in path)


def map_leaves(function: Callable[[Any], Any], data: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Return the same structure with `function(leaf)` in place of every leaf, visited depth first.

    Args:
        function: Called once per leaf.
        data: The nested batch.
        is_leaf: Says of a container whether to treat it as a leaf.
    """
    children = None
    if is_leaf is None or not is_leaf(data):
        children = maybe_children(data)
    if children is None:
        return function(data)
    return rebuild(data, [map_leaves(function, child, is_leaf) for _, child in children])


def map_tensors(function: Callable[[torch.Tensor], Any], data: Any) -> Any:
    """Return the same structure with `function(tensor)` in place of every tensor; other leaves stay."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, data)


def is_flat(data: Any) -> bool:
    """Say whether `data` is a list or tuple of nothing but tensors, as most metrics are: it needs no walk."""
    return type(data) in (tuple, list) and all(isinstance(leaf, torch.Tensor) for leaf in data)


def rebuild_tensors(like: Any, tensors: Iterable[torch.Tensor]) -> Any:
    """Return the structure of `like`, whose leaves are all tensors, with other tensors in it, depth first."""
    if is_flat(like):
        return type(like)(tensors)
    following = iter(tensors)
    return map_tensors(lambda _: next(following), like)


def send_to_device(
    data: Any,
    device: torch.device | str | int,
    non_blocking: bool = False,
    skip_keys: str | Collection[str] | None = None,
) -> Any:
    """Return the same structure with everything that can be moved on `device`.

    Tensors are moved, and so is any other object with a method `to`, containers included; everything else is returned
    unchanged.

    Args:
        data: The nested batch.
        device: The target device.
        non_blocking: Return before a copy out of pinned memory has finished.
        skip_keys: Keys of mappings whose values are not moved, at any depth.

    Returns:
        A new structure of the same types; tensors already on `device` are shared with `data`.
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
        # Try again without the keyword, but only if the keyword was the reason.
        if "non_blocking" not in str(error):
            raise
        return data.to(device)


def find_batch_size(data: Any) -> int:
    """Return the size of dimension 0 of the first tensor that has one.

    Raises:
        CollectiveError: No tensor in `data` has a dimension.
    """
    for tensor in tensors(data):
        if tensor.dim():
            return tensor.shape[0]
    raise CollectiveError(
        f"find_batch_size got a {type(data).__name__} without any tensor that has a dimension",
        "The batch size is dimension 0 of the first tensor",
        "Pass a batch with at least one tensor",
    )


def slice_tensors(data: Any, rows: slice) -> Any:
    """Return the same structure with `tensor[rows]` for every tensor that has a dimension."""
    return map_tensors(lambda tensor: tensor[rows] if tensor.dim() else tensor, data)


def concatenate(batches: list[Any], dim: int = 0) -> Any:
    """Join batches of one structure: every tensor is the concatenation of the batches' tensors along `dim`.

    Tensors without dimensions become one dimension; other leaves are taken from the first batch.

    Args:
        batches: At least one nested batch; all have the same structure.
        dim: The dimension along which tensors are joined.

    Returns:
        One nested batch of that structure.

    Raises:
        CollectiveError: The list is empty, or the structures differ.
    """
    if not batches:
        raise CollectiveError("concatenate got an empty list", "There is nothing to join", "Pass at least one batch")
    first = batches[0]
    if isinstance(first, torch.Tensor):
        return torch.cat([batch if batch.dim() else batch.reshape(1) for batch in batches], dim=dim)
    children = maybe_children(first)
    if children is None:
        return first
    keys = [key for key, _ in children]
    values = [_values_with_keys(batch, keys, index, first) for index, batch in enumerate(batches)]
    return rebuild(first, [concatenate(list(parts), dim) for parts in zip(*values, strict=True)])


def _values_with_keys(batch: Any, keys: list[object], index: int, first: Any) -> list[Any]:
    """Return a batch's children; raise `CollectiveError` if its keys are not those of the first batch."""
    children = maybe_children(batch)
    if children is None or [key for key, _ in children] != keys:
        raise CollectiveError(
            f"Batch {index} does not have the structure of batch 0, a {type(first).__name__} with {keys}",
            "Batches are joined leaf by leaf",
            "Give every batch the same keys in the same order",
        )
    return [child for _, child in children]
