"""How torch.distributed.checkpoint plans over parts: who writes which pieces, and which pieces a rank must read.

A part is one run of a tensor laid out row by row, so to DCP every tensor has one dimension, and a chunk of it is a
piece: at most 32 MiB, the unit that is copied, written, checked and read at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from typing_extensions import override

from paceline.checkpoint.format.layout import TensorShape, dtype_name

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
    from torch.distributed.checkpoint.planner import ReadItem

    from paceline.checkpoint.format.shards import TensorShard

__all__ = ["PIECE_BYTES", "ShardLoadPlanner", "ShardSavePlanner"]

PIECE_BYTES = 32 * 1024**2


class ShardSavePlanner(DefaultSavePlanner):
    """Cuts each rank's parts into pieces, and lets each piece be written once.

    Args:
        disk_owners: For each rank, the lowest rank that sees the same disk; pieces are written once on each disk.
    """

    def __init__(self, disk_owners: Sequence[int]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._disk_owners = disk_owners

    @override
    def set_up_planner(
        self,
        state_dict: Mapping[str, TensorShard],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self._parts = state_dict
        self.is_coordinator = is_coordinator

    @override
    def create_local_plan(self) -> SavePlan:
        items = [_write_item(name, part, *span) for name, part in self._parts.items() for span in _spans(part)]
        shapes = {name: TensorShape(part.shape, dtype_name(part.dtype)) for name, part in self._parts.items()}
        return SavePlan(items, planner_data=shapes)

    @override
    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        # DCP's own plan says whether every element of every tensor is held by some rank.
        plans, metadata = super().create_global_plan(all_plans)
        if any(self._disk_owners):
            plans = self._on_each_disk(all_plans)
        return plans, metadata

    def _on_each_disk(self, plans: Sequence[SavePlan]) -> list[SavePlan]:
        seen: dict[int, set[MetadataIndex]] = {home: set() for home in self._disk_owners}
        chosen = []
        for home, plan in zip(self._disk_owners, plans, strict=True):
            mine = [item for item in plan.items if item.index not in seen[home]]
            seen[home].update(item.index for item in mine)
            chosen.append(replace(plan, items=mine))
        return chosen

    @override
    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """A piece, one dimension, where it is: a view wherever the part's memory allows one."""
        part = self._parts[write_item.index.fqn]
        assert write_item.tensor_data is not None
        start, length = write_item.tensor_data.chunk.offsets[0], write_item.tensor_data.chunk.sizes[0]
        return part.flat().narrow(0, start - part.start, length)


class ShardLoadPlanner(LoadPlanner):
    """Finds the pieces that each part overlaps, however the checkpoint was cut."""

    @override
    def set_up_planner(
        self, state_dict: Mapping[str, TensorShard], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._parts = state_dict
        self._metadata = metadata

    @override
    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, part in self._parts.items():
            held = self._metadata.state_dict_metadata[name]
            assert isinstance(held, TensorStorageMetadata)
            if part.stop > part.start:
                items += create_read_items_for_chunk_list(name, held, [_chunk(part.start, part.stop)])
        return LoadPlan(items)

    @override
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    @override
    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("a checkpoint holds tensors only")

    @override
    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where the elements of an item go: live memory where that is laid out row by row, else a buffer."""
        part, begin, length = self._target(read_item)
        if part.values.is_contiguous():
            return part.values.view(-1).narrow(0, begin - part.start, length)
        return torch.empty(length, dtype=part.dtype)

    @override
    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        part, begin, _ = self._target(read_item)
        if not part.values.is_contiguous():
            part.write(begin, tensor)

    def _target(self, read_item: ReadItem) -> tuple[TensorShard, int, int]:
        part = self._parts[read_item.dest_index.fqn]
        return part, part.start + read_item.dest_offsets[0], read_item.lengths[0]


def _spans(part: TensorShard) -> Iterator[tuple[int, int]]:
    step = max(1, PIECE_BYTES // part.dtype.itemsize)
    for start in range(part.start, part.stop, step):
        yield start, min(start + step, part.stop)


def _chunk(start: int, stop: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size([start]), sizes=torch.Size([stop - start]))


def _write_item(name: str, part: TensorShard, start: int, stop: int) -> WriteItem:
    about: Any = TensorWriteData(
        chunk=_chunk(start, stop),
        properties=TensorProperties(dtype=part.dtype),
        size=torch.Size([part.numel]),
    )
    return WriteItem(MetadataIndex(name, torch.Size([start])), WriteItemType.SHARD, tensor_data=about)
