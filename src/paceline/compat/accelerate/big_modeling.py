"""Models that are spread over devices, host memory and disk: paceline's placement under Accelerate's signatures."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from paceline import placement
from paceline.compat.accelerate.bridge.signatures import with_accelerates_arguments
from paceline.compat.accelerate.settings.errors import InvalidValueError
from paceline.compat.accelerate.settings.variables import parse_flag_from_env
from paceline.compat.accelerate.utils.modeling import check_device_map
from paceline.placement import attach_layerwise_casting_hooks, cpu_offload_with_hook

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

# Programs listen to this name.
logger = logging.getLogger("accelerate.big_modeling")

PathLike = str | os.PathLike[str]
Device = int | str | torch.device


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Build models without memory for weights, within a block.

    Args:
        include_buffers: Build buffers without memory, too; by default as ACCELERATE_INIT_INCLUDE_BUFFERS says.
    """
    with init_on_device(torch.device("meta"), include_buffers=include_buffers):
        yield


@contextmanager
def init_on_device(device: torch.device, include_buffers: bool | None = None) -> Iterator[None]:
    """Build models on a device, within a block.

    Args:
        device: The device.
        include_buffers: Build buffers there, too; by default as ACCELERATE_INIT_INCLUDE_BUFFERS says.
    """
    if include_buffers is None:
        include_buffers = parse_flag_from_env("ACCELERATE_INIT_INCLUDE_BUFFERS")
    with placement.init_on_device(device, include_buffers=include_buffers):
        yield


cpu_offload = with_accelerates_arguments(placement.cpu_offload)
disk_offload = with_accelerates_arguments(placement.disk_offload)
load_checkpoint_and_dispatch = with_accelerates_arguments(placement.load_checkpoint_and_dispatch)


def dispatch_model(
    model: nn.Module,
    device_map: dict[str, Device],
    main_device: torch.device | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    offload_dir: PathLike | None = None,
    offload_index: dict[str, Any] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: list[str] | None = None,
    force_hooks: bool = False,
) -> nn.Module:
    """Spread a model over devices; the arguments are those of `paceline.placement.dispatch_model`."""
    # transformers replaces it in this module, for models with tensors that are placed by hand.
    check_device_map(model, device_map)
    return placement.dispatch_model(
        model,
        device_map,
        main_device,
        state_dict,
        offload_dir,
        offload_index,
        offload_buffers,
        skip_keys,
        preload_module_classes,
        force_hooks,
        is_checked=True,
        log=logger,
    )


def _refuse_recurrent_layers_under_sequence_parallelism(model: nn.Module) -> None:
    """Refuse layers that carry a state along the sequence, where the sequence is divided among ranks."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    layers = getattr(config, "layer_types", None) or ()
    recurrent = sorted({name for name in layers if "linear_attention" in name})
    if recurrent:
        raise InvalidValueError(
            f"{type(model).__name__} has layers of type {', '.join(recurrent)}, and sequence parallelism is on",
            "These layers carry a state along the sequence, which would begin anew on every rank",
            "Use a model with full attention only, or turn sequence parallelism off",
        )
