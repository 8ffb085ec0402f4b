"""Weights and whole training states on disk."""

from paceline.checkpoint.alone import write_checkpoint
from paceline.checkpoint.folder import (
    Checkpoint,
    Found,
    find_checkpoints,
    find_foreign,
    newest_checkpoint,
    next_number,
    open_checkpoint,
    rank_document,
)
from paceline.checkpoint.manifest import Manifest
from paceline.checkpoint.parts import Part, Slot
from paceline.checkpoint.plain import from_plain, to_plain
from paceline.checkpoint.saver import Saver
from paceline.checkpoint.weights import parse_size, save_weights

__all__ = [
    "Checkpoint",
    "Found",
    "Manifest",
    "Part",
    "Saver",
    "Slot",
    "find_checkpoints",
    "find_foreign",
    "from_plain",
    "newest_checkpoint",
    "next_number",
    "open_checkpoint",
    "parse_size",
    "rank_document",
    "save_weights",
    "to_plain",
    "write_checkpoint",
]
