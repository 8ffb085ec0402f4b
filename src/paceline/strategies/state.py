"""What the strategies share when a training state goes in or out."""

from __future__ import annotations

import sys
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint.format.shards import TensorShard
from paceline.errors import StateError, named
from paceline.strategies.activation_checkpointing import plain_name

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
    """Whether this is a DTensor, without importing what makes them: half a second, for runs that have none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def part_of(tensor: Tensor) -> TensorShard:
    """This rank's part of a tensor, cut into rows by FSDP2 or whole.

    Raises:
        StateError: It is cut otherwise than into runs of rows.
    """
    if not is_dtensor(tensor):
        return TensorShard.whole(tensor.detach())
    from torch.distributed.tensor import Shard

    axes = [placement.dim for placement in tensor.placements if isinstance(placement, Shard)]
    if any(placement.is_partial() for placement in tensor.placements) or any(axes):
        raise StateError(
            f"A tensor of shape {tuple(tensor.shape)} is placed {tuple(tensor.placements)}",
            "Only rows can be cut apart in a saved state",
            "Shard over the first dimension",
        )
    # A save asks for this once a tensor, while training waits: without gradients, no graph is built for it.
    with torch.no_grad():
        local = tensor.to_local().detach()
    start = _first_row(tensor.shape, tensor.device_mesh, tensor.placements) if axes and local.numel() else 0
    return TensorShard(tuple(tensor.shape), start * prod(tensor.shape[1:]), local)


@lru_cache(maxsize=4096)
def _first_row(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> int:
    """Index of the first row that this rank holds. Kept: a save asks for it once a tensor, while training waits."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return offset[0]


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to a model's state, each once, by name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield plain_name(f"{prefix}.{name}" if prefix else name), buffer


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's options, as far as JSON can hold them; a rate kept in a tensor becomes a number."""
    values = {key: value.item() if _is_scalar(value) else value for key, value in group.items() if key != "params"}
    return {key: value for key, value in values.items() if key not in _IMPLEMENTATION and _is_plain(value)}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 0


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def take_options(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Put saved options into a group, in the types in which it keeps them."""
    for key, value in saved.items():
        if key == "params" or key in _IMPLEMENTATION:
            continue
        held = group.get(key)
        if isinstance(held, torch.Tensor):
            held.fill_(value)
        else:
            group[key] = tuple(value) if isinstance(held, tuple) and isinstance(value, list) else value


def check_groups(mine: Sequence[Sequence[str]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Make sure that a saved optimizer had the same parameters in the same groups.

    Raises:
        StateError: It had not; names both sides.
    """
    theirs = [list(group["params"]) for group in saved]
    if [list(group) for group in mine] == theirs:
        return
    here, there = ({name for group in groups for name in group} for groups in (mine, theirs))
    only = [("saved", there - here), ("here", here - there)]
    differing = [f"{side} only: {named(sorted(names))}" for side, names in only if names]
    sizes = [len(group) for group in theirs], [len(group) for group in mine]
    raise StateError(
        f"The saved optimizer has groups of {sizes[0]} parameters, this one of {sizes[1]}",
        "; ".join(differing) or "The same parameters stand in other groups or in another order",
        "Build the optimizer from the same groups",
    )


def make_slots_of(
    optimizer: Optimizer, parameter: nn.Parameter, group: Mapping[str, Any], slots: Mapping[str, Slot], name: str
) -> dict[str, Any]:
    """Room for one parameter's state: zeros that lie as the parameter does, or what is there already."""
    before = optimizer.state.get(parameter, {})
    return {key: _room(before.get(key), key, slot, parameter, group, name) for key, slot in slots.items()}


def _room(there: Any, key: str, slot: Slot, parameter: nn.Parameter, group: Mapping[str, Any], name: str) -> Tensor:
    if isinstance(there, torch.Tensor) and tuple(there.shape) == slot.shape:
        return there
    if slot.shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=slot.dtype, requires_grad=False)
    if is_dtensor(parameter) and slot.shape != ():
        raise StateError(
            f"The saved {key!r} of {name} has shape {slot.shape}, and {name} itself {tuple(parameter.shape)}, sharded",
            "How this optimizer would cut it is known only after it has taken a step",
            "Take one step before loading, or load under strategy='ddp'",
        )
    # torch keeps counts of steps on the host, except for optimizers that run wholly on the device.
    on_device = bool(group.get("fused") or group.get("capturable")) or slot.shape != ()
    return torch.zeros(slot.shape, dtype=slot.dtype, device=parameter.device if on_device else "cpu")


def sort_state(
    optimizer: Optimizer, name: str, held: Mapping[str, Any]
) -> tuple[dict[str, TensorShard], dict[str, Number]]:
    """Tell one parameter's tensors from its numbers.

    Raises:
        StateError: Something is neither.
    """
    slots: dict[str, TensorShard] = {}
    numbers: dict[str, Number] = {}
    for key, value in held.items():
        if isinstance(value, torch.Tensor):
            slots[key] = part_of(value)
        elif value is None or isinstance(value, (bool, int, float)):
            numbers[key] = value
        else:
            raise StateError(
                f"{type(optimizer).__name__} keeps {key!r} of {name} as {type(value).__name__}",
                "Only tensors and numbers can be saved and cut anew",
                "Use an optimizer that keeps tensors, as Adam and SGD do",
            )
    return slots, numbers
