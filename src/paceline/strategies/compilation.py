"""torch.compile for a whole model or for its repeated blocks."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from paceline.errors import PrepareError
from paceline.strategies.blocks import repeated_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from torch.fx import GraphModule, Node

    from paceline.config import TorchDynamoPlugin

__all__ = ["LostGradientsError", "compile_model", "compiler_arguments", "protect_linear"]

_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
_IN_PLACE = {value for name, value in vars(operator).items() if name.startswith("__i") and callable(value)}
_IN_PLACE |= {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}
_IN_PLACE -= {operator.index, operator.inv, operator.invert}


class LostGradientsError(PrepareError):
    """Compiled code would train without some gradients."""

    def __init__(self) -> None:
        super().__init__(
            f"A torch.autograd.Function changes its output in place, and torch {torch.__version__} compiles it",
            "Its gradients would be zero: releases before 2.13 lose them",
            "Set dynamo_backend to no, write the function without in-place operations, or use torch 2.13",
        )


def compile_model(model: nn.Module, settings: TorchDynamoPlugin) -> None:
    """Compile `model` in place, or only its repeated blocks if regional compilation is enabled.

    The module, its class and its parameter names stay the same.
    """
    if settings.backend in ("no", "auto") or settings.disable:
        return
    arguments = compiler_arguments(settings, settings.backend)
    for module in _modules_to_compile(model, settings):
        module.compile(**arguments, fullgraph=settings.fullgraph)


def compiler_arguments(
    settings: TorchDynamoPlugin, backend: Any, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments of `torch.compile`, except `fullgraph`.

    Args:
        settings: Of the run.
        backend: Its name, or what is called with graph and inputs.
        options: Of inductor, in place of those of the run.
    """
    protect_linear()
    # torch accepts either a mode or options, not both.
    mode = settings.mode if settings.mode != "default" and not settings.options else None
    options = (options if backend == "inductor" else None) or settings.options or None
    if settings.activation_memory_budget < 1:
        backend = _WithBudget(_as_callable(backend, mode, options, settings.dynamic), settings.activation_memory_budget)
        mode = options = None
    if _TORCH >= (2, 13):
        return {"backend": backend, "mode": mode, "options": options, "dynamic": settings.dynamic}
    inner = _as_callable(backend, mode, options, settings.dynamic)
    if backend == "inductor":
        return {"backend": _CheckedBackend(inner), "dynamic": settings.dynamic}
    return {"backend": _CheckedBackend(inner), "mode": mode, "options": options, "dynamic": settings.dynamic}


def _modules_to_compile(model: nn.Module, settings: TorchDynamoPlugin) -> list[nn.Module]:
    if not settings.use_regional_compilation:
        return [model]
    blocks = repeated_blocks(model)
    return [model.get_submodule(name) for name in blocks] or [model]


def _as_callable(backend: Any, mode: str | None, options: Any, dynamic: bool | None) -> Callable[..., Any]:
    """A backend that is called with graph and inputs."""
    if backend == "inductor":
        inductor: Any = torch._TorchCompileInductorWrapper
        made: Callable[..., Any] = inductor(mode, options, dynamic)
        return made
    found: Callable[..., Any] = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
    return found


class _WithBudget:
    """A backend under which forward and backward are divided by an activation memory budget."""

    def __init__(self, backend: Callable[..., Any], budget: float) -> None:
        self._backend = backend
        self._budget = budget

    def __call__(self, graph: GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
        import torch._functorch.config as settings

        # torch has one setting for the process; other models are compiled without it.
        with settings.patch(activation_memory_budget=self._budget):
            return self._backend(graph, inputs, **kwargs)


class _CheckedBackend:
    """A backend that refuses graphs whose gradients torch would lose.

    Before torch 2.13, dynamo gives zero gradients to an autograd function that changes its output in place.
    """

    def __init__(self, backend: Callable[..., Any]) -> None:
        self._backend = backend

    def __call__(self, graph: GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
        if any(_loses_gradients(graph, node) for node in graph.graph.nodes):
            raise LostGradientsError
        return self._backend(graph, inputs, **kwargs)


def _loses_gradients(graph: GraphModule, node: Node) -> bool:
    """Whether a node is an autograd function with an in-place operation in its forward."""
    if "autograd_function_apply" not in str(node.target):
        return False
    forward = graph.get_submodule(str(getattr(node.args[0], "target", node.args[0])))
    parts: list[Any] = [part for part in forward.modules() if hasattr(part, "graph")]
    return any(_is_in_place(inner) for part in parts for inner in part.graph.nodes)


def _is_in_place(node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    ends_so = node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")
    return ends_so or node.target in _IN_PLACE or node.kwargs.get("out") is not None


def protect_linear() -> None:
    """Let compiled code use torch's own `linear` where DeepSpeed has replaced it for the whole process.

    ZeRO-3 puts an autograd function there, and leaves it there. It changes its output in place, so that compiled models
    of any strategy would train without gradients of their linear layers (see `_CheckedBackend`). What is not compiled
    keeps DeepSpeed's.
    """
    replaced: Any = F.linear
    if not str(getattr(replaced, "__module__", "")).startswith("deepspeed."):
        return

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
        own: Any = torch._C._nn.linear if torch.compiler.is_compiling() else replaced
        found: Tensor = own(input, weight, bias)
        return found

    F.linear = linear
