"""How pieces move between a device and a file: several threads at a time, through a few host buffers."""

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
    """A few buffers of one piece each, made when first needed and handed from one piece to the next.

    Args:
        count: How many pieces are in work at a time.
    """

    def __init__(self, count: int) -> None:
        self._free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(None)

    @contextmanager
    def of_size(self, nbytes: int) -> Iterator[tuple[Tensor, memoryview]]:
        """Lend `nbytes` bytes of host memory: as a tensor [nbytes] of uint8, and as a writable view of it."""
        held = self._free.get()
        try:
            if held is None or held.numel() < nbytes:
                # Pinned where an accelerator is in use: it copies from and to such memory at full speed.
                pin = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
                size = _SMALL if nbytes <= _SMALL else max(nbytes, PIECE_BYTES)
                held = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
            lent = held[:nbytes]
            yield lent, bytes_of(lent)
        finally:
            self._free.put(held)

    @contextmanager
    def on_host(self, values: Tensor) -> Iterator[memoryview]:
        """Lend the bytes of a tensor [n]: its own memory if that is on the host, else a copy."""
        raw = as_bytes(values.contiguous())
        if values.device.type == "cpu":
            yield bytes_of(raw)
            return
        with self.of_size(raw.numel()) as (lent, view):
            lent.copy_(raw)
            yield view


def bytes_of(raw: Tensor) -> memoryview:
    """The memory of a host tensor [n] of uint8."""
    array: Any = raw.detach().numpy()
    return memoryview(array)


def in_threads(count: int, name: str, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Do some work on each item, `count` at a time; return what came of it, in the order of the items.

    A pool of `concurrent.futures` takes no work once the main thread has come to its end, and a save in the
    background that is still being written then would be lost.

    Raises:
        BaseException: The first failure; what was not begun by then is left.
    """
    done: dict[int, R] = {}
    failures: list[BaseException] = []
    waiting = iter(range(len(items)))

    def take() -> None:
        for index in waiting:
            if failures:
                return
            try:
                done[index] = work(items[index])
            except BaseException as error:
                failures.append(error)

    threads = [Thread(target=take, name=f"{name}_{number}") for number in range(min(count, len(items)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:
        # Whoever interrupts this closes the files next, which nobody may use by then.
        failures.append(error)
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return [done[index] for index in range(len(items))]
