"""Copies batches to the device, one ahead of the batch in use where the device has streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from paceline.collectives.nested import leaves, map_tensors, send_to_device

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DevicePrefetcher"]

_NONE: Any = object()

# A copy of up to this many bytes out of pageable memory is staged by the driver and returns at once (CUDA runtime
# API, "API synchronization behavior"), so pinning it and a stream of its own would cost more than they hide: about
# 0.1 ms of host time a batch on an H200 machine.
_SMALL = 64 * 1024


class DevicePrefetcher:
    """Puts batches on a device; on a CPU device they pass through untouched.

    On an accelerator the copy of the next batch runs on a stream of its own, out of pinned memory, while the current
    one is in use. Small batches are copied when they are handed out. So is a batch that holds something other than
    dense tensors that can move itself (a method `to`), since nobody can tell the allocator which tensors it hides.

    Args:
        device: Where batches go.
        non_blocking: Let the host go on during a copy.
    """

    def __init__(self, device: torch.device, *, non_blocking: bool) -> None:
        self._device = device
        self._non_blocking = non_blocking
        self._stream = None if device.type == "cpu" else _maybe_stream(device)

    def iterate(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the same batches on the device."""
        if self._device.type == "cpu":
            return batches
        if self._stream is None:
            return (send_to_device(batch, self._device, self._non_blocking) for batch in batches)
        return self._ahead(batches, self._stream)

    def _ahead(self, batches: Iterator[Any], stream: torch.Stream) -> Iterator[Any]:
        ready = self._start(next(batches, _NONE), stream)
        while ready is not None:
            # The copy of the next batch is queued before this one is handed out.
            following = self._start(next(batches, _NONE), stream)
            yield self._finish(*ready)
            ready = following

    def _start(self, batch: Any, stream: torch.Stream) -> tuple[Any, torch.Event | None] | None:
        if batch is _NONE:
            return None
        size = 0
        for _, leaf in leaves(batch):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                size += leaf.numel() * leaf.element_size()
            elif hasattr(leaf, "to"):
                return batch, None
        if size <= _SMALL:
            return batch, None
        with stream:
            return map_tensors(self._copy, batch), stream.record_event()

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._non_blocking and tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=self._non_blocking)

    def _finish(self, batch: Any, copied: torch.Event | None) -> Any:
        if copied is None:
            return send_to_device(batch, self._device, self._non_blocking)
        current = torch.accelerator.current_stream(self._device)
        current.wait_event(copied)
        for _, leaf in leaves(batch):
            # The memory belongs to the copy stream, which could use it again while it is still read here.
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self._device.type:
                leaf.record_stream(current)
        return batch


def _maybe_stream(device: torch.device) -> torch.Stream | None:
    try:
        stream = torch.Stream(device=device)
        stream.record_event()
        return stream
    except (RuntimeError, NotImplementedError):
        return None
