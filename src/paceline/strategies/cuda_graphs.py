"""CUDA graphs of compiled code, so that nothing which outlives a step shares memory with them.

A replayed graph writes its results where it wrote them before, over those that a script has kept. torch reports that
for outputs that are kept; gradients that are accumulated over several backwards are wrong without a word (torch issue
96693). So both are copied out of the graphs' memory here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paceline.collectives.nested import map_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from paceline.config import TorchDynamoPlugin

__all__ = [
    "GRAPH_OPTIONS",
    "MAX_SHAPES",
    "copy_gradients",
    "has_memory_for_graphs",
    "may_be_recomputed",
    "replayed",
    "uses_graphs",
]

# Of inductor.
GRAPH_OPTIONS: dict[str, Any] = {"triton.cudagraphs": True}
# Each shape is a graph of its own, with memory of its own: a full batch and the last one of an epoch, for training and
# for something else.
MAX_SHAPES = 4
# Graphs keep their activations' memory for themselves, beside that of everything else.
_MAX_MEMORY_SHARE = 0.4


class GradientCopy:
    """A hook that gives a parameter its gradient in memory of its own.

    torch makes the first gradient that reaches a parameter its `grad`. One from a graph would be overwritten by the
    next backward, in the middle of an accumulation.

    Args:
        parameter: Whose gradient it is.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter

    def __call__(self, gradient: Tensor) -> Tensor | None:
        # What is added to a gradient that exists already is copied thereby.
        return gradient.clone() if self._parameter.grad is None else None


def copy_gradients(parameters: Iterable[nn.Parameter]) -> list[RemovableHandle]:
    """Let gradients be copied out of the graphs' memory from now on.

    Args:
        parameters: Of compiled code that replays graphs.

    Returns:
        What ends it; empty for parameters whose gradients are copied already.
    """
    handles: list[Any] = []
    for parameter in parameters:
        hooks = parameter._backward_hooks or {}
        if parameter.requires_grad and not any(isinstance(hook, GradientCopy) for hook in hooks.values()):
            register: Any = parameter.register_hook
            handles.append(register(GradientCopy(parameter)))
    return handles


def uses_graphs(settings: TorchDynamoPlugin) -> bool:
    """Whether a configuration of the compiler asks for CUDA graphs."""
    with_inductor = settings.backend == "inductor" and (
        settings.mode in ("reduce-overhead", "max-autotune") or (settings.options or {}).get("triton.cudagraphs")
    )
    return bool(settings.backend == "cudagraphs" or with_inductor)


def replayed(compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call code that replays graphs; returns copies of its results."""
    return map_tensors(_copied, compiled(*args, **kwargs))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.device.type != "cpu" else tensor


def may_be_recomputed() -> bool:
    """Whether this forward is part of activation checkpointing.

    It runs inside of a backward then, or what it saves is hooked. A forward that is computed again would write over
    what the backward of other blocks still reads.
    """
    is_in_backward: bool = torch._C._current_graph_task_id() != -1
    return is_in_backward or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def has_memory_for_graphs(device: torch.device) -> bool:
    """Whether the run has used so little memory that graphs may keep as much again."""
    if device.type != "cuda":
        return True
    _, total = torch.cuda.mem_get_info(device)
    return torch.cuda.max_memory_reserved(device) < _MAX_MEMORY_SHARE * total
