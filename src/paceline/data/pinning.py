"""Copies tensors to the device through small pinned buffers, with several threads.

One thread copies about 10 GB/s into pinned memory, less than a GPU fetches over PCIe, so that pinning alone would take
longer than the step that it should hide behind. `Tensor.pin_memory` uses one thread, or as many as there are cores if
torch's own threads are not limited, and these spin afterwards. And a whole pinned batch goes through the host's memory
twice more; buffers of a few MB that are used again and again stay in the processor's cache.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

__all__ = ["StagedCopier", "num_copiers"]

# Smaller tensors are copied faster than they are handed to threads.
_SPLIT_BYTES = 4 * 2**20
_MAX_COPIERS = 8
# Of a buffer; each thread fills one while the device reads its other one.
CHUNK_BYTES = 2 * 2**20
_BUFFERS = 2


@dataclass(slots=True)
class _Buffer:
    """Pinned memory, free again once `read` has happened."""

    memory: Tensor
    bytes: np.ndarray[tuple[int], np.dtype[np.uint8]]
    read: torch.Event | None = None


class StagedCopier:
    """Copies tensors to a device; `close` ends its threads. One thread at a time may call it.

    Args:
        device: Where to.
        stream: The stream of the copies; None on a device without streams.
        threads: How many copy at once.
        allocate: Makes a buffer of a number of bytes; pinned memory when left out.
        chunk_bytes: The size of a buffer.
    """

    def __init__(
        self,
        device: torch.device,
        stream: torch.Stream | None,
        threads: int,
        *,
        allocate: Callable[[int], Tensor] | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._device = device
        self._stream = stream
        self._threads = threads
        self._allocate = allocate or _pinned
        self._chunk = chunk_bytes
        self._pool = ThreadPoolExecutor(threads, "paceline-pin", initializer=self._select_device)
        self._buffers: list[list[_Buffer]] = []

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers."""
        return self._threads * _BUFFERS * self._chunk

    def copy(self, tensor: Tensor) -> Tensor:
        """Copy a tensor; the host is through with it on return, the device once the stream has come here.

        Args:
            tensor: On the CPU.

        Returns:
            Its copy on the device.
        """
        with self._on_stream():
            if tensor.nbytes < _SPLIT_BYTES or not _is_plain(tensor):
                return self._copy_whole(tensor)
            copy = torch.empty_like(tensor, device=self._device)
        self._copy_chunks(tensor, copy)
        return copy

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _copy_whole(self, tensor: Tensor) -> Tensor:
        pinned = tensor
        if self._stream is not None:
            pinned = torch.empty_like(tensor, pin_memory=True, requires_grad=False).copy_(tensor)
        return pinned.to(self._device, non_blocking=True, copy=True)

    def _copy_chunks(self, tensor: Tensor, copy: Tensor) -> None:
        while len(self._buffers) < self._threads:
            self._buffers.append([self._make_buffer() for _ in range(_BUFFERS)])
        # As bytes, which numpy copies for every dtype, without the lock of the interpreter and torch's threads.
        source = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        target = copy.reshape(-1).view(torch.uint8)
        starts = range(0, len(source), self._chunk)
        jobs = [
            self._pool.submit(self._copy_some, source, target, starts[i :: self._threads], buffers)
            for i, buffers in enumerate(self._buffers)
        ]
        errors = [job.exception() for job in jobs]
        for error in errors:
            if error is not None:
                raise error

    def _copy_some(
        self,
        source: np.ndarray[tuple[int], np.dtype[np.uint8]],
        target: Tensor,
        starts: Iterable[int],
        buffers: list[_Buffer],
    ) -> None:
        with self._on_stream():
            for number, start in enumerate(starts):
                buffer = buffers[number % _BUFFERS]
                if buffer.read is not None:
                    buffer.read.synchronize()
                part = source[start : start + self._chunk]
                np.copyto(buffer.bytes[: len(part)], part)
                target[start : start + len(part)].copy_(buffer.memory[: len(part)], non_blocking=True)
                if buffer.read is not None:
                    buffer.read.record(self._stream)

    def _make_buffer(self) -> _Buffer:
        memory = self._allocate(self._chunk)
        event = None if self._stream is None else torch.Event(device=self._device)
        return _Buffer(memory, memory.numpy(), event)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else self._stream

    def _select_device(self) -> None:
        # Each thread has a current device of its own.
        if self._stream is not None and self._device.index is not None:
            torch.accelerator.set_device_index(self._device.index)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's values are the bytes at its address, in order."""
    is_lazy = tensor.is_conj() or tensor.is_neg()
    return type(tensor) is Tensor and tensor.is_contiguous() and not (is_lazy or tensor.requires_grad)


def num_copiers(num_devices: int) -> int:
    """How many threads of a rank copy, so that the ranks of a machine do not compete for its cores.

    Args:
        num_devices: Accelerators of this machine, each with a rank.

    Returns:
        From 1 to 8.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MAX_COPIERS, cores // (2 * max(1, num_devices))))
