"""Packs batches for the journey to another rank: tensors as plain bytes beside a small pickle."""

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

__all__ = ["HEAD", "Parcel", "read_head", "unpack"]

# How many numbers of 8 bytes come first: the size of the largest parcel to any rank, how many bytes the next exchange
# takes, the size of this one's pickle, and how many buffers follow it.
NUMBERS = 4
HEAD = 8 * NUMBERS


@dataclass(slots=True)
class Parcel:
    """A value, packed: what `unpack` makes it from.

    Attributes:
        text: The pickle.
        buffers: Memory of tensors and arrays, in the order of the pickle.
        size: Bytes that `write` needs.
    """

    text: bytes
    buffers: list[memoryview]
    size: int

    @classmethod
    def of(cls, value: Any) -> Parcel:
        """Pack a value; raises what pickling raises."""
        found: list[pickle.PickleBuffer] = []
        into = io.BytesIO()
        pickler = pickle.Pickler(into, protocol=5, buffer_callback=found.append)
        pickler.dispatch_table = _TABLE
        pickler.dump(value)
        text = into.getvalue()
        buffers = [buffer.raw() for buffer in found]
        return cls(text, buffers, HEAD + 8 * len(buffers) + len(text) + sum(buffer.nbytes for buffer in buffers))

    def write(self, into: torch.Tensor, largest: int, following: int) -> None:
        """Write it into a tensor of bytes, at least `size`, behind two numbers that `read_head` returns."""
        memory: Any = into.numpy()
        place = memoryview(memory)
        numbers = [largest, following, len(self.text), len(self.buffers), *[buffer.nbytes for buffer in self.buffers]]
        at = 8 * len(numbers)
        place[:at] = np.array(numbers, dtype=np.int64).tobytes()
        pieces: tuple[Any, ...] = (self.text, *self.buffers)
        for piece in pieces:
            place[at : at + len(piece)] = piece
            at += len(piece)


def read_head(data: torch.Tensor) -> tuple[int, int]:
    """Return the size of the largest parcel that was sent along with the one that begins here, and of what follows."""
    largest, following = data[:16].view(torch.int64).tolist()
    return largest, following


def unpack(data: torch.Tensor) -> Any:
    """Return the value of a parcel; it shares no memory with `data`."""
    memory: Any = data.numpy()
    place = memoryview(memory)
    text, count = np.frombuffer(place[:HEAD], dtype=np.int64).tolist()[2:]
    at = HEAD + 8 * count
    sizes = np.frombuffer(place[HEAD:at], dtype=np.int64).tolist()
    start, at = at, at + text
    buffers = []
    for size in sizes:
        # Copied: who keeps one batch would otherwise keep all that came with it.
        buffers.append(bytearray(place[at : at + size]))
        at += size
    return pickle.loads(place[start : start + text], buffers=buffers)


def _reduce_tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    plain = tensor.layout is torch.strided and not tensor.requires_grad and not tensor.is_quantized
    if not plain or not tensor.numel():
        return tensor.__reduce_ex__(5)  # type: ignore[no-any-return, no-untyped-call]
    data = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    memory: Any = as_bytes(data).numpy()
    buffer = pickle.PickleBuffer(memory)
    return _tensor, (buffer, data.dtype, tuple(data.shape))


def _tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype).view(shape)


_TABLE: dict[type, Callable[[Any], Any]] = {**copyreg.dispatch_table, torch.Tensor: _reduce_tensor}
