"""The training state of a DeepSpeed engine, out and in: fp32 values and moments by the parameters' own names."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint.format.shards import OptimizerState, TensorShard
from paceline.errors import StateError
from paceline.strategies.deepspeed.partitions import piece_of
from paceline.strategies.state import check_groups, options_of, take_options

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
    """This rank's run of a parameter, in the most exact copy that there is."""
    if zero is not None:
        return zero.partitions.value(parameter)
    return piece_of(parameter) if hasattr(parameter, "ds_id") else TensorShard.whole(parameter)


def is_cut(zero: ZeroEngine | None, parameter: nn.Parameter) -> bool:
    """Whether ranks hold different runs of a parameter: the same answer on all of them."""
    if hasattr(parameter, "ds_id"):
        return True
    return zero is not None and zero.partitions.cut and zero.partitions.slice_of(parameter) is not None


def gather_whole(part: TensorShard, group: Group, device: torch.device) -> Tensor:
    """The whole tensor on the CPU, from the runs of all ranks; exact to the bit. Collective."""
    # Added up as integers, since 0.0 + -0.0 would lose a sign; widening to fp32 and back loses nothing.
    bits = torch.zeros(part.numel, dtype=torch.int32, device=device)
    run = part.flat().to(device, torch.float32).view(torch.int32)
    bits[part.start : part.stop] = run
    group.all_reduce(bits, "sum")
    return bits.view(torch.float32).to(part.dtype).view(part.shape).cpu()


# Moments, counts and options


def optimizer_state(zero: ZeroEngine, names: Mapping[int, str]) -> OptimizerState:
    """See `Strategy.optimizer_state`."""
    state = OptimizerState()
    zero.steps.clear()
    for index, group in enumerate(zero.groups):
        held = {key: value for key, value in zero.optimizer.param_groups[index].items() if _is_option(key)}
        state.groups.append({**options_of(held), "params": [names[id(p)] for p in group]})
        for parameter in group:
            slice_of = zero.partitions.slice_of(parameter)
            if slice_of is not None:
                _collect(zero, names[id(parameter)], parameter, slice_of, state)
    return state


def _collect(
    zero: ZeroEngine, name: str, parameter: nn.Parameter, slice_of: PartitionSlice, state: OptimizerState
) -> None:
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    held = zero.optimizer.state.get(slice_of.flat, {})
    slots: dict[str, TensorShard] = {}
    numbers: dict[str, Number] = {}
    for key, value in held.items():
        if key == "step":
            continue
        if (
            isinstance(value, torch.Tensor)
            and value.numel() == slice_of.flat.numel()
            and value.ndim >= min(slice_of.flat.ndim, 1)
        ):
            slots[key] = TensorShard(shape, slice_of.start, slice_of.cut(value))
        elif isinstance(value, (int, float, bool)) or value is None:
            numbers[key] = value
        else:
            raise StateError(
                f"{type(zero.optimizer).__name__} keeps {key!r} as {type(value).__name__}",
                "ZeRO cuts flat tensors, and this is neither one as large as the parameters nor a number",
                "Use an optimizer that keeps one value for each element, as Adam and SGD do",
            )
    # Some optimizers of DeepSpeed count their steps in the group.
    step = held.get("step", zero.optimizer.param_groups[slice_of.group].get("step") if slots else None)
    if step is not None:
        counted = torch.tensor(float(step), dtype=torch.float32)
        zero.steps.setdefault(id(slice_of.flat), (slice_of, []))[1].append(counted)
        slots["step"] = TensorShard.whole(counted)
    if slots:
        state.slots[name] = slots
    if numbers:
        state.numbers[name] = numbers


def make_slots(
    zero: ZeroEngine,
    names: Mapping[int, str],
    slots: Mapping[str, Mapping[str, Slot]],
    numbers: Mapping[str, Mapping[str, Number]],
) -> None:
    """See `Strategy.make_slots`."""
    wanted: dict[int, tuple[PartitionSlice, dict[str, Slot], dict[str, Number]]] = {}
    for group in zero.groups:
        for parameter in group:
            slice_of, name = zero.partitions.slice_of(parameter), names[id(parameter)]
            if slice_of is not None:
                _, tensors, counts = wanted.setdefault(id(slice_of.flat), (slice_of, {}, {}))
                tensors.update(_with_dimension(parameter, slots.get(name, {})))
                counts.update(numbers.get(name, {}))
    for slice_of, tensors, counts in wanted.values():
        _allocate_optimizer_state(zero, slice_of, tensors, counts)


def _with_dimension(parameter: nn.Parameter, slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """The slots of a parameter; what is as large as one without dimensions is no single number for it."""
    if getattr(parameter, "ds_shape", parameter.shape) != ():
        return dict(slots)
    return {key: replace(slot, shape=(1,)) if key != "step" else slot for key, slot in slots.items()}


def _allocate_optimizer_state(
    zero: ZeroEngine, slice_of: PartitionSlice, tensors: dict[str, Slot], counts: dict[str, Number]
) -> None:
    before = zero.optimizer.state.get(slice_of.flat, {})
    held: dict[str, Any] = {}
    for key, slot in tensors.items():
        if key == "step":
            held[key] = before.get(key, _first_step(zero.optimizer))
        elif slot.shape == ():
            raise StateError(
                f"The saved state has a single number {key!r} for each parameter",
                "ZeRO keeps one for all parameters of a group",
                "Load it under strategy='fsdp' or 'ddp'",
            )
        else:
            held[key] = before[key] if key in before else torch.zeros_like(slice_of.flat, dtype=slot.dtype)
    held.update(counts)
    if "step" in held and "step" in zero.optimizer.param_groups[slice_of.group]:
        del held["step"]
    zero.optimizer.state[slice_of.flat] = held
    # DeepSpeed looks its fragments of the states up again after the next step.
    if hasattr(zero.engine.optimizer, "_hp_optimizer_states_linked"):
        zero.engine.optimizer._hp_optimizer_states_linked = False


def set_groups(zero: ZeroEngine, names: Mapping[int, str], groups: Sequence[Mapping[str, Any]]) -> None:
    """See `Strategy.set_groups`."""
    mine = [[names[id(p)] for p in group] for group in zero.groups]
    check_groups(mine, groups)
    for held, saved in zip(zero.optimizer.param_groups, groups, strict=True):
        take_options(held, saved)


def state_written(zero: ZeroEngine) -> None:
    """Carry what was written to every other copy of it. Collective."""
    for slice_of, counts in zero.steps.values():
        _write_steps(zero, slice_of, {float(count) for count in counts})
    zero.steps.clear()
    zero.partitions.publish()


def _write_steps(zero: ZeroEngine, slice_of: PartitionSlice, counts: set[float]) -> None:
    if len(counts) > 1:
        raise StateError(
            f"Parameters of one group were saved after {', '.join(f'{c:g}' for c in sorted(counts))} steps",
            "ZeRO counts steps for all parameters of a group together",
            "Give them groups of their own, or load under strategy='fsdp'",
        )
    (count,) = counts
    held, group = zero.optimizer.state[slice_of.flat], zero.optimizer.param_groups[slice_of.group]
    if "step" in group:
        group["step"] = int(count)
    elif isinstance(held.get("step"), torch.Tensor):
        held["step"].fill_(count)
    else:
        held["step"] = int(count)


def _is_option(key: str) -> bool:
    return key not in ("params", "step") and not key.startswith("_ds_")


def _first_step(optimizer: Optimizer) -> Any:
    """A count of steps as this optimizer keeps it: torch's in a tensor, DeepSpeed's in a number."""
    return torch.zeros((), dtype=torch.float32) if type(optimizer).__module__.startswith("torch.") else 0


# The loss scaler


def scaler_state(optimizer: Any) -> dict[str, Any]:
    """How far dynamic loss scaling has come; nothing outside fp16."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return {key: getattr(scaler, key) for key in _SCALER_FIELDS if hasattr(scaler, key)}


def take_scaler_state(optimizer: Any, held: Mapping[str, Any]) -> None:
    """Go on from where another dynamic loss scaling was."""
    scaler = getattr(optimizer, "loss_scaler", None)
    for key in _SCALER_FIELDS:
        if key in held and hasattr(scaler, key):
            setattr(scaler, key, held[key])
