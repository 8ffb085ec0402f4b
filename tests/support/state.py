"""A training state as whole tensors, by the strategy's own verbs: what state and checkpoint tests compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from paceline.checkpoint.format.shards import Slot

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from paceline import Accelerator
    from paceline.accelerator.stepping import AcceleratedOptimizer
    from paceline.checkpoint.format.shards import TensorShard


@dataclass
class Whole:
    """All of a training state: the same on every rank."""

    weights: dict[str, Tensor]
    slots: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)


def prepared_models(accelerator: Accelerator) -> list[nn.Module]:
    """What an Accelerator has prepared and not freed; nothing public lists it."""
    return accelerator._prepared.models


def prepared_pair(accelerator: Accelerator) -> tuple[nn.Module, AcceleratedOptimizer]:
    """The one prepared model, and its optimizer."""
    (model,), (optimizer,) = accelerator._prepared.models, accelerator._prepared.optimizers
    return model, optimizer


def names_of(accelerator: Accelerator) -> dict[int, str]:
    """The names of the parameters of the one prepared model."""
    (model,) = prepared_models(accelerator)
    return {id(p): name for name, p in accelerator.strategy.named_parameters(model)}


def take_state(accelerator: Accelerator) -> Whole:
    """Put together what all ranks hold."""
    model, optimizer = prepared_pair(accelerator)
    strategy = accelerator.strategy
    state = strategy.optimizer_state(optimizer.optimizer, names_of(accelerator))
    return Whole(
        {name: gather(part) for name, part in strategy.model_state(model).items()},
        {name: {key: gather(part) for key, part in slots.items()} for name, slots in state.slots.items()},
        state.numbers,
        state.groups,
    )


def put_state(accelerator: Accelerator, whole: Whole) -> None:
    """Write each rank's runs of a whole state into its live memory."""
    model, optimizer = prepared_pair(accelerator)
    strategy, names = accelerator.strategy, names_of(accelerator)
    slots = {
        name: {key: Slot(tuple(value.shape), value.dtype) for key, value in tensors.items()}
        for name, tensors in whole.slots.items()
    }
    strategy.make_slots(optimizer.optimizer, names, slots, whole.numbers)
    strategy.set_groups(optimizer.optimizer, names, whole.groups)
    write(strategy.model_state(model), whole.weights)
    made = strategy.optimizer_state(optimizer.optimizer, names)
    assert made.slots.keys() == whole.slots.keys()
    for name, parts in made.slots.items():
        write(parts, whole.slots[name])
    strategy.state_written()


def write(parts: Mapping[str, TensorShard], values: Mapping[str, Tensor]) -> None:
    assert parts.keys() == values.keys(), parts.keys() ^ values.keys()
    for name, part in parts.items():
        assert part.shape == tuple(values[name].shape), name
        with torch.no_grad():
            part.write(part.start, values[name].reshape(-1)[part.start : part.stop])


def gather(part: TensorShard) -> Tensor:
    """Put one tensor together from the runs of all ranks, which must cover it and agree where they overlap."""
    mine = (part.start, part.flat().detach().cpu().clone())
    runs: list[Any] = [mine]
    if dist.is_initialized():
        runs = [None] * dist.get_world_size()
        dist.all_gather_object(runs, mine)
    whole = torch.zeros(part.numel, dtype=part.dtype)
    seen = torch.zeros(part.numel, dtype=torch.bool)
    for start, values in runs:
        span = slice(start, start + values.numel())
        assert torch.equal(whole[span][seen[span]], values[seen[span]]), "ranks hold different values of one element"
        whole[span] = values
        seen[span] = True
    assert seen.all(), "no rank holds some elements"
    return whole.view(part.shape)


def assert_same_state(one: Whole, other: Whole) -> None:
    """Bit-equal weights and moments, equal counts."""
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        assert same_bits(value, other.weights[name]), name
    assert one.slots.keys() == other.slots.keys()
    for name, slots in one.slots.items():
        assert slots.keys() == other.slots[name].keys(), name
        for key, value in slots.items():
            assert same_bits(value, other.slots[name][key]), f"{name}: {key}"
    assert one.numbers == other.numbers


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit: dtypes, signs of zero and all."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )
