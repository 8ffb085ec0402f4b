"""Accelerators of this machine, and the number of processes to start by default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.environment.host import core_count

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["count_accelerators", "detect", "visible_devices_variable"]

# The variable that selects the devices a process sees, by torch's name of the device type.
_VISIBLE = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "hpu": "HABANA_VISIBLE_MODULES",
    "mlu": "MLU_VISIBLE_DEVICES",
    "musa": "MUSA_VISIBLE_DEVICES",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
    "sdaa": "SDAA_VISIBLE_DEVICES",
    "xpu": "ZE_AFFINITY_MASK",
}


def detect(env: Mapping[str, str], use_cpu: bool = False) -> dict[str, object]:
    """Return the configuration keys that follow from this machine, for `resolve(detected=…)`.

    One process per accelerator. Without any, or with `use_cpu`, two processes if there are two cores, so that a script
    written for several ranks is tested as such, and else one.
    """
    _, count = (None, 0) if use_cpu else count_accelerators()
    return {"num_processes": count or min(2, core_count())}


def count_accelerators() -> tuple[str | None, int]:
    """Return torch's name of the accelerator type and the number of visible devices; (None, 0) without any."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return (None, 0) if accelerator is None else (accelerator.type, torch.accelerator.device_count())


def visible_devices_variable(device_type: str) -> str | None:
    """Return the variable that selects the devices of that type that a process sees; None when unknown."""
    return _VISIBLE.get(device_type)
