"""Packs batches that are sent to another rank: tensors as raw bytes after a small pickle."""

from __future__ import annotations

import copyreg
import io
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.collectives import as_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HEADER_BYTES", "PackedBatch", "read_header", "unpack"]

# The header has four integers of 8 bytes: the size of the largest packed batch for any rank, the bytes of the next
# exchange, the size of this pickle, and the number of buffers after it.
HEADER_BYTES = 8 * 4


@dataclass(slots=True)
class PackedBatch:
    """A value in the form that `unpack` restores.

    Attributes:
        pickled: The pickle, without the memory of tensors and arrays.
        buffers: That memory, in the order of the pickle.
        size: Bytes that `write` needs.
    """

    pickled: bytes
    buffers: list[memoryview]
    size: int

    @classmethod
    def of(cls, value: Any) -> PackedBatch:
        """Pack a value; raises what pickling raises."""
        pickle_buffers: list[pickle.PickleBuffer] = []
        into = io.BytesIO()
        pickler = pickle.Pickler(into, protocol=5, buffer_callback=pickle_buffers.append)
        pickler.dispatch_table = _DISPATCH_TABLE
        pickler.dump(value)
        pickled = into.getvalue()
        buffers = [buffer.raw() for buffer in pickle_buffers]
        header_size = HEADER_BYTES + 8 * len(buffers)
        return cls(pickled, buffers, header_size + len(pickled) + sum(buffer.nbytes for buffer in buffers))

    def write(self, into: torch.Tensor, largest: int, following: int) -> None:
        """Write it into a tensor of at least `size` bytes, after the two numbers that `read_header` returns."""
        memory: Any = into.numpy()
        target = memoryview(memory)
        sizes = [buffer.nbytes for buffer in self.buffers]
        header = [largest, following, len(self.pickled), len(self.buffers), *sizes]
        offset = 8 * len(header)
        target[:offset] = np.array(header, dtype=np.int64).tobytes()
        pieces: tuple[Any, ...] = (self.pickled, *self.buffers)
        for piece in pieces:
            target[offset : offset + len(piece)] = piece
            offset += len(piece)


def read_header(data: torch.Tensor) -> tuple[int, int]:
    """Return the size of the largest packed batch of this exchange, and the bytes of the next exchange."""
    largest, following = data[:16].view(torch.int64).tolist()
    return largest, following


def unpack(data: torch.Tensor) -> Any:
    """Return the value of a packed batch; it shares no memory with `data`."""
    memory: Any = data.numpy()
    source = memoryview(memory)
    pickle_size, count = np.frombuffer(source[:HEADER_BYTES], dtype=np.int64).tolist()[2:]
    start = HEADER_BYTES + 8 * count
    sizes = np.frombuffer(source[HEADER_BYTES:start], dtype=np.int64).tolist()
    offset = start + pickle_size
    buffers = []
    for size in sizes:
        # Copied, so that keeping one batch does not keep all that were received with it.
        buffers.append(bytearray(source[offset : offset + size]))
        offset += size
    return pickle.loads(source[start : start + pickle_size], buffers=buffers)


def _reduce_tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    is_dense = tensor.layout is torch.strided and not tensor.requires_grad and not tensor.is_quantized
    if not is_dense or not tensor.numel():
        return tensor.__reduce_ex__(5)  # type: ignore[no-any-return, no-untyped-call]
    data = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    memory: Any = as_bytes(data).numpy()
    buffer = pickle.PickleBuffer(memory)
    return _rebuild_tensor, (buffer, data.dtype, tuple(data.shape))


def _rebuild_tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype).view(shape)


_DISPATCH_TABLE: dict[type, Callable[[Any], Any]] = {**copyreg.dispatch_table, torch.Tensor: _reduce_tensor}
