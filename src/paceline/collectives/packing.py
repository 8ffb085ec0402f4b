"""Many tensors in few exchanges: small ones share one buffer of bytes, large ones travel alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from paceline.collectives.wire import Op, as_bytes, from_bytes, plain
from paceline.errors import CollectiveError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.collectives.group import Group

# Up to here an exchange costs latency more than bandwidth, so a copy into a shared buffer pays; a larger
# tensor would only cost that much more memory. Decided by shape and dtype, hence alike on every rank.
PACKED_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Packing:
    """Where each of several tensors lies in one buffer of bytes."""

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    order: tuple[int, ...]
    offsets: tuple[int, ...]
    total: int

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Packing:
        """Lay the tensors out, widest dtype first, so that each begins at a multiple of its item size."""
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
        parts = [as_bytes(plain(tensors[index])) for index in self.order]
        rest = self.total - sum(part.numel() for part in parts)
        return torch.cat([*parts, parts[0].new_zeros(rest)])

    def unpack(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """View a buffer, [..., total], as the tensors, [..., *shape]."""
        lead = buffer.shape[:-1]
        pieces = []
        for shape, dtype, offset in zip(self.shapes, self.dtypes, self.offsets, strict=True):
            piece = buffer[..., offset : offset + shape.numel() * dtype.itemsize]
            pieces.append(from_bytes(piece, dtype).reshape((*lead, *shape)))
        return pieces


def all_gather_many(group: Group, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gather each tensor as `Group.all_gather` does, [size, *shape], in as few exchanges as is sensible.

    Collective: every rank must call it.
    """
    results: list[torch.Tensor | None] = [None] * len(tensors)
    batches = _batches(tensors)
    packings = [Packing.of([tensors[i] for i in batch]) for batch in batches]
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


def broadcast_many(group: Group, tensors: Sequence[torch.Tensor], source: int) -> None:
    """Overwrite each tensor with that of rank `source`. Collective: every rank must call it."""
    for batch in _batches(tensors):
        if len(batch) == 1:
            group.broadcast(tensors[batch[0]], source)
            continue
        members = [tensors[i] for i in batch]
        packing = Packing.of(members)
        buffer = group.broadcast(packing.pack(members), source)
        if group.rank != source:
            for tensor, piece in zip(members, packing.unpack(buffer), strict=True):
                tensor.detach().copy_(piece)


def all_reduce_many(group: Group, tensors: Sequence[torch.Tensor], op: Op) -> list[torch.Tensor]:
    """Reduce each tensor over the ranks into a new one, with one exchange per dtype and device.

    Collective: every rank must call it.
    """
    results: list[torch.Tensor | None] = [None] * len(tensors)
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        check_dense(tensor)
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(index)
    for batch in by_kind.values():
        flat = torch.cat([plain(tensors[i]).view(-1) for i in batch])
        parts = torch.split(group.all_reduce(flat, op), [tensors[i].numel() for i in batch])
        for index, part in zip(batch, parts, strict=True):
            # A clone, so that a small result does not keep the whole buffer alive.
            kept = part if len(batch) == 1 else part.clone()
            results[index] = kept.view(tensors[index].shape)
    return [result for result in results if result is not None]


def check_dense(tensor: torch.Tensor) -> None:
    """Raise `CollectiveError` for a sparse or nested tensor."""
    if tensor.layout != torch.strided or tensor.is_nested:
        raise CollectiveError(
            f"A tensor of layout {tensor.layout} was handed to a collective",
            "Only dense tensors have the same number of elements on every rank",
            "Call to_dense() or to_padded_tensor() first",
        )


def _batches(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Say which tensors, by index, travel together."""
    together: dict[torch.device, list[int]] = {}
    alone: list[list[int]] = []
    for index, tensor in enumerate(tensors):
        check_dense(tensor)
        if tensor.nbytes > PACKED_BYTES:
            alone.append([index])
        else:
            together.setdefault(tensor.device, []).append(index)
    return [*together.values(), *alone]
