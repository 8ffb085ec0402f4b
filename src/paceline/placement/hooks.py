"""Hooks that run before and after a module's forward."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = [
    "ModelHook",
    "SequentialHook",
    "add_hook_to_module",
    "remove_hook_from_module",
    "remove_hook_from_submodules",
]

M = TypeVar("M", bound=nn.Module)

# Methods of a model that are replaced while it is spread over devices; they go with the hook.
GUARDED_METHODS = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron", "hpu")


F = TypeVar("F", bound=Callable[..., Any])


def not_compiled(function: F) -> F:
    """Let `torch.compile` leave a function and all that it calls as they are.

    That is what `torch.compiler.disable` does. As it imports the compiler, which takes seconds, it is only called where
    that was imported before.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return call  # type: ignore[return-value]


class ModelHook:
    """What happens before and after a module's forward; subclasses override the methods that they need.

    Attributes:
        no_grad: Run the forward without gradients.
    """

    no_grad = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Prepare the module when the hook is added to it; return it."""
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments that the forward gets."""
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Return what the caller of the forward gets."""
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Undo what the hook did to the module, when it is removed; return it."""
        return module


class SequentialHook(ModelHook):
    """Several hooks, one after the other, in the same order before and after the forward.

    Args:
        *hooks: The hooks.
    """

    def __init__(self, *hooks: ModelHook) -> None:
        self.hooks = hooks

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Let every hook prepare the module."""
        for hook in self.hooks:
            module = hook.init_hook(module)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pass the arguments through every hook."""
        for hook in self.hooks:
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Pass the output through every hook."""
        for hook in self.hooks:
            output = hook.post_forward(module, output)
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Let every hook undo what it did."""
        for hook in self.hooks:
            module = hook.detach_hook(module)
        return module


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module with a hook."""
    state: Any = module
    hook: ModelHook = state._hf_hook
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    if hook.no_grad:
        with torch.no_grad():
            output = state._old_forward(*args, **kwargs)
    else:
        output = state._old_forward(*args, **kwargs)
    return hook.post_forward(module, output)


def add_hook_to_module(module: M, hook: ModelHook, append: bool = False) -> M:
    """Let a hook run with a module's forward.

    The hook is `module._hf_hook` then, and the forward without it `module._old_forward`: other libraries use both.

    Args:
        module: The module.
        hook: The hook.
        append: Keep the hook that the module has, and run this one after it; otherwise this one replaces it.

    Returns:
        The module.
    """
    state: Any = module
    if append and getattr(module, "_hf_hook", None) is not None:
        earlier = state._hf_hook
        remove_hook_from_module(module)
        hook = SequentialHook(earlier, hook)
    if not hasattr(module, "_old_forward"):
        # Not a method of the class: somebody replaced it in this object before.
        state._had_own_forward = "forward" in vars(module)
        state._old_forward = module.forward
    state._hf_hook = hook
    module = hook.init_hook(module)  # type: ignore[assignment]
    state = module
    state.forward = functools.update_wrapper(functools.partial(_forward, module), state._old_forward)
    return module


def remove_hook_from_module(module: M, recurse: bool = False) -> M:
    """Take the hook off a module, if it has one.

    Args:
        module: The module.
        recurse: Do so for the modules inside it, too.

    Returns:
        The module.
    """
    state: Any = module
    if hasattr(module, "_hf_hook"):
        state._hf_hook.detach_hook(module)
        del state._hf_hook
    if hasattr(module, "_old_forward"):
        old = state._old_forward
        del state._old_forward, state.forward
        if vars(module).pop("_had_own_forward", False):
            state.forward = old
    for name in GUARDED_METHODS:
        if getattr(vars(module).get(name), "guards_placement", False):
            delattr(module, name)
    if recurse:
        for child in module.children():
            remove_hook_from_module(child, recurse)
    return module


def remove_hook_from_submodules(module: nn.Module) -> None:
    """Take the hooks off a module and all modules inside it."""
    remove_hook_from_module(module, recurse=True)
