"""Collectives on nested batches, with a few exchanges for all leaves.

`data` is a tensor, or tensors in lists, tuples, named tuples, mappings and dataclasses at any depth; the result has the
same structure. A mapping may have its keys in another order on each rank. With `debug=True` the ranks first compare
what they pass, in one more exchange, and an error names the ranks that differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch

from paceline.collectives.agreement import check_agreement
from paceline.collectives.coalescing import (
    all_gather_coalesced,
    all_reduce_coalesced,
    broadcast_coalesced,
    check_dense,
)
from paceline.collectives.nested import (
    common_order,
    in_own_order,
    is_flat,
    leaves,
    map_tensors,
    path_text,
    rebuild_tensors,
    send_to_device,
)
from paceline.collectives.samples import BatchCounts, gather_samples
from paceline.collectives.splitting import split_between_processes
from paceline.errors import CollectiveError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from paceline.collectives.group import Group

__all__ = [
    "BatchCounts",
    "Reduction",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "gather_samples",
    "pad_across_processes",
    "reduce",
    "split_between_processes",
]

T = TypeVar("T")
Reduction = Literal["sum", "mean", "max", "min", "none"]

# So few tensors are gathered as they are: on two H200 two cost 95 us in one launch, and 360 us through a shared
# buffer, which has to be filled and taken apart.
FEW_TENSORS = 4


def gather(group: Group, data: Any, *, debug: bool = False) -> Any:
    """Concatenate every tensor over the ranks along dimension 0, in rank order.

    Shapes must be the same on all ranks. Collective: every rank must call it.

    Args:
        group: The ranks.
        data: Tensors, nested.
        debug: Compare over the ranks first.

    Returns:
        The same structure; a tensor of shape [n, ...] becomes [size * n, ...], one without dimensions becomes [size].
        A group of one rank shares memory with `data`.

    Raises:
        CollectiveError: A leaf is not a tensor; with `debug`, also if the ranks differ.
    """
    if debug:
        check_agreement(group, "gather", data)
    ordered = _OrderedTensors.of(data, "gather")
    if group.size == 1:
        return map_tensors(_at_least_1d, data)
    if len(ordered.tensors) <= FEW_TENSORS:
        for tensor in ordered.tensors:
            check_dense(tensor)
        return ordered.replaced(group.concatenate_all(ordered.tensors))
    return ordered.replaced(map(_ranks_concatenated, all_gather_coalesced(group, ordered.tensors)))


def gather_object(group: Group, obj: Any, *, debug: bool = False) -> list[Any]:
    """Give every rank the objects of all ranks, by pickling them.

    Collective: every rank must call it.

    Args:
        group: The ranks.
        obj: Any object that can be pickled.
        debug: Check first that all ranks call `gather_object`.

    Returns:
        If all ranks pass lists, their concatenation in rank order; they may differ in length. Otherwise a list with one
        entry per rank. Tensors of an accelerator arrive in host memory.
    """
    if debug:
        check_agreement(group, "gather_object", None)
    # A pickled tensor would be restored on the sender's device, whose memory the receiver should not use.
    portable = obj
    if group.device.type != "cpu":
        portable = send_to_device(obj, "cpu")
    values = group.all_gather_object(portable)
    if all(isinstance(value, list) for value in values):
        return [entry for value in values for entry in value]
    return values


def reduce(group: Group, data: Any, reduction: Reduction = "mean", scale: float = 1.0, *, debug: bool = False) -> Any:
    """Reduce every tensor over the ranks, element by element, into a new tensor.

    Collective: every rank must call it.

    Args:
        group: The ranks.
        data: Tensors, nested; the same shapes on all ranks.
        reduction: "none" exchanges nothing and returns copies.
        scale: Factor for the result.
        debug: Compare over the ranks first.

    Returns:
        The same structure with new tensors. The mean of bool or integers is float32, the sum of bool is int64.

    Raises:
        CollectiveError: A leaf is not a tensor, or the reduction is unknown; with `debug`, also if the ranks differ.
    """
    if reduction not in get_args(Reduction):
        raise CollectiveError(
            f"reduce got reduction={reduction!r}",
            "There is no such reduction",
            f"Use one of {', '.join(get_args(Reduction))}",
        )
    if debug:
        check_agreement(group, f"reduce({reduction!r})", data)
    ordered = _OrderedTensors.of(data, "reduce")
    if reduction == "none":
        reduced = [tensor.detach().clone() for tensor in ordered.tensors]
    else:
        reduced = all_reduce_coalesced(group, ordered.tensors, reduction)
    return ordered.replaced(_scaled(tensor, scale) for tensor in reduced)


def broadcast(group: Group, data: T, from_process: int = 0, *, debug: bool = False) -> T:
    """Overwrite every tensor, in place, with that of rank `from_process`.

    Collective: every rank must call it.

    Args:
        group: The ranks.
        data: Tensors, nested; the same shapes and dtypes on all ranks.
        from_process: The rank within the group whose values are sent.
        debug: Compare over the ranks first.

    Returns:
        `data` itself.

    Raises:
        CollectiveError: A leaf is not a tensor, or there is no such rank; with `debug`, also if the ranks differ.
    """
    group.check_source(from_process)
    if debug:
        check_agreement(group, f"broadcast(from_process={from_process})", data)
    tensors = _OrderedTensors.of(data, "broadcast").tensors
    if group.size > 1:
        broadcast_coalesced(group, tensors, from_process)
    return data


def broadcast_object_list(group: Group, objects: list[T], from_process: int = 0, *, debug: bool = False) -> list[T]:
    """Overwrite the entries of a list, in place, with those of rank `from_process`, by pickling them.

    Collective: every rank must call it.

    Args:
        group: The ranks.
        objects: Any objects that can be pickled.
        from_process: The rank within the group whose objects are sent.
        debug: Compare the lengths over the ranks first.

    Returns:
        The list `objects` itself.

    Raises:
        CollectiveError: There is no such rank; with `debug`, also if the lengths differ.
    """
    group.check_source(from_process)
    if debug:
        check_agreement(group, f"broadcast_object_list of {len(objects)} from rank {from_process}", None)
    objects[:] = group.broadcast_object(list(objects), from_process)
    return objects


def pad_across_processes(
    group: Group,
    data: Any,
    dim: int = 0,
    pad_index: float = 0,
    pad_first: bool = False,
    *,
    debug: bool = False,
) -> Any:
    """Pad every tensor along `dim` to the largest size that it has on any rank.

    The sizes of all tensors are compared in one exchange. Collective: every rank must call it.

    Args:
        group: The ranks.
        data: Tensors, nested.
        dim: The dimension to pad; negative values count from the end.
        pad_index: The value to pad with.
        pad_first: Put the padding before the data.
        debug: Compare over the ranks first.

    Returns:
        The same structure. Tensors that do not have the dimension, or already have the largest size, are not copied.

    Raises:
        CollectiveError: A leaf is not a tensor; with `debug`, also if the ranks differ in anything but the sizes
            along `dim`.
    """
    if debug:
        call = f"pad_across_processes(dim={dim})"
        check_agreement(group, call, data, lambda tensor: dim if _has_dim(tensor, dim) else None)
    ordered = _OrderedTensors.of(data, "pad_across_processes")
    if group.size == 1 or not ordered.tensors:
        return data
    # In host memory: reading the result back from a device would synchronize with it.
    sizes = torch.tensor([tensor.shape[dim] if _has_dim(tensor, dim) else -1 for tensor in ordered.tensors])
    largest = group.all_gather(sizes).amax(0).tolist()
    return ordered.replaced(
        _padded(tensor, dim, size, pad_index, pad_first) for tensor, size in zip(ordered.tensors, largest, strict=True)
    )


@dataclass(frozen=True, slots=True)
class _OrderedTensors:
    """The leaves of a nested batch, in an order that is the same on all ranks.

    Attributes:
        data: The batch.
        tensors: Its leaves in that order.
        order: For each of these, its index among the leaves.
    """

    data: Any
    tensors: list[torch.Tensor]
    order: list[int]

    @classmethod
    def of(cls, data: Any, operation: str) -> _OrderedTensors:
        """Find all leaves; raise `CollectiveError` if one is not a tensor."""
        if is_flat(data):
            return cls(data, list(data), list(range(len(data))))
        found = list(leaves(data))
        for path, leaf in found:
            if not isinstance(leaf, torch.Tensor):
                raise CollectiveError(
                    f"{operation} got {path_text(path)}, a {type(leaf).__name__}",
                    "It exchanges only tensors",
                    "Use gather_object for other objects, or convert it to a tensor",
                )
        order = common_order([path for path, _ in found])
        return cls(data, [found[index][1] for index in order], order)

    def replaced(self, results: Iterable[torch.Tensor]) -> Any:
        """Return the structure of the batch with other tensors, one for each of `tensors`."""
        return rebuild_tensors(self.data, in_own_order(results, self.order))


def _at_least_1d(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim():
        return tensor.detach()
    return tensor.detach().reshape(1)


def _ranks_concatenated(gathered: torch.Tensor) -> torch.Tensor:
    """Turn [size, n, ...] into [size * n, ...]; leave [size] as it is."""
    if gathered.dim() == 1:
        return gathered.contiguous()
    # Contiguous, so that a small result does not keep the whole receive buffer alive.
    return gathered.contiguous().flatten(0, 1)


def _scaled(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    return tensor if scale == 1.0 else tensor * scale


def _has_dim(tensor: torch.Tensor, dim: int) -> bool:
    return -tensor.dim() <= dim < tensor.dim()


def _padded(tensor: torch.Tensor, dim: int, size: int, pad_index: float, pad_first: bool) -> torch.Tensor:
    if not _has_dim(tensor, dim) or tensor.shape[dim] == size:
        return tensor
    shape = list(tensor.shape)
    own = shape[dim]
    shape[dim] = size
    padded = tensor.new_full(shape, pad_index)
    padded.narrow(dim, size - own if pad_first else 0, own).copy_(tensor)
    return padded
