"""Saving a model's weights as safetensors files, in the layout that transformers' `from_pretrained` reads.

One file `model.safetensors`, or `model-00001-of-0000N.safetensors` with `model.safetensors.index.json` beside them
(https://huggingface.co/docs/safetensors). Files are written under a temporary name and renamed once complete, so that
a killed process never leaves a truncated file under a final name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from paceline.checkpoint.format.layout import TensorShape, dtype_name, index_text, lay_out
from paceline.checkpoint.io.transfer import bytes_of
from paceline.collectives import as_bytes
from paceline.environment.byte_sizes import BYTE_UNITS, read_byte_size
from paceline.errors import PacelineError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from paceline.checkpoint.format.layout import FileLayout
    from paceline.checkpoint.format.shards import Slot
    from paceline.checkpoint.portable_state import LazyTensors

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_UNITS = ("B", *BYTE_UNITS)


def save_weights(
    state: Mapping[str, Tensor], folder: str | os.PathLike[str], *, max_shard_size: str | int = "10GB"
) -> list[Path]:
    """Write weights into `folder`, replacing those of an earlier save.

    Args:
        state: CPU tensors by name. Of several names for the same memory (tied weights) the first is written.
        folder: Created if missing.
        max_shard_size: Largest file size in bytes, or a string such as `"5GB"`, unless a single tensor is larger.

    Returns:
        The files written.

    Raises:
        PacelineError: A tensor is on the meta device, or the disk has too little free space.
        UsageError: `max_shard_size` is not a size.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unique = _without_aliases(state)
    shards = _split(unique, parse_size(max_shard_size))
    check_free_space(folder, sum(_size(tensor) for tensor in unique.values()))
    names = _names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        _commit(folder / name, {key: tensor.contiguous() for key, tensor in shard.items()})
    if len(shards) > 1:
        _write_index(folder, names, shards)
    remove_others(folder, names)
    return [folder / name for name in names]


def stream_weights(
    tensors: LazyTensors,
    folder: Path,
    *,
    max_file_bytes: int,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write weights one tensor at a time, so that they need not fit into memory together; the files are the same.

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
    shapes = {f"model/{name}": _shape_in_file(tensors.slot(name), dtype) for name in tensors}
    files, _ = lay_out(shapes, max_file_bytes)
    check_free_space(folder, sum(file.size for file in files))
    for file in files:
        _write_file(file, folder, tensors, progress or (lambda _: None))
    if len(files) > 1:
        partial = folder / f"{INDEX_NAME}.partial"
        partial.write_text(index_text(files), encoding="utf-8")
        into_place(partial, folder / INDEX_NAME)
    remove_others(folder, [file.name for file in files])
    return [folder / file.name for file in files]


def parse_size(size: str | int) -> int:
    """Parse `"5GB"`, `"512 MiB"` or a number of bytes.

    Returns:
        Bytes.

    Raises:
        UsageError: It is neither, or not positive.
    """
    number = size if isinstance(size, int) else _bytes_in(size)
    if number <= 0:
        raise UsageError(
            f"max_shard_size={size!r}",
            "It must be a positive number of bytes, or a string with a unit",
            f"Write '5GB', for example; units are {', '.join(_UNITS)}",
        )
    return number


def _bytes_in(text: object) -> int:
    """The bytes in a string such as `5GB`; 0 if it is not one, or has no unit."""
    found = read_byte_size(text) if isinstance(text, str) else None
    if found is None or found.unit.upper() not in _UNITS:
        return 0
    return found.number


def _without_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the first of several names for the same memory: safetensors refuses duplicates."""
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    unique: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.is_meta:
            raise PacelineError(
                f"The weight {name} is on the meta device",
                "It has no values to save",
                "Load or initialize the model before saving it",
            )
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() == 0 or key not in seen:
            seen.add(key)
            unique[name] = tensor.detach()
    return _own_memory(unique)


def _own_memory(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share their storage with another one."""
    users: dict[int, int] = {}
    for tensor in state.values():
        storage = tensor.untyped_storage().data_ptr()
        users[storage] = users.get(storage, 0) + 1
    return {
        name: tensor.clone() if users[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in state.items()
    }


def _split(state: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in state.items():
        if shards[-1] and filled + _size(tensor) > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += _size(tensor)
    return shards


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS_NAME]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def check_free_space(folder: Path, needed: int) -> None:
    """Raise a PacelineError if the disk has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PacelineError(
            f"Saving needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free",
            "The files would be truncated",
            "Free some space or save to another disk; nothing was written",
        )


def _commit(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode
    # transformers refuses files without this metadata.
    save_file(tensors, partial, metadata={"format": "pt"})
    # safetensors creates files that only their owner can read; other files follow the umask.
    partial.chmod(mode)
    into_place(partial, path)


def _write_index(folder: Path, names: list[str], shards: list[dict[str, Tensor]]) -> None:
    index = {
        "metadata": {"total_size": sum(_size(t) for shard in shards for t in shard.values())},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    partial = folder / f"{INDEX_NAME}.partial"
    partial.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    into_place(partial, folder / INDEX_NAME)


def into_place(partial: Path, path: Path) -> None:
    """Rename a written file to its final name, once it is on the disk."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def remove_others(folder: Path, names: list[str]) -> None:
    """Remove files of an earlier save that had another number of them: a reader would mix them up."""
    for path in folder.iterdir():
        stale_shard = _SHARD.fullmatch(path.name) or path.name == WEIGHTS_NAME
        stale_index = path.name == INDEX_NAME and len(names) == 1
        if (stale_shard and path.name not in names) or stale_index:
            path.unlink()


def _shape_in_file(slot: Slot, dtype: torch.dtype | None) -> TensorShape:
    return TensorShape(
        slot.shape, dtype_name(dtype if dtype is not None and slot.dtype.is_floating_point else slot.dtype)
    )


def _write_file(file: FileLayout, folder: Path, tensors: LazyTensors, progress: Callable[[int], None]) -> None:
    partial = folder / f"{file.name}.partial"
    with partial.open("wb") as opened:
        opened.write(file.header)
        for name, entry in file.entries.items():
            raw = _raw_bytes(tensors[name], entry)
            opened.write(raw)
            progress(len(raw))
    into_place(partial, folder / file.name)


def _raw_bytes(tensor: Tensor, entry: TensorShape) -> memoryview:
    dtype: torch.dtype = getattr(torch, entry.dtype)
    return bytes_of(as_bytes(tensor.to(dtype).contiguous()))
