"""Collectives on nested batches, over groups of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.environment.lazy_names import lazy_attributes

if TYPE_CHECKING:
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
    from paceline.collectives.per_sample import (
        SampleEvidence,
        is_ambiguous,
        is_entry_list,
        is_uniform_tensor_tuple,
        maybe_per_sample,
    )
    from paceline.collectives.process_order import main_process_first
    from paceline.collectives.samples import BatchCounts, gather_samples
    from paceline.collectives.splitting import split_between_processes
    from paceline.collectives.transport import as_bytes
else:
    __getattr__, _ = lazy_attributes(
        __name__,
        {
            "fake": "FakeGroup run_fake_ranks",
            "group": "Board Group Op Pending SoloGroup TorchGroup",
            "nested": "concatenate find_batch_size leaves map_leaves map_tensors send_to_device slice_tensors",
            "operations": "Reduction broadcast broadcast_object_list gather gather_object pad_across_processes reduce",
            "per_sample": "SampleEvidence is_ambiguous is_entry_list is_uniform_tensor_tuple maybe_per_sample",
            "process_order": "main_process_first",
            "samples": "BatchCounts gather_samples",
            "splitting": "split_between_processes",
            "transport": "as_bytes",
        },
    )

__all__ = [
    "BatchCounts",
    "Board",
    "FakeGroup",
    "Group",
    "Op",
    "Pending",
    "Reduction",
    "SampleEvidence",
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
    "is_ambiguous",
    "is_entry_list",
    "is_uniform_tensor_tuple",
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
]
