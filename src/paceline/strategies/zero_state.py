"""The training state of a DeepSpeed engine, out and in: fp32 values and moments by the parameters' own names."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint.parts import OptimizerState, Part
from paceline.errors import StateError
from paceline.strategies.state import check_groups, options_of, take_options
from paceline.strategies.zero import piece_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from paceline.checkpoint.parts import Number, Slot
    from paceline.collectives import Group
    from paceline.strategies.zero import Place
    from paceline.strategies.zero_engine import Bound

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


# Weights


def value_of(bound: Bound | None, parameter: nn.Parameter) -> Part:
    """This rank's run of a parameter, in the most exact copy that there is."""
    if bound is not None:
        return bound.partitions.value(parameter)
    return piece_of(parameter) if hasattr(parameter, "ds_id") else Part.whole(parameter)


def is_cut(bound: Bound | None, parameter: nn.Parameter) -> bool:
    """Whether ranks hold different runs of a parameter: the same answer on all of them."""
    if hasattr(parameter, "ds_id"):
        return True
    return bound is not None and bound.partitions.cut and bound.partitions.place(parameter) is not None


def gather_whole(part: Part, group: Group, device: torch.device) -> Tensor:
    """The whole tensor on the CPU, from the runs of all ranks; exact to the bit. Collective."""
    # Added up as integers, since 0.0 + -0.0 would lose a sign; widening to fp32 and back loses nothing.
    bits = torch.zeros(part.numel, dtype=torch.int32, device=device)
    run = part.flat().to(device, torch.float32).view(torch.int32)
    bits[part.start : part.stop] = run
    group.all_reduce(bits, "sum")
    return bits.view(torch.float32).to(part.dtype).view(part.shape).cpu()


# Moments, counts and options


def optimizer_state(bound: Bound, names: Mapping[int, str]) -> OptimizerState:
    """See `Strategy.optimizer_state`."""
    state = OptimizerState()
    bound.steps.clear()
    for index, group in enumerate(bound.groups):
        held = {key: value for key, value in bound.optimizer.param_groups[index].items() if _is_option(key)}
        state.groups.append({**options_of(held), "params": [names[id(p)] for p in group]})
        for parameter in group:
            place = bound.partitions.place(parameter)
            if place is not None:
                _collect(bound, names[id(parameter)], parameter, place, state)
    return state


def _collect(bound: Bound, name: str, parameter: nn.Parameter, place: Place, state: OptimizerState) -> None:
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    held = bound.optimizer.state.get(place.flat, {})
    slots: dict[str, Part] = {}
    numbers: dict[str, Number] = {}
    for key, value in held.items():
        if key == "step":
            continue
        if (
            isinstance(value, torch.Tensor)
            and value.numel() == place.flat.numel()
            and value.ndim >= min(place.flat.ndim, 1)
        ):
            slots[key] = Part(shape, place.start, place.cut(value))
        elif isinstance(value, (int, float, bool)) or value is None:
            numbers[key] = value
        else:
            raise StateError(
                f"{type(bound.optimizer).__name__} keeps {key!r} as {type(value).__name__}",
                "ZeRO cuts flat tensors, and this is neither one as large as the parameters nor a number",
                "Use an optimizer that keeps one value for each element, as Adam and SGD do",
            )
    # Some optimizers of DeepSpeed count their steps in the group.
    step = held.get("step", bound.optimizer.param_groups[place.group].get("step") if slots else None)
    if step is not None:
        counted = torch.tensor(float(step), dtype=torch.float32)
        bound.steps.setdefault(id(place.flat), (place, []))[1].append(counted)
        slots["step"] = Part.whole(counted)
    if slots:
        state.slots[name] = slots
    if numbers:
        state.numbers[name] = numbers


def make_slots(
    bound: Bound,
    names: Mapping[int, str],
    slots: Mapping[str, Mapping[str, Slot]],
    numbers: Mapping[str, Mapping[str, Number]],
) -> None:
    """See `Strategy.make_slots`."""
    wanted: dict[int, tuple[Place, dict[str, Slot], dict[str, Number]]] = {}
    for group in bound.groups:
        for parameter in group:
            place, name = bound.partitions.place(parameter), names[id(parameter)]
            if place is not None:
                _, tensors, counts = wanted.setdefault(id(place.flat), (place, {}, {}))
                tensors.update(_with_dimension(parameter, slots.get(name, {})))
                counts.update(numbers.get(name, {}))
    for place, tensors, counts in wanted.values():
        _make_room(bound, place, tensors, counts)


def _with_dimension(parameter: nn.Parameter, slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """The slots of a parameter; what is as large as one without dimensions is no single number for it."""
    if getattr(parameter, "ds_shape", parameter.shape) != ():
        return dict(slots)
    return {key: replace(slot, shape=(1,)) if key != "step" else slot for key, slot in slots.items()}


def _make_room(bound: Bound, place: Place, tensors: dict[str, Slot], counts: dict[str, Number]) -> None:
    before = bound.optimizer.state.get(place.flat, {})
    held: dict[str, Any] = {}
    for key, slot in tensors.items():
        if key == "step":
            held[key] = before.get(key, _first_step(bound.optimizer))
        elif slot.shape == ():
            raise StateError(
                f"The saved state has a single number {key!r} for each parameter",
                "ZeRO keeps one for all parameters of a group",
                "Load it under strategy='fsdp' or 'ddp'",
            )
        else:
            held[key] = before[key] if key in before else torch.zeros_like(place.flat, dtype=slot.dtype)
    held.update(counts)
    if "step" in held and "step" in bound.optimizer.param_groups[place.group]:
        del held["step"]
    bound.optimizer.state[place.flat] = held
    # DeepSpeed looks its fragments of the states up again after the next step.
    if hasattr(bound.engine.optimizer, "_hp_optimizer_states_linked"):
        bound.engine.optimizer._hp_optimizer_states_linked = False


def set_groups(bound: Bound, names: Mapping[int, str], groups: Sequence[Mapping[str, Any]]) -> None:
    """See `Strategy.set_groups`."""
    mine = [[names[id(p)] for p in group] for group in bound.groups]
    check_groups(mine, groups)
    for held, saved in zip(bound.optimizer.param_groups, groups, strict=True):
        take_options(held, saved)


def state_written(bound: Bound) -> None:
    """Carry what was written to every other copy of it. Collective."""
    for place, counts in bound.steps.values():
        _write_steps(bound, place, {float(count) for count in counts})
    bound.steps.clear()
    bound.partitions.publish()


def _write_steps(bound: Bound, place: Place, counts: set[float]) -> None:
    if len(counts) > 1:
        raise StateError(
            f"Parameters of one group were saved after {', '.join(f'{c:g}' for c in sorted(counts))} steps",
            "ZeRO counts steps for all parameters of a group together",
            "Give them groups of their own, or load under strategy='fsdp'",
        )
    (count,) = counts
    held, group = bound.optimizer.state[place.flat], bound.optimizer.param_groups[place.group]
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
