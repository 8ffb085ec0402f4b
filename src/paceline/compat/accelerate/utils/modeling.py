"""Sizes, names and devices of a model's tensors: paceline's placement, under Accelerate's names."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from paceline.compat.accelerate.settings.enums import DistributedType
from paceline.compat.accelerate.state import AcceleratorState, PartialState
from paceline.compat.accelerate.utils.other import extract_model_from_parallel, id_tensor_storage
from paceline.placement import sizes
from paceline.placement.device_map import (
    check_device_map,
    check_tied_parameters_in_config,
    check_tied_parameters_on_same_device,
    clean_device_map,
    fallback_allocate,
    get_module_size_with_ties,
    infer_auto_device_map,
)
from paceline.placement.loading import load_checkpoint_in_model, load_offloaded_weights, load_state_dict
from paceline.placement.offloaded_state import (
    align_module_device,
    get_state_dict_from_offload,
    get_state_dict_offloaded_model,
    has_offloaded_params,
)
from paceline.placement.sizes import (
    calculate_maximum_sizes,
    compute_module_sizes,
    compute_module_total_buffer_size,
    convert_file_size_to_int,
    dtype_byte_size,
    get_balanced_memory,
    get_max_layer_size,
    get_module_leaves,
)
from paceline.placement.tensors import (
    find_tied_parameters,
    get_non_persistent_buffers,
    is_same_device,
    named_module_tensors,
    retie_parameters,
    set_module_tensor_to_device,
)

if TYPE_CHECKING:
    from paceline.compat.accelerate.settings.handlers import AutocastKwargs

__all__ = [
    "align_module_device",
    "calculate_maximum_sizes",
    "check_device_map",
    "check_device_same",
    "check_tied_parameters_in_config",
    "check_tied_parameters_on_same_device",
    "clean_device_map",
    "compute_module_sizes",
    "compute_module_total_buffer_size",
    "convert_file_size_to_int",
    "dtype_byte_size",
    "fallback_allocate",
    "find_tied_parameters",
    "get_balanced_memory",
    "get_grad_scaler",
    "get_max_layer_size",
    "get_max_memory",
    "get_mixed_precision_context_manager",
    "get_module_leaves",
    "get_module_size_with_ties",
    "get_non_persistent_buffers",
    "get_state_dict_from_offload",
    "get_state_dict_offloaded_model",
    "has_offloaded_params",
    "id_tensor_storage",
    "infer_auto_device_map",
    "is_peft_model",
    "load_checkpoint_in_model",
    "load_offloaded_weights",
    "load_state_dict",
    "named_module_tensors",
    "retie_parameters",
    "set_module_tensor_to_device",
]


def get_max_memory(max_memory: dict[int | str, float | str] | None = None) -> dict[int | str, float]:
    """Return the free bytes of every device by number, and of the host as "cpu"; accelerators come first.

    Args:
        max_memory: Sizes to use instead, as numbers or text such as "5GB"; text is replaced by numbers in it.
    """
    found = sizes.get_max_memory(max_memory)
    if max_memory is not None:
        # transformers compares what is returned with its own dict.
        max_memory.update(found)
    return found


def is_peft_model(model: Any) -> bool:
    """Whether a model, or what its wrappers hold, is one of PEFT."""
    peft = sys.modules.get("peft")  # without it, nobody can have made such a model
    return peft is not None and isinstance(extract_model_from_parallel(model), peft.PeftModel)


def check_device_same(first_device: torch.device, second_device: torch.device) -> bool:
    """Whether two devices are the same one; an accelerator without a number is number 0."""
    return is_same_device(first_device, second_device)


def get_mixed_precision_context_manager(
    native_amp: bool = False, autocast_kwargs: AutocastKwargs | None = None
) -> AbstractContextManager[Any]:
    """Return the autocast context of this run, or an empty one.

    Args:
        native_amp: Whether torch's autocast is used.
        autocast_kwargs: Its settings.
    """
    if not native_amp:
        return nullcontext()
    kwargs = {} if autocast_kwargs is None else autocast_kwargs.to_kwargs()
    state = AcceleratorState()
    if state.mixed_precision in ("fp16", "bf16", "fp8"):
        kwargs["dtype"] = torch.float16 if state.mixed_precision == "fp16" else torch.bfloat16
    return torch.autocast(device_type=state.device.type, **kwargs)


def get_grad_scaler(distributed_type: DistributedType | None = None, **kwargs: Any) -> torch.amp.GradScaler:
    """Return the loss scaler of this run.

    Args:
        distributed_type: How the run is distributed.
        **kwargs: Arguments of `torch.amp.GradScaler`.
    """
    return torch.amp.GradScaler(PartialState().device.type, **kwargs)
