"""Writing weights to safetensors files one tensor at a time, so that they need not fit into memory together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.checkpoint.format.layout import TensorShape, dtype_name, index_text, lay_out
from paceline.checkpoint.io.transfer import bytes_of
from paceline.checkpoint.io.weights import check_free_space, into_place, remove_others
from paceline.collectives import as_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from paceline.checkpoint.format.layout import FileLayout
    from paceline.checkpoint.format.shards import Slot
    from paceline.checkpoint.portable_state import LazyTensors

__all__ = ["stream_weights"]


def stream_weights(
    tensors: LazyTensors,
    folder: Path,
    *,
    max_file_bytes: int,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write weights in the layout that transformers' `from_pretrained` reads.

    Args:
        tensors: Weights by name, read one after another.
        folder: Created if missing; weights of an earlier call are replaced.
        max_file_bytes: Largest file size, unless a single tensor is larger.
        dtype: Dtype for floating-point tensors; None keeps theirs.
        progress: Called with the bytes written since the last call.

    Returns:
        The files written.

    Raises:
        PacelineError: The disk has too little free space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {f"model/{name}": _shape(tensors.slot(name), dtype) for name in tensors}
    files, _ = lay_out(shapes, max_file_bytes)
    check_free_space(folder, sum(file.size for file in files))
    for file in files:
        _write(file, folder, tensors, progress or (lambda _: None))
    if len(files) > 1:
        index = "model.safetensors.index.json"
        partial = folder / f"{index}.partial"
        partial.write_text(index_text(files), encoding="utf-8")
        into_place(partial, folder / index)
    remove_others(folder, [file.name for file in files])
    return [folder / file.name for file in files]


def _shape(slot: Slot, dtype: torch.dtype | None) -> TensorShape:
    return TensorShape(
        slot.shape, dtype_name(dtype if dtype is not None and slot.dtype.is_floating_point else slot.dtype)
    )


def _write(file: FileLayout, folder: Path, tensors: LazyTensors, progress: Callable[[int], None]) -> None:
    partial = folder / f"{file.name}.partial"
    with partial.open("wb") as opened:
        opened.write(file.header)
        for name, entry in file.entries.items():
            raw = _raw(tensors[name], entry)
            opened.write(raw)
            progress(len(raw))
    into_place(partial, folder / file.name)


def _raw(tensor: Tensor, entry: TensorShape) -> memoryview:
    dtype: torch.dtype = getattr(torch, entry.dtype)
    return bytes_of(as_bytes(tensor.to(dtype).contiguous()))
