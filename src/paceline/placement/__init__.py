"""Models larger than a device: built without memory, loaded piece by piece, and spread over devices, host and disk.

The names are Accelerate's, as are their arguments.
"""

from __future__ import annotations

from paceline.placement.alignment import (
    AlignDevicesHook,
    attach_align_device_hook,
    attach_align_device_hook_on_blocks,
    attach_execution_device_hook,
)
from paceline.placement.device_map import check_device_map, clean_device_map, infer_auto_device_map
from paceline.placement.dispatch import cpu_offload, disk_offload, dispatch_model, load_checkpoint_and_dispatch
from paceline.placement.empty_init import init_empty_weights, init_on_device
from paceline.placement.hooks import (
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from paceline.placement.layerwise_casting import LayerwiseCastingHook, attach_layerwise_casting_hooks
from paceline.placement.loading import load_checkpoint_in_model
from paceline.placement.offload_folder import OffloadedWeightsLoader, offload_state_dict
from paceline.placement.offloaded_state import (
    align_module_device,
    get_state_dict_offloaded_model,
    has_offloaded_params,
)
from paceline.placement.pipeline import Pipeline, pipeline_model
from paceline.placement.sizes import compute_module_sizes, get_balanced_memory, get_max_memory
from paceline.placement.streaming import WeightStream
from paceline.placement.tensors import find_tied_parameters, retie_parameters, set_module_tensor_to_device
from paceline.placement.whole_model import CpuOffload, UserCpuOffloadHook, cpu_offload_with_hook

__all__ = [
    "AlignDevicesHook",
    "CpuOffload",
    "LayerwiseCastingHook",
    "ModelHook",
    "OffloadedWeightsLoader",
    "Pipeline",
    "SequentialHook",
    "UserCpuOffloadHook",
    "WeightStream",
    "add_hook_to_module",
    "align_module_device",
    "attach_align_device_hook",
    "attach_align_device_hook_on_blocks",
    "attach_execution_device_hook",
    "attach_layerwise_casting_hooks",
    "check_device_map",
    "clean_device_map",
    "compute_module_sizes",
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "find_tied_parameters",
    "get_balanced_memory",
    "get_max_memory",
    "get_state_dict_offloaded_model",
    "has_offloaded_params",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
    "offload_state_dict",
    "pipeline_model",
    "remove_hook_from_module",
    "remove_hook_from_submodules",
    "retie_parameters",
    "set_module_tensor_to_device",
]
