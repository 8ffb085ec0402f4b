"""Copies batches to the device, one batch ahead if the device has streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from paceline.collectives.nested import leaves, map_tensors, send_to_device

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DevicePrefetcher"]

_NONE: Any = object()

# A copy of up to this many bytes from pageable memory is staged by the driver and returns at once (CUDA runtime API,
# "API synchronization behavior"), so pinning and a separate stream would cost more than they hide: about 0.1 ms of host
# time per batch on an H200 machine.
_SMALL = 64 * 1024


class DevicePrefetcher:
    """Copies batches to a device; with a CPU device they are passed through unchanged.

    On an accelerator the next batch is copied from pinned memory on a separate stream while the current one is in use.
    Small batches are copied when they are yielded. So are batches with other objects than dense tensors that have a
    method `to`, because the tensors inside them cannot be recorded on the stream.

    Args:
        device: The target device.
        non_blocking: Whether the host continues during a copy.
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
            # The copy of the next batch is queued before this one is yielded.
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
            # The memory belongs to the copy stream, which could reuse it while it is still read here.
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
