"""Weights from host memory or disk to a device: read by several threads, copied on a stream of their own."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any

import numpy as np
import torch

from paceline.environment.host import core_count, host_memory
from paceline.placement.weight_file import FileSlice, tensor_bytes

__all__ = ["DeviceQueue", "PinnedMemory", "Segment", "Transfers", "pack"]

logger = logging.getLogger(__name__)

# A tensor in a packed block begins at a multiple of this, as in torch's own allocator.
_ALIGNMENT = 256
# What one thread reads and copies at a time: large enough for full bandwidth, small enough to overlap.
_PIECE = 16 * 2**20
# torch rounds pinned memory up to a power of two: blocks of that size waste nothing.
_PINNED_BLOCK = 256 * 2**20
# Of the host memory that is free when the first weight is pinned.
_PINNED_PART = 0.6
_MAX_THREADS = 8

Source = torch.Tensor | FileSlice


@dataclass(frozen=True, slots=True)
class Segment:
    """A tensor's place in a packed block.

    Attributes:
        source: Its values.
        start: Where its bytes begin in the block.
        nbytes: How many they are.
        dtype: Its dtype.
        shape: Its shape.
    """

    source: Source
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def view(self, block: torch.Tensor) -> torch.Tensor:
        """Return the tensor in a block of bytes."""
        return block[self.start : self.start + self.nbytes].view(self.dtype).view(self.shape)

    def read_into(self, memory: memoryview, start: int) -> None:
        """Fill memory with the tensor's bytes from a position in it on."""
        if isinstance(self.source, FileSlice):
            self.source.read_into(memory, start)
        else:
            np.copyto(np.frombuffer(memory, np.uint8), tensor_bytes(self.source)[start : start + len(memory)])


def pack(sources: Iterable[Source]) -> tuple[list[Segment], int]:
    """Lay tensors out in one block.

    Returns:
        The place of each, and the bytes of the block.
    """
    segments, end = [], 0
    for source in sources:
        nbytes = prod(source.shape) * source.dtype.itemsize
        value = source.contiguous() if isinstance(source, torch.Tensor) else source
        segments.append(Segment(value, end, nbytes, source.dtype, tuple(source.shape)))
        end += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    return segments, end


class DeviceQueue:
    """Copies to one device, in order, beside its computation. On the CPU every copy is done at once.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = None
        self._stream: Any = None
        if device.type == "cuda":
            self._module = torch.get_device_module(device)
            self._stream = self._module.Stream(device)
            # Streams come from a pool, with the memory of their last user, with which something may still compute.
            self._stream.wait_stream(self._module.current_stream(device))

    def current(self) -> AbstractContextManager[Any]:
        """Make this queue's stream torch's current one, for a block."""
        context: AbstractContextManager[Any] = (
            nullcontext() if self._stream is None else self._module.stream(self._stream)
        )
        return context

    def mark(self) -> Any:
        """Return a mark after the copies so far; None where they are done."""
        return None if self._stream is None else self._stream.record_event()

    def mark_computation(self) -> Any:
        """Return a mark after the computation so far."""
        return None if self._stream is None else self._module.current_stream(self.device).record_event()

    def wait_for(self, mark: Any) -> None:
        """Let the copies that come wait for a mark."""
        if mark is not None:
            self._stream.wait_event(mark)

    def let_computation_wait(self, mark: Any) -> None:
        """Let the computation that comes wait for a mark."""
        if mark is not None:
            self._module.current_stream(self.device).wait_event(mark)

    def keep_for_computation(self, block: torch.Tensor) -> None:
        """Let memory be used again only when the computation at the time of its release has ended.

        Needed where somebody else may keep it, such as autograd.
        """
        if self._stream is not None:
            block.record_stream(self._module.current_stream(self.device))


class PinnedMemory:
    """Page-locked host memory for weights that stay: from there a device copies at full speed, by itself.

    Args:
        limit: The most bytes to lock; by default a part of what is free.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._free = 0

    def take(self, nbytes: int) -> torch.Tensor | None:
        """Return memory for some bytes; None if the limit does not allow it."""
        if self._limit is None:
            self._limit = int(host_memory()[0] * _PINNED_PART)
        if nbytes > self._free:
            size = max(_PINNED_BLOCK, 1 << (nbytes - 1).bit_length())
            if self._used + size > self._limit:
                return None
            block = pinned(size)
            if block is None:
                self._limit = 0
                return None
            self._used += size
            if size - nbytes < self._free:  # a large one by itself: the block in use has more left
                return block[:nbytes]
            self._block, self._free = block, size
        start = len(self._block) - self._free
        self._free -= nbytes
        return self._block[start : start + nbytes]


def pinned(nbytes: int) -> torch.Tensor | None:
    """Return page-locked memory; None if the system gives none."""
    if not torch.cuda.is_available():
        return torch.empty(nbytes, dtype=torch.uint8)
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        logger.warning("%d bytes of host memory cannot be page-locked (%s); copies are slower.", nbytes, reason)
        return None


class _Slot:
    """Memory that pieces pass through on their way to the device."""

    def __init__(self) -> None:
        block = pinned(_PIECE)
        self.memory = torch.empty(_PIECE, dtype=torch.uint8) if block is None else block
        self.copied: Any = None

    def wait_until_free(self) -> None:
        """Wait until the last copy out of it has ended."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None


class Transfers:
    """Threads that read pieces of weights and send them to devices."""

    def __init__(self) -> None:
        self._threads = min(_MAX_THREADS, core_count())

    def __deepcopy__(self, _memo: dict[int, Any]) -> Transfers:
        return Transfers()

    def __reduce__(self) -> tuple[Any, ...]:
        return Transfers, ()

    @cached_property
    def _jobs(self) -> queue.SimpleQueue[Callable[[], None] | None]:
        """What the threads have to do; they end when nobody has this object any more."""
        jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        for number in range(self._threads):
            name = f"paceline-weights-{number}"
            threading.Thread(target=_work, args=(jobs,), name=name, daemon=True).start()
        weakref.finalize(self, _end_threads, jobs, self._threads)
        return jobs

    @cached_property
    def _slots(self) -> queue.SimpleQueue[_Slot]:
        slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _ in range(self._threads + 2):
            slots.put(_Slot())
        return slots

    def start(
        self,
        segments: Sequence[Segment],
        target: DeviceQueue,
        block: torch.Tensor,
        staging: torch.Tensor | None = None,
    ) -> Transfer:
        """Begin to fill a block on a device.

        Args:
            segments: The tensors of the block.
            target: The queue of the device.
            block: Memory on the device.
            staging: Host memory of the same size that keeps the bytes; by default they pass through.
        """
        pieces = list(_pieces(segments, block.numel()))
        transfer = Transfer(target, len(pieces))
        slots = self._slots if staging is None else None
        for piece in pieces:
            self._jobs.put(partial(_run_piece, piece, transfer, block, staging, slots))
        return transfer


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """Do jobs until there is an empty one. Runs in a thread."""
    job = jobs.get()
    while job is not None:
        job()
        del job  # it keeps memory of the device
        job = jobs.get()


def _end_threads(jobs: queue.SimpleQueue[Callable[[], None] | None], count: int) -> None:
    for _ in range(count):
        jobs.put(None)


class Transfer:
    """A block that is on its way to a device.

    Args:
        target: The queue of the device.
        pieces: In how many pieces it comes.
    """

    def __init__(self, target: DeviceQueue, pieces: int = 0) -> None:
        self.target = target
        self._left = pieces
        self._error: BaseException | None = None
        self._mark: Any = None
        self._lock = threading.Lock()
        # None where everything is in the queue already.
        self._sent = threading.Event() if pieces else None
        if not pieces:
            self._mark = target.mark()

    def piece_sent(self, error: BaseException | None) -> None:
        """Note that one piece is in the queue, or could not be read."""
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            if self._left == 0:
                self._mark = self.target.mark()
                assert self._sent is not None
                self._sent.set()

    def wait(self) -> None:
        """Let the computation that comes wait for the block. Raises what went wrong in a thread."""
        if self._sent is not None:
            self._sent.wait()
        if self._error is not None:
            raise self._error
        self.target.let_computation_wait(self._mark)


# Where a piece begins and ends; the parts of tensors in it: the tensor, the first byte in it and in the piece, bytes.
_Piece = tuple[int, int, list[tuple[Segment, int, int, int]]]


def _pieces(segments: Sequence[Segment], nbytes: int) -> Iterator[_Piece]:
    """Cut a block into pieces that one thread handles at a time."""
    for start in range(0, nbytes, _PIECE):
        end = min(start + _PIECE, nbytes)
        parts = []
        for segment in segments:
            first, last = max(segment.start, start), min(segment.start + segment.nbytes, end)
            if first < last:
                parts.append((segment, first - segment.start, first - start, last - first))
        yield start, end, parts


def _run_piece(
    piece: _Piece,
    transfer: Transfer,
    block: torch.Tensor,
    staging: torch.Tensor | None,
    slots: queue.SimpleQueue[_Slot] | None,
) -> None:
    """Read a piece and put its copy into the device's queue. Runs in a thread."""
    error = None
    slot = None
    try:
        start, end, parts = piece
        if slots is None:
            assert staging is not None
            host = staging[start:end]
        else:
            slot = slots.get()
            slot.wait_until_free()
            host = slot.memory[: end - start]
        memory = memoryview(host.numpy())  # type: ignore[arg-type]
        for segment, offset, position, length in parts:
            segment.read_into(memory[position : position + length], offset)
        with transfer.target.current(), torch.no_grad():
            block[start:end].copy_(host, non_blocking=True)
        if slot is not None:
            slot.copied = transfer.target.mark()
    except BaseException as caught:  # it is raised where the weights are needed
        error = caught
    finally:
        if slot is not None and slots is not None:
            slots.put(slot)
        transfer.piece_sent(error)
