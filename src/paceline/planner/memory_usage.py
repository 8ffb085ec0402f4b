"""What uses a rank's memory, in bytes: parameters, gradients, optimizer state, and everything else."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from paceline.environment.device import memory_info
from paceline.environment.host import resident_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn
    from torch.optim import Optimizer

__all__ = ["MemoryUsage", "measure_memory", "process_memory"]

_NUM_LARGEST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUsage:
    """Bytes on one rank's device, or in its process on a CPU.

    Attributes:
        parameters: Parameters and buffers, or this rank's shards of them.
        gradients: Gradients of those.
        optimizer: The state of the optimizers.
        other: Everything else: activations and temporary buffers.
        libraries: Memory of the process before there was a model.
        unused: Reserved by torch's allocator and not in use.
        free: Free memory of the device, or of the machine.
        total: All of its memory.
        is_sharded: Whether parameters or optimizer state are sharded over the ranks.
        largest: The largest allocations, each with a description.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    other: int = 0
    libraries: int = 0
    unused: int = 0
    free: int = 0
    total: int = 0
    is_sharded: bool = False
    largest: tuple[tuple[int, str], ...] = ()

    @property
    def state(self) -> int:
        """Parameters, gradients and optimizer state together."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(slots=True)
class Storages:
    """Storages by address, each counted once."""

    sizes: dict[int, int]
    names: dict[int, str]
    is_sharded: bool = False

    def add(self, tensor: Any, name: str, device: torch.device) -> int:
        """Count a tensor's storage; return its bytes unless it was counted before."""
        local = getattr(tensor, "_local_tensor", tensor)
        self.is_sharded |= local is not tensor and local.numel() < tensor.numel()
        if not isinstance(local, torch.Tensor) or local.device.type != device.type:
            return 0
        try:
            storage = local.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
        except (RuntimeError, NotImplementedError):  # a tensor without memory of its own
            return 0
        if not address or address in self.sizes:
            return 0
        self.sizes[address], self.names[address] = size, name
        return size


def process_memory(device: torch.device) -> int:
    """Return the bytes that this process uses on the device; on a CPU, of host memory."""
    return _used(device)[0]


def measure_memory(
    models: Iterable[nn.Module], optimizers: Iterable[Optimizer], device: torch.device, *, libraries: int = 0
) -> MemoryUsage:
    """Measure the memory of prepared models and optimizers, and what is used besides.

    Args:
        models: Prepared models.
        optimizers: Their optimizers.
        device: This rank's device.
        libraries: Bytes that the process used before there was a model.
    """
    storages = Storages({}, {})
    models = list(models)
    parameters = sum(storages.add(t, f"{name} ({kind})", device) for name, t, kind in _tensors(models))
    gradients = sum(
        storages.add(p.grad, f"gradient of {name}", device)
        for model in models
        for name, p in model.named_parameters()
        if p.grad is not None
    )
    optimizer = sum(storages.add(t, f"optimizer state: {name}", device) for name, t in _state(optimizers))
    state = parameters + gradients + optimizer
    free, total = _free(device)
    used, unused = _used(device)
    return MemoryUsage(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        other=max(used - state - libraries, 0),
        libraries=libraries,
        unused=unused,
        free=free,
        total=total,
        is_sharded=storages.is_sharded,
        largest=_largest(storages, device),
    )


def _tensors(models: Iterable[nn.Module]) -> Iterator[tuple[str, torch.Tensor, str]]:
    for model in models:
        yield from ((name, parameter, "parameter") for name, parameter in model.named_parameters())
        yield from ((name, buffer, "buffer") for name, buffer in model.named_buffers())


def _state(optimizers: Iterable[Optimizer]) -> Iterator[tuple[str, torch.Tensor]]:
    for optimizer in optimizers:
        for parameter, state in list(getattr(optimizer, "state", {}).items()):
            shape = tuple(getattr(parameter, "shape", ()))
            if not isinstance(state, dict):
                continue
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    yield f"{name} of a parameter of shape {shape}", value


def _free(device: torch.device) -> tuple[int, int]:
    """Free and total bytes; a limit on this process counts."""
    free, total = memory_info(device)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if device.type != "cpu" or limit == resource.RLIM_INFINITY:
        return free, total
    import psutil

    return min(free, max(limit - int(psutil.Process().memory_info().vms), 0)), min(total, limit)


def _used(device: torch.device) -> tuple[int, int]:
    """Bytes in use, and bytes that the allocator has reserved without using them."""
    if device.type == "cpu":
        return resident_bytes(), 0
    used = int(torch.accelerator.memory_allocated(device))
    return used, int(torch.accelerator.memory_reserved(device)) - used


def _largest(storages: Storages, device: torch.device) -> tuple[tuple[int, str], ...]:
    allocations = [(size, storages.names[address]) for address, size in storages.sizes.items()]
    if device.type == "cuda":
        snapshot: Any = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        allocations.extend(unnamed_blocks(storages, snapshot, device.index or 0))
    return tuple(sorted(allocations, reverse=True)[:_NUM_LARGEST])


def unnamed_blocks(storages: Storages, snapshot: Iterable[dict[str, Any]], index: int) -> Iterator[tuple[int, str]]:
    """Allocated blocks that belong to no known tensor, with their origin if the history was recorded."""
    for segment in snapshot:
        if segment.get("device", 0) != index:
            continue
        address = int(segment["address"])
        for block in segment["blocks"]:
            start, address = int(block.get("address", address)), address + int(block["size"])
            if block["state"] == "active_allocated" and start not in storages.sizes:
                yield int(block["size"]), "an activation or a buffer" + _origin(block)


def _origin(block: dict[str, Any]) -> str:
    frames = block.get("frames") or next((h.get("frames", ()) for h in block.get("history", ())), ())
    user = [f for f in frames if str(f.get("filename", "")).endswith(".py") and "site-packages" not in f["filename"]]
    return f", allocated at {user[0]['filename']}:{user[0]['line']}" if user else ""
