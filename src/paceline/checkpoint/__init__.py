"""Weights and complete training states on disk."""

from paceline.checkpoint.catalog import (
    CatalogEntry,
    find_checkpoints,
    find_foreign,
    is_foreign_state,
    newest_checkpoint,
)
from paceline.checkpoint.folder import Checkpoint, next_number, open_checkpoint, rank_document
from paceline.checkpoint.format.json_state import from_plain, to_plain
from paceline.checkpoint.format.manifest import Manifest, numbered
from paceline.checkpoint.format.shards import Slot, TensorShard
from paceline.checkpoint.io.weights import parse_size, save_weights
from paceline.checkpoint.saver import Saver

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
    "numbered",
    "open_checkpoint",
    "parse_size",
    "rank_document",
    "save_weights",
    "to_plain",
]
