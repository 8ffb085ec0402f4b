"""Planners for torch.distributed.checkpoint: which rank writes which pieces, and which pieces a rank must read.

A shard is a contiguous range of a tensor in row-major order, so to DCP every tensor has one dimension, and a chunk of
it is a piece: at most 32 MiB, the unit that is copied, written, checked and read at once.
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
    """Splits each rank's shards into pieces, and has each piece written once.

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
        self._shards = state_dict
        self.is_coordinator = is_coordinator

    @override
    def create_local_plan(self) -> SavePlan:
        items = [_write_item(name, shard, *span) for name, shard in self._shards.items() for span in _spans(shard)]
        shapes = {name: TensorShape(shard.shape, dtype_name(shard.dtype)) for name, shard in self._shards.items()}
        return SavePlan(items, planner_data=shapes)

    @override
    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        # DCP's own plan checks that the ranks have every element of every tensor.
        plans, metadata = super().create_global_plan(all_plans)
        if any(self._disk_owners):
            plans = self._on_each_disk(all_plans)
        return plans, metadata

    def _on_each_disk(self, plans: Sequence[SavePlan]) -> list[SavePlan]:
        assigned: dict[int, set[MetadataIndex]] = {disk: set() for disk in self._disk_owners}
        reduced = []
        for disk, plan in zip(self._disk_owners, plans, strict=True):
            items = [item for item in plan.items if item.index not in assigned[disk]]
            assigned[disk].update(item.index for item in items)
            reduced.append(replace(plan, items=items))
        return reduced

    @override
    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """A piece [n] where it is: a view if the shard's memory allows, else a copy."""
        shard = self._shards[write_item.index.fqn]
        assert write_item.tensor_data is not None
        start, length = write_item.tensor_data.chunk.offsets[0], write_item.tensor_data.chunk.sizes[0]
        return shard.flat().narrow(0, start - shard.start, length)


class ShardLoadPlanner(LoadPlanner):
    """Finds the pieces that each shard overlaps, however the checkpoint was sharded."""

    @override
    def set_up_planner(
        self, state_dict: Mapping[str, TensorShard], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._shards = state_dict
        self._metadata = metadata

    @override
    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, shard in self._shards.items():
            entry = self._metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            if shard.stop > shard.start:
                items += create_read_items_for_chunk_list(name, entry, [_chunk(shard.start, shard.stop)])
        return LoadPlan(items)

    @override
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    @override
    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("DCP reads only tensors from a checkpoint")

    @override
    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where the elements of an item are read to: live memory if it is contiguous, else a buffer."""
        shard, begin, length = self._target(read_item)
        if shard.values.is_contiguous():
            return shard.values.view(-1).narrow(0, begin - shard.start, length)
        return torch.empty(length, dtype=shard.dtype)

    @override
    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        shard, begin, _ = self._target(read_item)
        if not shard.values.is_contiguous():
            shard.write(begin, tensor)

    def _target(self, read_item: ReadItem) -> tuple[TensorShard, int, int]:
        shard = self._shards[read_item.dest_index.fqn]
        return shard, shard.start + read_item.dest_offsets[0], read_item.lengths[0]


def _spans(shard: TensorShard) -> Iterator[tuple[int, int]]:
    step = max(1, PIECE_BYTES // shard.dtype.itemsize)
    for start in range(shard.start, shard.stop, step):
        yield start, min(start + step, shard.stop)


def _chunk(start: int, stop: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size([start]), sizes=torch.Size([stop - start]))


def _write_item(name: str, shard: TensorShard, start: int, stop: int) -> WriteItem:
    tensor_data: Any = TensorWriteData(
        chunk=_chunk(start, stop),
        properties=TensorProperties(dtype=shard.dtype),
        size=torch.Size([shard.numel]),
    )
    return WriteItem(MetadataIndex(name, torch.Size([start])), WriteItemType.SHARD, tensor_data=tensor_data)
