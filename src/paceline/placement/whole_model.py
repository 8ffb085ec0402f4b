"""Models that go to a device as a whole when they run, and back to host memory when another one needs the room."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from paceline.collectives.nested import send_to_device
from paceline.placement.hooks import ModelHook, add_hook_to_module, not_compiled, remove_hook_from_module
from paceline.placement.tensors import Device, as_device

__all__ = ["CpuOffload", "UserCpuOffloadHook", "cpu_offload_with_hook"]


class CpuOffload(ModelHook):
    """Keeps a model in host memory until it runs; it stays on the device then.

    Args:
        execution_device: Where it runs; by default this machine's accelerator, or the CPU.
        prev_module_hook: The hook of a model that goes back to host memory first.
    """

    def __init__(
        self, execution_device: Device | None = None, prev_module_hook: UserCpuOffloadHook | None = None
    ) -> None:
        if execution_device is None:
            execution_device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        self.execution_device = execution_device
        self.prev_module_hook = prev_module_hook

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Put the model into host memory."""
        return module.to("cpu")

    @not_compiled
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put the model on its device, and its inputs."""
        previous = self.prev_module_hook
        if previous is not None and any(each.device.type != "cpu" for each in previous.model.parameters()):
            previous.offload()
        device = as_device(self.execution_device)
        module.to(device)
        return send_to_device(args, device), send_to_device(kwargs, device)


class UserCpuOffloadHook:
    """A model with its hook, for programs that decide themselves when it goes back to host memory.

    Args:
        model: The model.
        hook: Its hook.
    """

    def __init__(self, model: nn.Module, hook: ModelHook) -> None:
        self.model = model
        self.hook = hook

    def offload(self) -> None:
        """Put the model into host memory."""
        self.hook.init_hook(self.model)

    def remove(self) -> None:
        """Take the hook off the model."""
        remove_hook_from_module(self.model)


def cpu_offload_with_hook(
    model: nn.Module, execution_device: Device | None = None, prev_module_hook: UserCpuOffloadHook | None = None
) -> tuple[nn.Module, UserCpuOffloadHook]:
    """Keep a model in host memory until it runs, for pipelines of several models.

    Args:
        model: The model.
        execution_device: Where it runs; by default this machine's accelerator, or the CPU.
        prev_module_hook: What this function returned for the model that runs before, and then has to make room.

    Returns:
        The model, and a hook whose `offload` puts it back into host memory.
    """
    hook = CpuOffload(execution_device, prev_module_hook)
    add_hook_to_module(model, hook, append=True)
    return model, UserCpuOffloadHook(model, hook)
