"""Functions for reading and allocating a training state that several strategies share."""

from __future__ import annotations

import sys
from functools import lru_cache
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.checkpoint.format.shards import TensorShard
from paceline.errors import StateError, named
from paceline.strategies.activation_checkpointing import plain_name
from paceline.strategies.precision.fp8_layers import plain_local
from paceline.strategies.quantized_states import full_precision, is_quantized

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement
    from torch.optim import Optimizer
    from typing_extensions import TypeIs

    from paceline.checkpoint.format.shards import Number, Slot

_IMPLEMENTATION = frozenset({"fused", "foreach", "capturable", "differentiable"})
"""Options that say how an optimizer computes on this device, not what."""


def is_dtensor(value: Any) -> TypeIs[DTensor]:
    """Whether this is a DTensor. Its module takes half a second to import, so it is only looked up."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_shard(tensor: Tensor) -> TensorShard:
    """This rank's shard of a tensor, sharded by rows under FSDP2 or whole.

    Raises:
        StateError: It is sharded over another dimension than the first, or in rows that do not follow each other.
    """
    if not is_dtensor(tensor):
        return TensorShard.whole(full_precision(tensor.detach()))
    if not is_sharded_by_rows(tensor):
        raise StateError(
            f"A tensor of shape {tuple(tensor.shape)} has the placements {tuple(tensor.placements)}",
            "A checkpoint can only hold tensors that are sharded by rows",
            "Shard over the first dimension",
        )
    # A save does this once a tensor while training waits; under no_grad no graph is built.
    with torch.no_grad():
        local = full_precision(plain_local(tensor.to_local().detach()))
    return TensorShard(tuple(tensor.shape), first_element(tensor, local), local)


def is_sharded_by_rows(tensor: DTensor) -> bool:
    """Whether each rank has a contiguous range of the tensor in row-major order; all of it counts, too."""
    from torch.distributed.tensor import Replicate, Shard

    # Not isinstance: a _StridedShard has rows that do not follow each other.
    return all(type(p) is Replicate or (type(p) is Shard and p.dim == 0) for p in tensor.placements)


def first_element(tensor: DTensor, local: Tensor) -> int:
    """Index in row-major order of this rank's first element of a tensor that is sharded by rows; 0 if it has none.

    Args:
        tensor: The whole tensor.
        local: What this rank has of it.
    """
    shape = tensor.shape
    if not shape or not local.numel():
        return 0
    return _first_row(shape, tensor.device_mesh, tensor.placements) * shape[1:].numel()


@lru_cache(maxsize=4096)
def _first_row(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> int:
    """Index of this rank's first row. Cached: a save needs it once a tensor while training waits."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return offset[0]


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The persistent buffers of a model, each once, by name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield plain_name(f"{prefix}.{name}" if prefix else name), buffer


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's options that a checkpoint can hold; a learning rate in a tensor becomes a number."""
    values = {key: _as_number(value) for key, value in group.items() if key != "params"}
    return {key: value for key, value in values.items() if key not in _IMPLEMENTATION and _can_be_saved(value)}


def _as_number(value: Any) -> Any:
    """A tensor of one element, which may have shape [] or [1], and a NumPy scalar as the number that it is."""
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and tuple(value.shape) in ((), (1,))):
        return value.item()
    return value


def _can_be_saved(value: Any) -> bool:
    # Only checkpoints need it.
    from paceline.checkpoint.format.json_state import to_plain

    try:
        to_plain(value, "")
    except StateError:
        return False
    return True


def load_options(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Restore a group's saved options, in the types that the group uses now."""
    for key, value in saved.items():
        if key != "params" and key not in _IMPLEMENTATION:
            group[key] = _in_type_of(group.get(key), value)


def _as_numpy(kind: type[Any], saved: complex) -> Any:
    """A number in a type of NumPy; as it is if that cannot hold it: a rate of 1 may have become a fraction."""
    if isinstance(saved, float) and not saved.is_integer() and not issubclass(kind, np.inexact):
        return saved
    return kind(saved)


def _in_type_of(current: Any, saved: Any) -> Any:
    """A saved option as the type that it has now; a tensor stays the same tensor, which captured graphs read."""
    if isinstance(current, torch.Tensor) and isinstance(saved, (bool, int, float, complex)):
        return current.fill_(saved)
    if isinstance(current, torch.Tensor) and isinstance(saved, torch.Tensor) and current.shape == saved.shape:
        return current.copy_(saved)
    if isinstance(current, np.generic) and isinstance(saved, (bool, int, float, complex)):
        return _as_numpy(type(current), saved)
    if isinstance(current, (list, tuple)) and isinstance(saved, (list, tuple)):
        own = chain(current, repeat(None))
        items = [_in_type_of(item, value) for item, value in zip(own, saved, strict=False)]
        return tuple(items) if isinstance(current, tuple) else items
    return saved


def check_groups(groups: Sequence[Sequence[str]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Make sure that a saved optimizer had the same parameters in the same groups.

    Raises:
        StateError: It had others; names the differences.
    """
    current = [list(group) for group in groups]
    checkpoint = [list(group["params"]) for group in saved]
    if current == checkpoint:
        return
    current_names = set(chain.from_iterable(current))
    checkpoint_names = set(chain.from_iterable(checkpoint))
    only = [("the checkpoint", checkpoint_names - current_names), ("this run", current_names - checkpoint_names)]
    differing = [f"only in {side}: {named(sorted(names))}" for side, names in only if names]
    raise StateError(
        f"The checkpoint's optimizer has groups of {[len(group) for group in checkpoint]} parameters, this run's has "
        f"{[len(group) for group in current]}",
        "; ".join(differing) or "The same parameters are in other groups or in another order",
        "Build the optimizer from the same parameter groups",
    )


def allocate_slots(
    optimizer: Optimizer, parameter: nn.Parameter, group: Mapping[str, Any], slots: Mapping[str, Slot], name: str
) -> dict[str, Any]:
    """Tensors for one parameter's state: zeros sharded like the parameter, or what is there already."""
    current = optimizer.state.get(parameter, {})
    return {key: _allocate(current.get(key), key, slot, parameter, group, name) for key, slot in slots.items()}


def _allocate(
    current: Any, key: str, slot: Slot, parameter: nn.Parameter, group: Mapping[str, Any], name: str
) -> Tensor:
    if isinstance(current, torch.Tensor) and tuple(current.shape) == slot.shape and not is_quantized(current):
        return current
    if slot.shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=slot.dtype, requires_grad=False)
    if is_dtensor(parameter) and slot.shape != ():
        raise StateError(
            f"The saved {key!r} of {name} has shape {slot.shape}, and {name} itself {tuple(parameter.shape)}, sharded",
            "How this optimizer shards such a tensor is only known after its first step",
            "Take one step before loading, or load under strategy='ddp'",
        )
    # torch keeps step counts on the host, except for optimizers that run wholly on the device.
    on_device = bool(group.get("fused") or group.get("capturable")) or slot.shape != ()
    return torch.zeros(slot.shape, dtype=slot.dtype, device=parameter.device if on_device else "cpu")


def split_state(
    optimizer: Optimizer, name: str, state: Mapping[str, Any]
) -> tuple[dict[str, TensorShard], dict[str, Number]]:
    """Split one parameter's state into tensors and numbers.

    Raises:
        StateError: Something is neither.
    """
    slots: dict[str, TensorShard] = {}
    numbers: dict[str, Number] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            slots[key] = local_shard(value)
        elif value is None or isinstance(value, (bool, int, float)):
            numbers[key] = value
        else:
            raise StateError(
                f"{type(optimizer).__name__} stores {key!r} of {name} as {type(value).__name__}",
                "Only tensors and numbers can be saved and resharded",
                "Use an optimizer that stores tensors, such as Adam or SGD",
            )
    return slots, numbers
