"""Hooks on a module's forward: paceline's, under Accelerate's signatures."""

from __future__ import annotations

from paceline import placement
from paceline.compat.accelerate.bridge.signatures import with_accelerates_arguments
from paceline.placement import (
    AlignDevicesHook,
    CpuOffload,
    LayerwiseCastingHook,
    ModelHook,
    SequentialHook,
    UserCpuOffloadHook,
    add_hook_to_module,
    attach_execution_device_hook,
    remove_hook_from_module,
    remove_hook_from_submodules,
)

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

attach_align_device_hook = with_accelerates_arguments(placement.attach_align_device_hook)
attach_align_device_hook_on_blocks = with_accelerates_arguments(placement.attach_align_device_hook_on_blocks)
