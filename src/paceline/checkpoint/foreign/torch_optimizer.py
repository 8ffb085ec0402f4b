"""Optimizer states as torch keeps them: by each parameter's place in the groups, not by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint.portable_state import ForeignOptimizer, Source, Tensors
from paceline.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["name_optimizer", "own_names"]


def own_names(state: Mapping[str, Any]) -> list[str] | None:
    """The parameters' names in the order of the groups, where the optimizer's state has them."""
    names: list[str] = []
    for group in state["param_groups"]:
        held = group.get("param_names") or [key for key in group["params"] if isinstance(key, str)]
        if len(held) != len(group["params"]):
            return None
        names += map(str, held)
    return names


def name_optimizer(state: Mapping[str, Any], names: Sequence[str], path: Path) -> ForeignOptimizer:
    """Give a torch optimizer's state the names of its parameters.

    Args:
        state: An optimizer's state dict.
        names: Of its parameters, group by group.
        path: Where it is from, for messages.

    Raises:
        CheckpointError: There are more or fewer names than parameters.
    """
    keys = [key for group in state["param_groups"] for key in group["params"]]
    if len(keys) != len(names):
        raise CheckpointError(
            f"{path} holds {len(keys)} parameters in groups of {[len(g['params']) for g in state['param_groups']]}, "
            f"and {len(names)} are named",
            "It numbers its parameters, so the names must come from the same groups in the same order",
            "Build the optimizer from the same groups as the run that saved it",
        )
    named = dict(zip(keys, names, strict=True))
    found = ForeignOptimizer()
    for key, held in state["state"].items():
        name = named[key]
        tensors = {slot: value for slot, value in held.items() if isinstance(value, torch.Tensor)}
        numbers = {slot: value for slot, value in held.items() if slot not in tensors and _is_number(value)}
        if tensors:
            found.slots[name] = Tensors({slot: Source.of(value) for slot, value in tensors.items()})
        if numbers:
            found.numbers[name] = numbers
    for group in state["param_groups"]:
        options = {key: _option(value) for key, value in group.items() if key not in ("params", "param_names")}
        found.groups.append({**options, "params": [named[key] for key in group["params"]]})
    return found


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float))


def _option(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.ndim == 0 else value
