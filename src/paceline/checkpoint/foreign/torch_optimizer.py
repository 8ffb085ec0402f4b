"""Optimizer state dicts of torch, which number parameters by their position in the groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint.portable_state import LazyTensors, PortableOptimizer, TensorSource
from paceline.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["name_optimizer", "own_names"]


def own_names(state: Mapping[str, Any]) -> list[str] | None:
    """The parameter names in the order of the groups, if the state dict has them."""
    names: list[str] = []
    for group in state["param_groups"]:
        group_names = group.get("param_names") or [key for key in group["params"] if isinstance(key, str)]
        if len(group_names) != len(group["params"]):
            return None
        names += map(str, group_names)
    return names


def name_optimizer(state: Mapping[str, Any], names: Sequence[str], path: Path) -> PortableOptimizer:
    """Replace the numbers of parameters in an optimizer's state dict by their names.

    Args:
        state: The state dict.
        names: Parameter names, group by group.
        path: Its file, for messages.

    Raises:
        CheckpointError: There are more or fewer names than parameters.
    """
    keys = [key for group in state["param_groups"] for key in group["params"]]
    if len(keys) != len(names):
        raise CheckpointError(
            f"{path} holds {len(keys)} parameters in groups of {[len(g['params']) for g in state['param_groups']]}, "
            f"but {len(names)} names are given",
            "It numbers its parameters, so the names must come from the same groups in the same order",
            "Build the optimizer from the same groups as the run that saved it",
        )
    named = dict(zip(keys, names, strict=True))
    optimizer = PortableOptimizer()
    for key, values in state["state"].items():
        _add_state(optimizer, named[key], values)
    for group in state["param_groups"]:
        options = {key: _option(value) for key, value in group.items() if key not in ("params", "param_names")}
        optimizer.groups.append({**options, "params": [named[key] for key in group["params"]]})
    return optimizer


def _add_state(optimizer: PortableOptimizer, name: str, values: Mapping[str, Any]) -> None:
    tensors = {slot: TensorSource.of(value) for slot, value in values.items() if isinstance(value, torch.Tensor)}
    numbers = {slot: value for slot, value in values.items() if slot not in tensors and _is_number(value)}
    if tensors:
        optimizer.slots[name] = LazyTensors(tensors)
    if numbers:
        optimizer.numbers[name] = numbers


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float))


def _option(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return value.item()
    return value
