"""Reading weight files, and folders with nothing else, as transformers' `save_pretrained` writes them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from paceline.checkpoint.foreign.pickles import load_pickled
from paceline.checkpoint.format.layout import DTYPE_CODES, dtype_named
from paceline.checkpoint.format.shards import Slot
from paceline.checkpoint.portable_state import LazyTensors, PortableState, TensorSource
from paceline.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["is_weights", "read_weight_files", "read_weights"]

_DTYPES = {code: dtype_named(name) for name, code in DTYPE_CODES.items()}
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def is_weights(folder: Path) -> bool:
    """Whether a folder holds a model's weights."""
    return any((folder / name).is_file() for name in _NAMES)


def read_weights(folder: Path) -> PortableState:
    """Read such a folder.

    Raises:
        CheckpointError: A file in it cannot be read.
    """
    paths = [folder / name for name in _NAMES]
    path = next(path for path in paths if path.is_file())
    return PortableState(kind="weights", folder=folder, weights=LazyTensors(read_weight_files(path)))


def read_weight_files(path: Path) -> dict[str, TensorSource]:
    """The weights in one file, or in the files that an index lists.

    Raises:
        CheckpointError: A file cannot be read, or the index lists a file in another folder.
    """
    if path.name.endswith(".index.json"):
        table = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        sources: dict[str, TensorSource] = {}
        for name in sorted(set(table.values())):
            if "/" in name or name.startswith("."):
                raise CheckpointError(
                    f"{path} lists {name!r}", "Its files must be in the same folder", "Edit the index"
                )
            sources.update(read_weight_files(path.with_name(name)))
        return sources
    if path.suffix == ".safetensors":
        return dict(_safetensors(path))
    saved = load_pickled(path)
    return {str(name): TensorSource.of(value) for name, value in saved.items() if isinstance(value, torch.Tensor)}


def _safetensors(path: Path) -> Iterator[tuple[str, TensorSource]]:
    def reader(name: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
            return tensor

        return read

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                yield name, TensorSource(Slot(tuple(part.get_shape()), _DTYPES[part.get_dtype()]), reader(name))
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read", str(error), "Copy the file again") from error
