"""Copies batches to the device, one batch ahead if the device has streams."""

from __future__ import annotations

import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from paceline.collectives.nested import leaves, map_tensors, send_to_device
from paceline.data.pinning import BUFFER_BYTES, NUM_BUFFERS, StagedCopier, num_copiers

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DevicePrefetcher"]

_NONE: Any = object()

# A copy of up to this many bytes from pageable memory is staged by the driver and returns at once (CUDA runtime API,
# "API synchronization behavior"), so pinning and a separate stream would cost more than they hide: about 0.1 ms of host
# time per batch on an H200 machine.
_SMALL = 64 * 1024

# Of batches that are pinned here, this many are on the device at most: the host may be many steps ahead of the device,
# and would fill its memory with batches whose turn is far off.
_MAX_ON_DEVICE = 5


@dataclass(frozen=True, slots=True)
class _Copied:
    """A batch on the device, complete once `event` has happened; without one, in the order of the current stream."""

    batch: Any
    event: torch.Event | None


class DevicePrefetcher:
    """Copies batches to a device; with a CPU device they are passed through unchanged.

    On an accelerator the next batch is copied from pinned memory on a separate stream while the current one is in use.
    If it is not pinned, a thread copies it through pinned buffers. Reading a batch, which runs code of the user, stays
    in the thread that iterates, and waits until the host is through with the batch before: a data set may use its
    memory again.

    Small batches are copied on the current stream. So are batches with other objects than dense tensors that have a
    method `to`, because the tensors inside them cannot be recorded on another stream.

    Args:
        device: The target device.
        non_blocking: Whether the host continues during a copy.
    """

    def __init__(self, device: torch.device, *, non_blocking: bool) -> None:
        self._device = device
        self._non_blocking = non_blocking
        self._stream = None if device.type == "cpu" else _maybe_stream(device)
        # Of the largest batch so far that was copied ahead, and of the largest that was pinned here.
        self._copied_bytes = self._pinned_bytes = 0
        self._thread: _CopyThread | None = None

    def iterate(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the same batches on the device."""
        if self._device.type == "cpu":
            return batches
        if self._stream is None:
            return (send_to_device(batch, self._device, self._non_blocking) for batch in batches)
        return self._ahead(batches, self._stream)

    def describe(self) -> str:
        """Describe how batches reach the device, with the memory that this takes once batches have been seen."""
        if self._stream is None:
            return f"copied to {self._device} when they are used"
        text = f"copied to {self._device} one batch ahead, on a separate stream"
        if not self._copied_bytes:
            return text
        if not self._pinned_bytes:
            return f"{text} ({self._copied_bytes / 1e6:,.1f} MB each)"
        on_device = _MAX_ON_DEVICE * self._pinned_bytes / 1e6
        return (
            f"{text}, by a thread through pinned memory ({self._pinned_bytes / 1e6:,.1f} MB each; "
            f"{NUM_BUFFERS * BUFFER_BYTES / 1e6:,.0f} MB pinned, up to {on_device:,.0f} MB on the device)"
        )

    def _ahead(self, batches: Iterator[Any], stream: torch.Stream) -> Iterator[Any]:
        used = _UsedBatches(self._device)
        following = None
        try:
            ready = self._start(next(batches, _NONE), stream, used)
            while ready is not None:
                # The copy of the next batch is queued before this one is yielded.
                if isinstance(ready, Future):
                    ready.result()
                following = self._start(next(batches, _NONE), stream, used)
                yield self._finish(ready)
                used.note()
                ready = following
        finally:
            if isinstance(following, Future) and not following.cancel():
                # The thread reads memory of the data set's.
                wait([following])

    def _start(self, batch: Any, stream: torch.Stream, used: _UsedBatches) -> _Copied | Future[_Copied] | None:
        if batch is _NONE:
            return None
        size = 0
        needs_pinning = False
        for _, leaf in leaves(batch):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                size += leaf.nbytes
                is_pageable = self._non_blocking and leaf.device.type == "cpu" and leaf.nbytes > 0
                needs_pinning = needs_pinning or (is_pageable and not leaf.is_pinned())
            elif hasattr(leaf, "to"):
                return self._copied_now(batch)
        if size <= _SMALL:
            return self._copied_now(batch)
        self._copied_bytes = max(size, self._copied_bytes)
        if needs_pinning:
            self._pinned_bytes = max(size, self._pinned_bytes)
            return self._through_pinned_memory(batch, stream, used)
        with stream:
            return _Copied(map_tensors(self._copy, batch), stream.record_event())

    def _through_pinned_memory(self, batch: Any, stream: torch.Stream, used: _UsedBatches) -> Future[_Copied]:
        if self._thread is None:
            self._thread = _copy_thread(self._device, stream)
        return self._thread.copy(batch, used.oldest())

    def _copied_now(self, batch: Any) -> _Copied:
        return _Copied(send_to_device(batch, self._device, self._non_blocking), None)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=self._non_blocking)

    def _finish(self, started: _Copied | Future[_Copied]) -> Any:
        copied = started.result() if isinstance(started, Future) else started
        batch = copied.batch
        if copied.event is None:
            return batch
        current = torch.accelerator.current_stream(self._device)
        current.wait_event(copied.event)
        for _, leaf in leaves(batch):
            # The memory belongs to the copy stream, which could reuse it while it is still read here.
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self._device.type:
                leaf.record_stream(current)
        return batch


class _UsedBatches:
    """When the device was through with the last batches of one iteration, so that no more lie on it than allowed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: deque[torch.Event] = deque(maxlen=_MAX_ON_DEVICE - 1)
        self._counts = False

    def note(self) -> None:
        """Note that everything which uses the batch yielded last is queued on the device."""
        if self._counts:
            self._events.append(torch.accelerator.current_stream(self._device).record_event())

    def oldest(self) -> torch.Event | None:
        """What must have happened before another batch is copied; None if there is room. Counts from now on."""
        self._counts = True
        return self._events[0] if len(self._events) == self._events.maxlen else None


class _CopyThread:
    """Copies batches from ordinary memory to a device, for all loaders of the process.

    Starting the thread and pinning its buffers takes 30 to 70 ms, so it stays as long as one of them.
    """

    def __init__(self, device: torch.device, stream: torch.Stream) -> None:
        self._device = device
        self._stream = stream
        self._copier = StagedCopier(device, stream, num_copiers(torch.accelerator.device_count()))
        # Not a method: the thread would keep this object.
        self._executor = ThreadPoolExecutor(1, "paceline-copy", initializer=_select_device, initargs=(device,))
        weakref.finalize(self, _end_copies, self._executor, self._copier).atexit = False

    def copy(self, batch: Any, before: torch.Event | None) -> Future[_Copied]:
        """Copy a batch after those before it, and after an event."""
        return self._executor.submit(self._copy, batch, before)

    def _copy(self, batch: Any, before: torch.Event | None) -> _Copied:
        if before is not None:
            before.synchronize()
        with self._stream:
            return _Copied(map_tensors(self._copy_tensor, batch), self._stream.record_event())

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu" and tensor.nbytes and not tensor.is_pinned():
            return self._copier.copy(tensor)
        return tensor.to(self._device, non_blocking=True)


_copy_threads: weakref.WeakValueDictionary[torch.device, _CopyThread] = weakref.WeakValueDictionary()


def _copy_thread(device: torch.device, stream: torch.Stream) -> _CopyThread:
    """The thread that copies to a device, started if nobody has it yet."""
    thread = _copy_threads.get(device)
    if thread is None:
        thread = _copy_threads[device] = _CopyThread(device, stream)
    return thread


def _select_device(device: torch.device) -> None:
    # Each thread has a current device of its own, and pinning would begin to use the first one.
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)


def _end_copies(executor: ThreadPoolExecutor, copier: StagedCopier) -> None:
    # Not waited for: the last reference may be the thread's own.
    executor.shutdown(wait=False)
    copier.close()


def _maybe_stream(device: torch.device) -> torch.Stream | None:
    try:
        stream = torch.Stream(device=device)
        stream.record_event()
        return stream
    except (RuntimeError, NotImplementedError):
        return None
