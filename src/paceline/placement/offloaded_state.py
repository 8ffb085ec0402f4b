"""The weights of modules whose hooks keep them somewhere else."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from paceline.errors import PlacementError
from paceline.placement.alignment import align_hooks
from paceline.placement.tensors import META, Device, is_extra_state, set_module_tensor_to_device, shortened

__all__ = [
    "align_module_device",
    "get_state_dict_from_offload",
    "get_state_dict_offloaded_model",
    "has_offloaded_params",
    "refuse_offloaded",
]

logger = logging.getLogger(__name__)


def has_offloaded_params(module: nn.Module) -> bool:
    """Whether a hook keeps a module's parameters somewhere else between forwards."""
    return any(hook.offload for hook in align_hooks(module))


def refuse_offloaded(model: nn.Module, names: Collection[str]) -> None:
    """Refuse to load weights that hooks keep somewhere else.

    Args:
        model: The model.
        names: What is to be loaded.

    Raises:
        PlacementError: A hook keeps one of them.
    """
    kept = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for hook in align_hooks(module)
        for name in hook.offloaded
    ]
    refused = [name for name in kept if name in names]
    if refused:
        raise PlacementError(
            f"{shortened(refused)} of {type(model).__name__} are to be loaded",
            "Hooks keep these weights in host memory or on disk, and would bring the old ones back for each forward",
            "Load the checkpoint before the model is spread, or call remove_hook_from_submodules(model) first",
        )


@contextmanager
def align_module_device(module: nn.Module, execution_device: Device | None = None) -> Iterator[None]:
    """Bring the parameters of a module onto a device, for a block.

    Args:
        module: The module; not those inside it.
        execution_device: The device; by default that where the module runs.
    """
    hook = next((each for each in align_hooks(module) if each.offload), None)
    if hook is not None:
        device = hook.execution_device
        hook.execution_device = device if execution_device is None else execution_device
        try:
            hook.pre_forward(module)
            yield
        finally:
            hook.post_forward(module, None)
            hook.execution_device = device
    elif execution_device is None:
        yield
    else:
        devices = {name: parameter.device for name, parameter in module.named_parameters(recurse=False)}
        try:
            for name in devices:
                set_module_tensor_to_device(module, name, execution_device)
            yield
        finally:
            for name, before in devices.items():
                set_module_tensor_to_device(module, name, before)


def get_state_dict_offloaded_model(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of a model with offloaded weights, in host memory.

    Args:
        model: The model.
    """
    state: dict[str, Any] = {}
    missing: set[str] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):  # a shared module has two names
        # Weights that the hook of an enclosing module brings are found there.
        with align_module_device(module, "cpu" if has_offloaded_params(module) else None):
            for key, tensor in module.state_dict(prefix=f"{prefix}." if prefix else "").items():
                if is_extra_state(key):
                    state[key] = tensor
                elif tensor.device == META:
                    missing.add(key)
                else:
                    state[key] = tensor.to("cpu")
    missing -= set(state)
    if missing:
        logger.warning("These tensors have no values, and are left out: %s", ", ".join(sorted(missing)))
    return {name: state[name] for name in model.state_dict() if name in state}


def get_state_dict_from_offload(
    module: nn.Module,
    module_name: str,
    state_dict: dict[str, Any],
    device_to_put_offload: Device = "cpu",
) -> dict[str, Any]:
    """Fill the entries of one module in a state dict with its values.

    Args:
        module: The module.
        module_name: The full name of one of its tensors, such as `layers.0.weight`.
        state_dict: The state dict; changed in place.
        device_to_put_offload: Where offloaded values go.

    Returns:
        The state dict.
    """
    root = module_name.rpartition(".")[0]
    with align_module_device(module, device_to_put_offload if has_offloaded_params(module) else None):
        for key, tensor in module.state_dict().items():
            if f"{root}.{key}" in state_dict:
                state_dict[f"{root}.{key}"] = tensor
    return state_dict
