"""Checkpoints of other libraries: detecting their format, and reading them without running code from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from paceline.checkpoint.conversion import from_checkpoint
from paceline.checkpoint.folder import TRAINING, open_checkpoint, parent_folder_hint
from paceline.checkpoint.foreign.accelerate import is_accelerate, read_accelerate
from paceline.checkpoint.foreign.dcp import is_dcp, read_dcp
from paceline.checkpoint.foreign.deepspeed import is_deepspeed, read_deepspeed
from paceline.checkpoint.foreign.weight_files import is_weights, read_weights
from paceline.checkpoint.format.manifest import MANIFEST
from paceline.checkpoint.portable_state import LazyTensors, PortableOptimizer, PortableState, TensorSource
from paceline.errors import CheckpointError

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

__all__ = [
    "LazyTensors",
    "PortableOptimizer",
    "PortableState",
    "TensorSource",
    "detect_format",
    "from_checkpoint",
    "open_any",
    "open_foreign",
]

# In this order: an Accelerate folder may contain one of DeepSpeed or DCP, and all of them contain weights.
_FORMATS = {
    "accelerate": is_accelerate,
    "deepspeed": is_deepspeed,
    "dcp": is_dcp,
    "weights": is_weights,
}


def detect_format(folder: str | os.PathLike[str]) -> str | None:
    """The format of a folder: `accelerate`, `deepspeed`, `dcp` or `weights`.

    Returns:
        None for any other folder, and for a paceline checkpoint, even one that lost its manifest.
    """
    path = Path(folder)
    if not path.is_dir() or (path / MANIFEST).exists() or (path / TRAINING).exists():
        return None
    return next((name for name, matches in _FORMATS.items() if matches(path)), None)


def open_foreign(folder: str | os.PathLike[str], parameters: Sequence[Sequence[str]] | None = None) -> PortableState:
    """Read a folder that another library wrote.

    Args:
        folder: Written by Accelerate, DeepSpeed or torch.distributed.checkpoint, or with nothing but weights.
        parameters: For each optimizer the names of its parameters, group by group, for formats that number them.

    Raises:
        CheckpointError: It has another format, cannot be read, or refers to code.
    """
    path = Path(folder)
    kind = detect_format(path)
    if kind is None:
        raise CheckpointError(
            f"{path} is not a checkpoint of a known format",
            "Known formats are those of Accelerate, the transformers Trainer, DeepSpeed, "
            "torch.distributed.checkpoint and safetensors",
            parent_folder_hint(path) or "Name the folder that contains the files themselves",
        )
    if kind == "accelerate":
        return read_accelerate(path, parameters)
    if kind == "deepspeed":
        return read_deepspeed(path, parameters)
    if kind == "dcp":
        return read_dcp(path)
    return read_weights(path)


def open_any(folder: str | os.PathLike[str], parameters: Sequence[Sequence[str]] | None = None) -> PortableState:
    """Read a checkpoint of paceline or of another library; see `open_foreign`.

    Raises:
        CheckpointError: It is not one, is incomplete, or cannot be read.
    """
    path = Path(folder)
    if (path / MANIFEST).exists() or (path / TRAINING).exists() or not path.exists():
        return from_checkpoint(open_checkpoint(path))
    return open_foreign(path, parameters)
