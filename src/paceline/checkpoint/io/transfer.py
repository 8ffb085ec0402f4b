"""Moving pieces between a device and a file: in several threads, through a few host buffers."""

from __future__ import annotations

import queue
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from paceline.checkpoint.io.planning import PIECE_BYTES
from paceline.collectives import as_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

__all__ = ["HostBuffers", "bytes_of", "in_threads"]

T = TypeVar("T")
R = TypeVar("R")
_SMALL = 1024**2


class HostBuffers:
    """A few buffers of one piece each, allocated when first needed and reused.

    Args:
        count: How many pieces are moved at a time.
    """

    def __init__(self, count: int) -> None:
        self._free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(None)

    @contextmanager
    def of_size(self, nbytes: int) -> Iterator[tuple[Tensor, memoryview]]:
        """Lend `nbytes` bytes of host memory: as a uint8 tensor [nbytes], and as a writable view of it."""
        buffer = self._free.get()
        try:
            if buffer is None or buffer.numel() < nbytes:
                # A GPU copies to and from pinned memory at full speed.
                pin = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
                size = _SMALL
                if nbytes > _SMALL:
                    size = max(nbytes, PIECE_BYTES)
                buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
            lent = buffer[:nbytes]
            yield lent, bytes_of(lent)
        finally:
            self._free.put(buffer)

    @contextmanager
    def on_host(self, values: Tensor) -> Iterator[memoryview]:
        """Lend the bytes of a tensor [n]: its own memory if it is on the host, else a copy."""
        raw = as_bytes(values.contiguous())
        if values.device.type == "cpu":
            yield bytes_of(raw)
            return
        with self.of_size(raw.numel()) as (lent, view):
            lent.copy_(raw)
            yield view


def bytes_of(raw: Tensor) -> memoryview:
    """The memory of a uint8 tensor [n] on the host."""
    array: Any = raw.detach().numpy()
    return memoryview(array)


def in_threads(count: int, name: str, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Call `work` on each item, in `count` threads.

    An executor of `concurrent.futures` refuses work once the main thread has ended, so a background save that is
    still being written then would be lost.

    Returns:
        The results, in the order of the items.

    Raises:
        BaseException: The first failure; items that were not begun by then are skipped.
    """
    results: dict[int, R] = {}
    failures: list[BaseException] = []
    indices = iter(range(len(items)))

    def run() -> None:
        for index in indices:
            if failures:
                return
            try:
                results[index] = work(items[index])
            except BaseException as error:
                failures.append(error)

    threads = [Thread(target=run, name=f"{name}_{number}") for number in range(min(count, len(items)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:
        # The caller closes the files next, so no thread may still use them.
        failures.append(error)
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return [results[index] for index in range(len(items))]
