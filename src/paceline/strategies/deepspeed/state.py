"""Reads and writes the training state of one DeepSpeed engine: fp32 values and moments by parameter name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint.format.shards import OptimizerState, TensorShard
from paceline.errors import StateError
from paceline.strategies.deepspeed.partitions import piece_of
from paceline.strategies.state import check_groups, load_options, options_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from paceline.checkpoint.format.shards import Number, Slot
    from paceline.collectives import Group
    from paceline.strategies.deepspeed.engine import ZeroEngine
    from paceline.strategies.deepspeed.partitions import PartitionSlice

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


# Weights


def value_of(zero: ZeroEngine | None, parameter: nn.Parameter) -> TensorShard:
    """This rank's shard of a parameter, from the most exact copy that there is."""
    if zero is not None:
        return zero.partitions.value(parameter)
    return piece_of(parameter) if hasattr(parameter, "ds_id") else TensorShard.whole(parameter)


def is_sharded(zero: ZeroEngine | None, parameter: nn.Parameter) -> bool:
    """Whether ranks have different shards of a parameter: the same answer on all of them."""
    if hasattr(parameter, "ds_id"):
        return True
    return zero is not None and zero.partitions.is_sharded and zero.partitions.slice_of(parameter) is not None


def gather_whole(shard: TensorShard, group: Group, device: torch.device) -> Tensor:
    """The whole tensor on the CPU, from the shards of all ranks, exact to the bit. Collective."""
    # Summed as integers, since 0.0 + -0.0 would lose a sign; widening to fp32 and back loses nothing.
    bits = torch.zeros(shard.numel, dtype=torch.int32, device=device)
    values = shard.flat().to(device, torch.float32).view(torch.int32)
    bits[shard.start : shard.stop] = values
    group.all_reduce(bits, "sum")
    return bits.view(torch.float32).to(shard.dtype).view(shard.shape).cpu()


# Moments, step counts and options


def optimizer_state(zero: ZeroEngine, names: Mapping[int, str]) -> OptimizerState:
    """See `TrainingStateAccess.optimizer_state`."""
    state = OptimizerState()
    zero.step_counts.clear()
    for index, group in enumerate(zero.groups):
        options = {key: value for key, value in zero.optimizer.param_groups[index].items() if _is_option(key)}
        state.groups.append({**options_of(options), "params": [names[id(p)] for p in group]})
        for parameter in group:
            slice_of = zero.partitions.slice_of(parameter)
            if slice_of is not None:
                _collect(zero, names[id(parameter)], parameter, slice_of, state)
    return state


def _collect(
    zero: ZeroEngine, name: str, parameter: nn.Parameter, slice_of: PartitionSlice, state: OptimizerState
) -> None:
    current = zero.optimizer.state.get(slice_of.flat, {})
    slots, numbers = _split_state(zero, parameter, slice_of, current)
    # Some optimizers of DeepSpeed count their steps in the group.
    step = current.get("step", zero.optimizer.param_groups[slice_of.group].get("step") if slots else None)
    if step is not None:
        count = torch.tensor(float(step), dtype=torch.float32)
        zero.step_counts.setdefault(id(slice_of.flat), (slice_of, []))[1].append(count)
        slots["step"] = TensorShard.whole(count)
    if slots:
        state.slots[name] = slots
    if numbers:
        state.numbers[name] = numbers


def _split_state(
    zero: ZeroEngine, parameter: nn.Parameter, slice_of: PartitionSlice, current: Mapping[str, Any]
) -> tuple[dict[str, TensorShard], dict[str, Number]]:
    """Split the state of a flat tensor into one parameter's shards and numbers, without the step count."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    slots: dict[str, TensorShard] = {}
    numbers: dict[str, Number] = {}
    for key, value in current.items():
        if key == "step":
            continue
        if _is_flat_like(value, slice_of.flat):
            slots[key] = TensorShard(shape, slice_of.start, slice_of.cut(value))
        elif isinstance(value, (int, float, bool)) or value is None:
            numbers[key] = value
        else:
            raise StateError(
                f"{type(zero.optimizer).__name__} stores {key!r} as {type(value).__name__}",
                "ZeRO partitions flat tensors, and this is neither one as large as the parameters nor a number",
                "Use an optimizer that stores one value for each element, such as Adam or SGD",
            )
    return slots, numbers


def _is_flat_like(value: Any, flat: Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == flat.numel() and value.ndim >= min(flat.ndim, 1)


def make_slots(
    zero: ZeroEngine,
    names: Mapping[int, str],
    slots: Mapping[str, Mapping[str, Slot]],
    numbers: Mapping[str, Mapping[str, Number]],
) -> None:
    """See `TrainingStateAccess.make_slots`."""
    by_flat: dict[int, tuple[PartitionSlice, dict[str, Slot], dict[str, Number]]] = {}
    for group in zero.groups:
        for parameter in group:
            slice_of, name = zero.partitions.slice_of(parameter), names[id(parameter)]
            if slice_of is not None:
                _, tensors, values = by_flat.setdefault(id(slice_of.flat), (slice_of, {}, {}))
                tensors.update(_with_dimension(parameter, slots.get(name, {})))
                values.update(numbers.get(name, {}))
    for slice_of, tensors, values in by_flat.values():
        _allocate_optimizer_state(zero, slice_of, tensors, values)


def _with_dimension(parameter: nn.Parameter, slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """The slots of a parameter; for a parameter of shape [], a slot of the same shape is not a single number."""
    if getattr(parameter, "ds_shape", parameter.shape) != ():
        return dict(slots)
    return {key: replace(slot, shape=(1,)) if key != "step" else slot for key, slot in slots.items()}


def _allocate_optimizer_state(
    zero: ZeroEngine, slice_of: PartitionSlice, tensors: dict[str, Slot], numbers: dict[str, Number]
) -> None:
    current = zero.optimizer.state.get(slice_of.flat, {})
    state: dict[str, Any] = {}
    for key, slot in tensors.items():
        if key == "step":
            state[key] = current.get(key, _first_step(zero.optimizer))
        elif slot.shape == ():
            raise StateError(
                f"The checkpoint has a single number {key!r} for each parameter",
                "ZeRO stores one for all parameters of a group",
                "Load it under strategy='fsdp' or 'ddp'",
            )
        else:
            state[key] = current[key] if key in current else torch.zeros_like(slice_of.flat, dtype=slot.dtype)
    state.update(numbers)
    if "step" in state and "step" in zero.optimizer.param_groups[slice_of.group]:
        del state["step"]
    zero.optimizer.state[slice_of.flat] = state
    # Makes DeepSpeed look up its fragments of the states again after the next step.
    if hasattr(zero.engine.optimizer, "_hp_optimizer_states_linked"):
        zero.engine.optimizer._hp_optimizer_states_linked = False


def set_groups(zero: ZeroEngine, names: Mapping[int, str], groups: Sequence[Mapping[str, Any]]) -> None:
    """See `TrainingStateAccess.set_groups`."""
    check_groups([[names[id(p)] for p in group] for group in zero.groups], groups)
    for group, saved in zip(zero.optimizer.param_groups, groups, strict=True):
        load_options(group, saved)


def state_written(zero: ZeroEngine) -> None:
    """Copy what was written to every other copy of it. Collective."""
    for slice_of, counts in zero.step_counts.values():
        _write_steps(zero, slice_of, {float(count) for count in counts})
    zero.step_counts.clear()
    zero.partitions.publish()


def _write_steps(zero: ZeroEngine, slice_of: PartitionSlice, counts: set[float]) -> None:
    if len(counts) > 1:
        raise StateError(
            f"Parameters of one group were saved after {', '.join(f'{c:g}' for c in sorted(counts))} steps",
            "ZeRO counts the steps of a group, not of each parameter",
            "Put them into separate groups, or load under strategy='fsdp'",
        )
    (count,) = counts
    state, group = zero.optimizer.state[slice_of.flat], zero.optimizer.param_groups[slice_of.group]
    if "step" in group:
        group["step"] = int(count)
    elif isinstance(state.get("step"), torch.Tensor):
        state["step"].fill_(count)
    else:
        state["step"] = int(count)


def _is_option(key: str) -> bool:
    return key not in ("params", "step") and not key.startswith("_ds_")


def _first_step(optimizer: Optimizer) -> Any:
    """A step count as this optimizer stores it: torch's in a tensor, DeepSpeed's in a number."""
    return torch.zeros((), dtype=torch.float32) if type(optimizer).__module__.startswith("torch.") else 0


# The loss scaler


def scaler_state(optimizer: Any) -> dict[str, Any]:
    """The state of dynamic loss scaling; empty without fp16."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return {key: getattr(scaler, key) for key in _SCALER_FIELDS if hasattr(scaler, key)}


def load_scaler_state(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Restore the state of dynamic loss scaling."""
    scaler = getattr(optimizer, "loss_scaler", None)
    for key in _SCALER_FIELDS:
        if key in saved and hasattr(scaler, key):
            setattr(scaler, key, saved[key])
