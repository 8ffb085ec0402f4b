"""CUDA graphs of compiled code, so that nothing which outlives a step shares memory with them.

A replayed graph writes its results where it wrote them before, over those that a script has kept. torch reports that
for outputs that are kept; gradients that are accumulated over several backwards are wrong without a word (torch issue
96693). So both are copied out of the graphs' memory here, and so are gradients of what is passed in.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paceline.collectives.nested import map_tensors, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from paceline.config import TorchDynamoPlugin

__all__ = [
    "GRAPH_OPTIONS",
    "MAX_SHAPES",
    "Replayed",
    "copy_gradients",
    "has_hooks",
    "has_memory_for_graphs",
    "may_be_recomputed",
    "uses_graphs",
    "would_overwrite",
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

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = weakref.ref(parameter)

    def __call__(self, gradient: Tensor) -> Tensor | None:
        parameter = self._parameter()
        # What is added to a gradient that exists already is copied thereby.
        return gradient.clone() if parameter is None or parameter.grad is None else None


def _copy(gradient: Tensor) -> Tensor:
    """A hook that lets a gradient go on in memory of its own."""
    return gradient.clone()


def copy_gradients(parameters: Iterable[Tensor | None]) -> list[RemovableHandle]:
    """Let gradients be copied out of the graphs' memory from now on.

    Args:
        parameters: Of compiled code that replays graphs.

    Returns:
        What ends it; empty for parameters whose gradients are copied already, and for frozen ones.
    """
    handles: list[Any] = []
    for parameter in parameters:
        if parameter is None or not parameter.requires_grad:
            continue
        hooks = parameter._backward_hooks
        if not hooks or not any(isinstance(hook, GradientCopy) for hook in hooks.values()):
            register: Any = parameter.register_hook
            handles.append(register(GradientCopy(parameter)))
    return handles


def uses_graphs(settings: TorchDynamoPlugin) -> bool:
    """Whether a configuration of the compiler asks for CUDA graphs."""
    with_inductor = settings.backend == "inductor" and (
        settings.mode in ("reduce-overhead", "max-autotune") or (settings.options or {}).get("triton.cudagraphs")
    )
    return bool(settings.backend == "cudagraphs" or with_inductor)


class _Forwards:
    """The forwards of graphs whose backward is still to come, of all models of the process.

    torch keeps their activations until any graph has run backward. The next forward begins at the start of the graphs'
    memory, over the activations of those that have not.
    """

    def __init__(self) -> None:
        self.pending: weakref.WeakSet[_Arrival] = weakref.WeakSet()
        # What the last forward returned: where it is passed on, its gradient stays among the graphs.
        self.results: list[weakref.ref[Tensor]] = []
        self.has_run_backward = False

    def note(self, result: Any) -> None:
        """Note the results of a forward."""
        found: list[Any] = [tensor for tensor in tensors(result) if tensor.requires_grad]
        self.results = [weakref.ref(tensor) for tensor in found]
        if found:
            arrival = _Arrival(self)
            for tensor in found:
                tensor.register_hook(arrival)
            self.pending.add(arrival)
            self.has_run_backward = False


class _Arrival:
    """A hook that notes the first gradient of a forward's results; it lives as long as what could bring one."""

    __slots__ = ("__weakref__", "_forwards")

    def __init__(self, forwards: _Forwards) -> None:
        self._forwards = forwards

    def __call__(self, gradient: Tensor) -> None:
        self._forwards.pending.discard(self)
        self._forwards.has_run_backward = True


_FORWARDS = _Forwards()


def would_overwrite() -> bool:
    """Whether a forward would write over activations that a backward still reads."""
    return _FORWARDS.has_run_backward and bool(_FORWARDS.pending)


class Replayed:
    """A block's compiled code, replayed as graphs.

    Args:
        block: Whose code it is.
        compiled: The code.
    """

    def __init__(self, block: nn.Module, compiled: Callable[..., Any]) -> None:
        self._compiled = compiled
        self._parameters = [module._parameters for module in block.modules() if module._parameters]
        # Those whose gradients are copied here, by id, and what ends it.
        self._known: dict[int, weakref.ref[Tensor]] = {}
        self._copies: list[RemovableHandle] = []

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call it; returns copies of its results."""
        # Parameters may be unfrozen, or put in place of others, between any two steps.
        for parameters in self._parameters:
            for parameter in parameters.values():
                if parameter is not None and parameter.requires_grad:
                    self._copy_gradient_of(parameter)
        own = [ref() for ref in _FORWARDS.results]
        for value in (*args, *kwargs.values()):
            for tensor in (value,) if isinstance(value, Tensor) else tensors(value):
                if tensor.requires_grad and not any(tensor is each for each in own):
                    _let_gradient_leave(tensor)
        result = map_tensors(_copied, self._compiled(*args, **kwargs))
        _FORWARDS.note(result)
        return result

    def _copy_gradient_of(self, parameter: Tensor) -> None:
        known = self._known.get(id(parameter))
        if known is None or known() is not parameter:
            self._copies += copy_gradients((parameter,))
            self._known[id(parameter)] = weakref.ref(parameter)

    def end(self) -> None:
        """Let gradients stay where they are computed."""
        for handle in self._copies:
            handle.remove()
        self._copies, self._known = [], {}


def _let_gradient_leave(tensor: Any) -> None:
    """Copy the gradient of an input: as it is, it could go on to a parameter and become its `grad`."""
    if tensor.is_leaf:
        copy_gradients((tensor,))
    elif not any(hook is _copy for hook in (tensor._backward_hooks or {}).values()):
        tensor.register_hook(_copy)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.device.type != "cpu" else tensor


def may_be_recomputed() -> bool:
    """Whether this forward is part of activation checkpointing.

    It runs inside of a backward then, or what it saves is hooked. A forward that is computed again would write over
    what the backward of other blocks still reads.
    """
    is_in_backward: bool = torch._C._current_graph_task_id() != -1
    return is_in_backward or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def has_hooks(blocks: Iterable[nn.Module]) -> bool:
    """Whether a script sees what is computed inside of blocks, whose copies it would not get."""
    return any(module._forward_hooks or module._forward_pre_hooks for block in blocks for module in block.modules())


def has_memory_for_graphs(device: torch.device) -> bool:
    """Whether the run has used so little memory that graphs may keep as much again."""
    if device.type != "cuda":
        return True
    _, total = torch.cuda.mem_get_info(device)
    return torch.cuda.max_memory_reserved(device) < _MAX_MEMORY_SHARE * total
