"""What ranks do together: groups, nested batches, and the operations on them."""

from __future__ import annotations

from paceline.collectives.entries import Evidence, is_plain_entries, is_unclear, maybe_per_sample, tensors_alike
from paceline.collectives.fake import FakeGroup, run_fake_ranks
from paceline.collectives.group import Board, Group, Op, Pending, SoloGroup, TorchGroup
from paceline.collectives.nested import (
    concatenate,
    find_batch_size,
    leaves,
    map_leaves,
    map_tensors,
    send_to_device,
    slice_tensors,
)
from paceline.collectives.operations import (
    Reduction,
    broadcast,
    broadcast_object_list,
    gather,
    gather_object,
    pad_across_processes,
    reduce,
)
from paceline.collectives.samples import BatchCounts, gather_samples
from paceline.collectives.splitting import split_between_processes
from paceline.collectives.turns import main_process_first
from paceline.collectives.wire import as_bytes

__all__ = [
    "BatchCounts",
    "Board",
    "Evidence",
    "FakeGroup",
    "Group",
    "Op",
    "Pending",
    "Reduction",
    "SoloGroup",
    "TorchGroup",
    "as_bytes",
    "broadcast",
    "broadcast_object_list",
    "concatenate",
    "find_batch_size",
    "gather",
    "gather_object",
    "gather_samples",
    "is_plain_entries",
    "is_unclear",
    "leaves",
    "main_process_first",
    "map_leaves",
    "map_tensors",
    "maybe_per_sample",
    "pad_across_processes",
    "reduce",
    "run_fake_ranks",
    "send_to_device",
    "slice_tensors",
    "split_between_processes",
    "tensors_alike",
]
