"""Hooks that run before and after a module's forward."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from paceline.errors import PlacementError
from paceline.placement.tensors import retie_parameters

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

    def context(self, module: nn.Module) -> AbstractContextManager[Any] | None:
        """Return what is entered for the forward with what the hook does before and after it, if anything is."""
        return None

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

    def context(self, module: nn.Module) -> AbstractContextManager[Any] | None:
        """Return the contexts of all hooks, in one."""
        found = [each for each in (_context(hook, module) for hook in self.hooks) if each is not None]
        if len(found) < 2:
            return next(iter(found), None)
        return _all_of(found)

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


def _context(hook: Any, module: nn.Module) -> AbstractContextManager[Any] | None:
    """The context of a hook, whose class may be that of another library."""
    make = getattr(hook, "context", None)
    return None if make is None else make(module)


@contextmanager
def _all_of(contexts: Sequence[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module with a hook."""
    state: Any = module
    hook: ModelHook = state._hf_hook
    context = _context(hook, module)
    if context is None:
        return _forward_with(hook, module, args, kwargs)
    with context:
        return _forward_with(hook, module, args, kwargs)


def _forward_with(hook: ModelHook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state: Any = module
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
        append: Keep the hook that the module has, and run this one after it; otherwise this one replaces it, which then
            undoes what it did to the module.

    Returns:
        The module.

    Raises:
        PlacementError: It is not a hook.
    """
    state: Any = module
    if isinstance(hook, type) or not hasattr(hook, "init_hook"):
        raise PlacementError(
            f"add_hook_to_module() got {hook!r}",
            "A hook is an object with the methods of ModelHook",
            "Derive a class from ModelHook, and pass an object of it",
        )
    earlier = getattr(module, "_hf_hook", None)
    if earlier is not None and append:
        remove_hook_from_module(module)
        hook = SequentialHook(earlier, hook)
    elif earlier is not None:
        earlier.detach_hook(module)
    state._hf_hook = hook
    if not _has_forward(module):  # a list or dict of modules or parameters
        return hook.init_hook(module)  # type: ignore[return-value]
    if not hasattr(module, "_old_forward"):
        # Not a method of the class: somebody replaced it in this object before.
        state._had_own_forward = "forward" in vars(module)
        state._old_forward = module.forward
    module = hook.init_hook(module)  # type: ignore[assignment]
    state = module
    state.forward = functools.update_wrapper(functools.partial(_forward, module), state._old_forward)
    return module


def _has_forward(module: nn.Module) -> bool:
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


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
    # Each hook has put back the weights of its own module.
    retie_parameters(module, vars(module).pop("_tied_while_offloaded", ()))


def remember_ties(model: nn.Module, ties: Sequence[Sequence[str]]) -> None:
    """Note which parameters of a model are one, so that they are again after its hooks were removed.

    Args:
        model: The model.
        ties: Groups of names, as `find_tied_parameters` returned them.
    """
    state: Any = model
    state._tied_while_offloaded = [list(group) for group in ties]
