"""Host memory through which pieces pass between a device and a file."""

from __future__ import annotations

import queue
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint.io.planning import PIECE_BYTES
from paceline.collectives import as_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["HostBuffers", "bytes_of"]


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
