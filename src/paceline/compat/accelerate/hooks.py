"""Hooks that move a module's weights before its forward: not supported through the switch, but importable.

Programs test whether a module has such a hook, and take it off where there is none.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from paceline.compat.accelerate.settings.errors import UnsupportedError
from paceline.compat.accelerate.utils.modeling import placement_unsupported

__all__ = [
    "AlignDevicesHook",
    "CpuOffload",
    "LayerwiseCastingHook",
    "ModelHook",
    "SequentialHook",
    "UserCpuOffloadHook",
    "add_hook_to_module",
    "attach_align_device_hook",
    "attach_align_device_hook_on_blocks",
    "attach_execution_device_hook",
    "remove_hook_from_module",
    "remove_hook_from_submodules",
]

M = TypeVar("M", bound=nn.Module)


class ModelHook:
    """Base class of hooks; none can be made."""

    no_grad = False

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise UnsupportedError(
            f"{type(self).__name__}(…) was made",
            "Hooks on a module's forward are not supported through the switch",
            "Shard the model (FSDP or DeepSpeed), or use torch's own register_forward_pre_hook",
        )


class SequentialHook(ModelHook):
    """Several hooks, one after the other."""


class AlignDevicesHook(ModelHook):
    """Brings inputs and weights onto one device."""


class CpuOffload(ModelHook):
    """Keeps weights in host memory until the forward."""


class UserCpuOffloadHook(ModelHook):
    """Lets the program bring weights back to host memory."""


class LayerwiseCastingHook(ModelHook):
    """Stores weights in one dtype and computes in another."""


@placement_unsupported
def add_hook_to_module(module: nn.Module, hook: ModelHook, append: bool = False) -> Any:
    """Let a hook run with a module's forward."""


@placement_unsupported
def attach_align_device_hook(
    module: nn.Module,
    execution_device: Any = None,
    offload: bool = False,
    weights_map: Any = None,
    offload_buffers: bool = False,
    module_name: str = "",
    skip_keys: Any = None,
    preload_module_classes: Any = None,
    tied_params_map: Any = None,
) -> Any:
    """Let every layer bring its weights onto a device."""


@placement_unsupported
def attach_align_device_hook_on_blocks(
    module: nn.Module,
    execution_device: Any = None,
    offload: Any = False,
    weights_map: Any = None,
    offload_buffers: bool = False,
    module_name: str = "",
    skip_keys: Any = None,
    preload_module_classes: Any = None,
    tied_params_map: Any = None,
) -> Any:
    """Let some blocks bring their weights onto devices."""


@placement_unsupported
def attach_execution_device_hook(
    module: nn.Module,
    execution_device: Any,
    skip_keys: Any = None,
    preload_module_classes: Any = None,
    tied_params_map: Any = None,
) -> Any:
    """Let every layer get its inputs on a device."""


def remove_hook_from_module(module: M, recurse: bool = False) -> M:
    """Return the module, which has no hook."""
    return module


def remove_hook_from_submodules(module: nn.Module) -> None:
    """Return: no module has a hook."""
