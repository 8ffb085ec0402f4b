"""Folders with weights alone, as `save_model` and transformers' `save_pretrained` write them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.checkpoint.foreign.accelerate import read_weight_files
from paceline.checkpoint.portable_state import ForeignState, Tensors

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["is_weights", "read_weights"]

_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def is_weights(folder: Path) -> bool:
    """Whether a folder holds a model's weights."""
    return any((folder / name).is_file() for name in _NAMES)


def read_weights(folder: Path) -> ForeignState:
    """Read such a folder.

    Raises:
        CheckpointError: A file in it cannot be read.
    """
    path = next(path for name in _NAMES if (path := folder / name).is_file())
    return ForeignState(kind="weights", folder=folder, weights=Tensors(read_weight_files(path)))
