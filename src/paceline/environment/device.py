"""The device of this rank and its capabilities, for any vendor that `torch.accelerator` supports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from paceline.environment.host import core_count, host_memory
from paceline.errors import DeviceError, counted

if TYPE_CHECKING:
    from paceline.environment.world import World

__all__ = ["choose_device", "describe_device", "memory_info", "supported_precisions", "why_no_fp8"]

# The first NVIDIA generation (Ada, then Hopper) whose tensor cores multiply 8-bit floats.
_FP8_CAPABILITY = (8, 9)


def choose_device(world: World, *, cpu: bool = False, named: str = "") -> torch.device:
    """Return this rank's device, and make it torch's current device.

    Under Slurm, a task that sees exactly one device uses it: Slurm has bound one device to each task.

    Args:
        world: This process's rank.
        cpu: Whether to compute on the CPU in any case.
        named: A device that the user chose for this process, such as `cuda:1`; empty to choose by rank.

    Raises:
        DeviceError: This machine has more processes than devices, or has no device of that name.
    """
    if named and not cpu:
        return _named_device(named)
    accelerator = None
    if not cpu:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    index = world.local_rank
    if world.source == "slurm" and count == 1:
        index = 0
    if index >= count:
        raise DeviceError(
            f"More processes than devices: this is local rank {world.local_rank} of {world.local_size}, "
            f"and it sees {counted(count, f'{accelerator.type} device')}",
            "Each process needs a device of its own",
            f"Start at most {count} processes on this machine (--num_processes), make more devices visible, "
            "or run on the CPU with --cpu",
        )
    torch.accelerator.set_device_index(index)
    return torch.device(accelerator.type, index)


def _named_device(name: str) -> torch.device:
    """The device that the user chose, made torch's current device."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "meta"):
            torch.accelerator.set_device_index(device.index or 0)
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(
            f"The device {name!r} was named by ACCELERATE_TORCH_DEVICE",
            f"torch cannot use it here: {str(error).splitlines()[0]}",
            "Name a device of this machine such as cuda:0 or cpu, or unset the variable",
        ) from error
    return device


def supported_precisions(device: torch.device) -> frozenset[str]:
    """Return those of "no", "bf16", "fp16" and "fp8" that the device supports natively, without emulation."""
    names = {"no", "fp16"}
    if device.type == "cpu" or _has_bf16(device):
        names.add("bf16")
    if _has_fp8(device):
        names.add("fp8")
    return frozenset(names)


def memory_info(device: torch.device, *, local_size: int = 1) -> tuple[int, int]:
    """Return (free, total) bytes of the device.

    Args:
        device: The device.
        local_size: Number of processes that share the host's memory; each gets an equal part. It matters only for
            devices without memory of their own (the CPU, and chips that share the host's).
    """
    query = None
    if device.type != "cpu":
        query = getattr(_module(device), "mem_get_info", None)
    if query is not None:
        free, total = query(device)
        return int(free), int(total)
    available, total = host_memory()
    return available // max(local_size, 1), total // max(local_size, 1)


def describe_device(device: torch.device) -> str:
    """Describe the device in one phrase, such as `NVIDIA H100 80GB HBM3 (cuda:0, 79.1 GiB)`."""
    gib = f"{memory_info(device)[1] / 2**30:.1f} GiB"
    if device.type == "cpu":
        return f"cpu ({counted(core_count(), 'core')}, {gib})"
    name = getattr(_module(device), "get_device_name", None)
    if name is not None:
        return f"{name(device)} ({device}, {gib})"
    return f"{device} ({gib})"


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _has_bf16(device: torch.device) -> bool:
    query = getattr(_module(device), "is_bf16_supported", None)
    if query is not None:
        try:
            return bool(query(including_emulation=False))
        except TypeError:  # not every device's module has this argument
            return bool(query())
    try:
        torch.ones(1, dtype=torch.bfloat16, device=device).add_(1)
    except (RuntimeError, TypeError):
        return False
    return True


def why_no_fp8(device: torch.device) -> str:
    """Say what a device lacks for fp8; empty if it has it."""
    needs = f"fp8 needs an NVIDIA GPU of compute capability {'.'.join(map(str, _FP8_CAPABILITY))} or higher"
    capability = _cuda_capability(device)
    if capability is None:
        return needs
    if capability >= _FP8_CAPABILITY:
        return ""
    return f"{needs}, and this one has {'.'.join(map(str, capability))}"


def _has_fp8(device: torch.device) -> bool:
    capability = _cuda_capability(device)
    return capability is not None and capability >= _FP8_CAPABILITY


def _cuda_capability(device: torch.device) -> tuple[int, int] | None:
    # torch.version.cuda is None in builds for other vendors, whose capability numbers differ in meaning.
    if device.type == "cpu" or torch.version.cuda is None:
        return None
    query = getattr(_module(device), "get_device_capability", None)
    capability = None
    if query is not None:
        capability = query(device)
    return capability if isinstance(capability, tuple) else None
