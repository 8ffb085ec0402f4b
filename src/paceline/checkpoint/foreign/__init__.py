"""Folders of other libraries: which there are, and what is read out of them. Nothing in them is run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from paceline.checkpoint.conversion import from_checkpoint
from paceline.checkpoint.folder import TRAINING, open_checkpoint, parent_folder_hint
from paceline.checkpoint.foreign.accelerate import is_accelerate, read_accelerate
from paceline.checkpoint.foreign.dcp import is_dcp, read_dcp
from paceline.checkpoint.foreign.deepspeed import is_deepspeed, read_deepspeed
from paceline.checkpoint.foreign.weights import is_weights, read_weights
from paceline.checkpoint.format.manifest import MANIFEST
from paceline.checkpoint.portable_state import ForeignOptimizer, ForeignState, Source, Tensors
from paceline.errors import CheckpointError

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

__all__ = [
    "ForeignOptimizer",
    "ForeignState",
    "Source",
    "Tensors",
    "from_checkpoint",
    "open_any",
    "open_foreign",
    "recognise",
]

# In this order: an Accelerate folder may hold one of DeepSpeed or DCP, and weights are part of all of them.
_FORMATS = {
    "accelerate": is_accelerate,
    "deepspeed": is_deepspeed,
    "dcp": is_dcp,
    "weights": is_weights,
}


def recognise(folder: str | os.PathLike[str]) -> str | None:
    """The format of a folder: `accelerate`, `deepspeed`, `dcp`, `weights`; None for any other, and for our own.

    A checkpoint of ours that lost its manifest is a broken one, not a folder of weights.
    """
    path = Path(folder)
    if not path.is_dir() or (path / MANIFEST).exists() or (path / TRAINING).exists():
        return None
    return next((name for name, looks in _FORMATS.items() if looks(path)), None)


def open_foreign(folder: str | os.PathLike[str], parameters: Sequence[Sequence[str]] | None = None) -> ForeignState:
    """Read a folder that another library wrote.

    Args:
        folder: Of Accelerate, DeepSpeed, torch.distributed.checkpoint, or with weights alone.
        parameters: For each optimizer the names of its parameters, group by group, for formats that number them.

    Raises:
        CheckpointError: It is none of these, cannot be read, or names something that could run.
    """
    path = Path(folder)
    kind = recognise(path)
    if kind is None:
        raise CheckpointError(
            f"{path} is no checkpoint of a known format",
            "Known are folders of Accelerate, of the transformers Trainer, of DeepSpeed, of "
            "torch.distributed.checkpoint, and safetensors files",
            parent_folder_hint(path) or "Name the folder that holds the files themselves",
        )
    if kind == "accelerate":
        return read_accelerate(path, parameters)
    if kind == "deepspeed":
        return read_deepspeed(path, parameters)
    return read_dcp(path) if kind == "dcp" else read_weights(path)


def open_any(folder: str | os.PathLike[str], parameters: Sequence[Sequence[str]] | None = None) -> ForeignState:
    """Read a checkpoint of our own or of another library; see `open_foreign`.

    Raises:
        CheckpointError: It is none, not whole, or cannot be read.
    """
    path = Path(folder)
    if (path / MANIFEST).exists() or (path / TRAINING).exists() or not path.exists():
        return from_checkpoint(open_checkpoint(path))
    return open_foreign(path, parameters)
