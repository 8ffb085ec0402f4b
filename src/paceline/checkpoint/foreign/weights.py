"""Folders with weights alone, as `save_model` and transformers' `save_pretrained` write them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from paceline.checkpoint.foreign.pickles import load_pickled
from paceline.checkpoint.format.layout import DTYPE_CODES, dtype_named
from paceline.checkpoint.format.shards import Slot
from paceline.checkpoint.portable_state import ForeignState, Source, Tensors
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


def read_weights(folder: Path) -> ForeignState:
    """Read such a folder.

    Raises:
        CheckpointError: A file in it cannot be read.
    """
    path = next(path for name in _NAMES if (path := folder / name).is_file())
    return ForeignState(kind="weights", folder=folder, weights=Tensors(read_weight_files(path)))


def read_weight_files(path: Path) -> dict[str, Source]:
    """The weights of one file, or of the files that an index names."""
    if path.name.endswith(".index.json"):
        table = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        found: dict[str, Source] = {}
        for name in sorted(set(table.values())):
            if "/" in name or name.startswith("."):
                raise CheckpointError(f"{path} names {name!r}", "Its files must lie beside it", "")
            found.update(read_weight_files(path.with_name(name)))
        return found
    if path.suffix == ".safetensors":
        return dict(_safetensors(path))
    held = load_pickled(path)
    return {str(name): Source.of(value) for name, value in held.items() if isinstance(value, torch.Tensor)}


def _safetensors(path: Path) -> Iterator[tuple[str, Source]]:
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
                yield name, Source(Slot(tuple(part.get_shape()), _DTYPES[part.get_dtype()]), reader(name))
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read", str(error), "Copy the file again") from error
