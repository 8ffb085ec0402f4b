"""Weights and complete training states on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.environment.lazy_names import lazy_attributes

if TYPE_CHECKING:
    from paceline.checkpoint.catalog import (
        CatalogEntry,
        find_checkpoints,
        find_foreign,
        is_foreign_state,
        newest_checkpoint,
    )
    from paceline.checkpoint.folder import (
        Checkpoint,
        next_number,
        number_of,
        open_checkpoint,
        rank_document,
        real_folder,
        remove_checkpoint,
    )
    from paceline.checkpoint.format.json_state import from_plain, to_plain
    from paceline.checkpoint.format.manifest import Manifest, numbered
    from paceline.checkpoint.format.shards import Slot, TensorShard
    from paceline.checkpoint.io.weights import parse_size, save_weights
    from paceline.checkpoint.saver import Saver
else:
    __getattr__, _ = lazy_attributes(
        __name__,
        {
            "catalog": "CatalogEntry find_checkpoints find_foreign is_foreign_state newest_checkpoint",
            "folder": "Checkpoint next_number number_of open_checkpoint rank_document real_folder remove_checkpoint",
            "format.json_state": "from_plain to_plain",
            "format.manifest": "Manifest numbered",
            "format.shards": "Slot TensorShard",
            "io.weights": "parse_size save_weights",
            "saver": "Saver",
        },
    )

__all__ = [
    "CatalogEntry",
    "Checkpoint",
    "Manifest",
    "Saver",
    "Slot",
    "TensorShard",
    "find_checkpoints",
    "find_foreign",
    "from_plain",
    "is_foreign_state",
    "newest_checkpoint",
    "next_number",
    "number_of",
    "numbered",
    "open_checkpoint",
    "parse_size",
    "rank_document",
    "real_folder",
    "remove_checkpoint",
    "save_weights",
    "to_plain",
]
