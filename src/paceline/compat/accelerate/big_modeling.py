"""Models that are spread over devices, host memory and disk: not supported through the switch, but importable."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from paceline.compat.accelerate.settings.errors import UnsupportedError
from paceline.compat.accelerate.utils.modeling import check_device_map, placement_unsupported

__all__ = [
    "attach_layerwise_casting_hooks",
    "check_device_map",
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_and_dispatch",
]


def dispatch_model(
    model: nn.Module,
    device_map: dict[str, Any],
    main_device: Any = None,
    state_dict: Any = None,
    offload_dir: Any = None,
    offload_index: Any = None,
    offload_buffers: bool = False,
    skip_keys: Any = None,
    preload_module_classes: Any = None,
    force_hooks: bool = False,
) -> nn.Module:
    """Put a model on the device that `device_map` has for all its modules, and remember it as `hf_device_map`.

    Args:
        model: The model.
        device_map: Devices by name of a module.
        main_device: Unused, as all that follows: for several devices.
        state_dict: Unused.
        offload_dir: Unused.
        offload_index: Unused.
        offload_buffers: Unused.
        skip_keys: Unused.
        preload_module_classes: Unused.
        force_hooks: Refused if True.

    Raises:
        UnsupportedError: There are several devices, or one is the disk.
    """
    # transformers replaces it in this module, for models with tensors that are placed by hand.
    check_device_map(model, device_map)
    devices = {str(device) for device in device_map.values()}
    if len(devices) != 1 or "disk" in devices or force_hooks:
        raise UnsupportedError(
            f"A model is to be spread over {', '.join(sorted(devices))}" + (" with hooks" if force_hooks else ""),
            "Placing one model on several devices, in host memory or on disk is not supported through the switch",
            "Shard it instead (FSDP or DeepSpeed), or pass one device: device_map={'': 0}",
        )
    device = next(iter(device_map.values()))
    model.to(torch.device(device) if isinstance(device, int | str) else device)
    model.hf_device_map = dict(device_map)  # type: ignore[assignment]
    return model


@placement_unsupported
def init_empty_weights(include_buffers: bool | None = None) -> Any:
    """Build models without memory, within a block."""


@placement_unsupported
def init_on_device(device: torch.device, include_buffers: bool | None = None) -> Any:
    """Build models on a device, within a block."""


@placement_unsupported
def cpu_offload(
    model: nn.Module,
    execution_device: Any = None,
    offload_buffers: bool = False,
    state_dict: Any = None,
    preload_module_classes: Any = None,
) -> Any:
    """Keep a model's weights in host memory."""


@placement_unsupported
def cpu_offload_with_hook(model: nn.Module, execution_device: Any = None, prev_module_hook: Any = None) -> Any:
    """Keep a model's weights in host memory between its uses."""


@placement_unsupported
def disk_offload(
    model: nn.Module,
    offload_dir: Any,
    execution_device: Any = None,
    offload_buffers: bool = False,
    preload_module_classes: Any = None,
) -> Any:
    """Keep a model's weights on disk."""


@placement_unsupported
def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: Any,
    device_map: Any = None,
    max_memory: Any = None,
    no_split_module_classes: Any = None,
    offload_folder: Any = None,
    offload_buffers: bool = False,
    dtype: Any = None,
    offload_state_dict: Any = None,
    skip_keys: Any = None,
    preload_module_classes: Any = None,
    force_hooks: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> Any:
    """Load weights into a model that is spread over devices."""


@placement_unsupported
def attach_layerwise_casting_hooks(
    module: nn.Module,
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skip_modules_pattern: Any = None,
    skip_modules_classes: Any = None,
    non_blocking: bool = False,
) -> Any:
    """Store weights in one dtype and compute in another."""
