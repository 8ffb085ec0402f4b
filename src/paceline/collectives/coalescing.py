"""Coalesces collectives: small tensors share one buffer of bytes, large ones are sent separately."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from paceline.collectives.transport import Op, as_bytes, as_contiguous, from_bytes
from paceline.errors import CollectiveError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.collectives.group import Group

# Up to this size latency costs more than bandwidth, so a copy into a shared buffer pays; for larger tensors it would
# only cost memory. Depends on shape and dtype only, so every rank decides the same.
COALESCED_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class CoalescedBuffer:
    """Where several tensors lie in one buffer of bytes.

    Attributes:
        shapes: Of each tensor.
        dtypes: Of each tensor.
        order: Indices of the tensors, in the order of the buffer.
        offsets: The first byte of each tensor.
        total: Bytes of the buffer.
    """

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    order: tuple[int, ...]
    offsets: tuple[int, ...]
    total: int

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> CoalescedBuffer:
        """Lay the tensors out, widest dtype first, so that each begins at a multiple of its element size."""
        offsets = [0] * len(tensors)
        end = 0
        order = sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)
        for index in order:
            offsets[index] = end
            end += tensors[index].nbytes
        widest = max(tensor.itemsize for tensor in tensors)
        total = -(-end // widest) * widest
        shapes = tuple(tensor.shape for tensor in tensors)
        dtypes = tuple(tensor.dtype for tensor in tensors)
        return cls(shapes, dtypes, tuple(order), tuple(offsets), total)

    def pack(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Copy the tensors into one buffer, [total]."""
        parts = [as_bytes(as_contiguous(tensors[index])) for index in self.order]
        rest = self.total - sum(part.numel() for part in parts)
        return torch.cat([*parts, parts[0].new_zeros(rest)])

    def unpack(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """View a buffer, [..., total], as the tensors, [..., *shape]."""
        leading_dims = buffer.shape[:-1]
        pieces = []
        for shape, dtype, offset in zip(self.shapes, self.dtypes, self.offsets, strict=True):
            piece = buffer[..., offset : offset + shape.numel() * dtype.itemsize]
            pieces.append(from_bytes(piece, dtype).reshape((*leading_dims, *shape)))
        return pieces


def all_gather_coalesced(group: Group, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gather each tensor as `Group.all_gather` does, [size, *shape], in few exchanges.

    Collective: every rank must call it.
    """
    results: list[torch.Tensor | None] = [None] * len(tensors)
    batches = _batches(tensors)
    packings = [CoalescedBuffer.of([tensors[i] for i in batch]) for batch in batches]
    pending = [
        group.start_all_gather(tensors[batch[0]] if len(batch) == 1 else packing.pack([tensors[i] for i in batch]))
        for batch, packing in zip(batches, packings, strict=True)
    ]
    for batch, packing, handle in zip(batches, packings, pending, strict=True):
        gathered = handle.wait()
        pieces = [gathered] if len(batch) == 1 else packing.unpack(gathered)
        for index, piece in zip(batch, pieces, strict=True):
            results[index] = piece
    return [result for result in results if result is not None]


def broadcast_coalesced(group: Group, tensors: Sequence[torch.Tensor], source: int) -> None:
    """Overwrite each tensor with that of rank `source`. Collective: every rank must call it."""
    for batch in _batches(tensors):
        if len(batch) == 1:
            group.broadcast(tensors[batch[0]], source)
            continue
        members = [tensors[i] for i in batch]
        packing = CoalescedBuffer.of(members)
        buffer = group.broadcast(packing.pack(members), source)
        if group.rank != source:
            for tensor, piece in zip(members, packing.unpack(buffer), strict=True):
                tensor.detach().copy_(piece)


def all_reduce_coalesced(group: Group, tensors: Sequence[torch.Tensor], op: Op) -> list[torch.Tensor]:
    """Reduce each tensor over the ranks into a new one, in one exchange per dtype and device.

    Collective: every rank must call it.
    """
    results: list[torch.Tensor | None] = [None] * len(tensors)
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        check_dense(tensor)
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(index)
    for batch in by_kind.values():
        flat = torch.cat([as_contiguous(tensors[i]).view(-1) for i in batch])
        parts = torch.split(group.all_reduce(flat, op), [tensors[i].numel() for i in batch])
        for index, part in zip(batch, parts, strict=True):
            # Cloned, so that a small result does not keep the whole buffer alive.
            result = part
            if len(batch) != 1:
                result = part.clone()
            results[index] = result.view(tensors[index].shape)
    return [result for result in results if result is not None]


def check_dense(tensor: torch.Tensor) -> None:
    """Raise `CollectiveError` for a sparse or nested tensor."""
    if tensor.layout != torch.strided or tensor.is_nested:
        raise CollectiveError(
            f"A collective got a tensor of layout {tensor.layout}",
            "Only dense tensors have the same number of elements on every rank",
            "Call to_dense() or to_padded_tensor() first",
        )


def _batches(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Return lists of tensors, by index, that are sent in one exchange."""
    coalesced: dict[torch.device, list[int]] = {}
    separate: list[list[int]] = []
    for index, tensor in enumerate(tensors):
        check_dense(tensor)
        if tensor.nbytes > COALESCED_BYTES:
            separate.append([index])
        else:
            coalesced.setdefault(tensor.device, []).append(index)
    return [*coalesced.values(), *separate]
