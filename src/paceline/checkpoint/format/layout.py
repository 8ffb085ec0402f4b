"""Which safetensors file each whole tensor goes to, and at which offset, decided before a byte is written.

So every rank can write its own shards in place, and the files are the same for any number of ranks.
The format, and its dtype codes: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "DTYPE_CODES",
    "DTYPE_SIZES",
    "FileLayout",
    "FileOffset",
    "TensorShape",
    "dtype_name",
    "dtype_named",
    "file_names",
    "index_text",
    "lay_out",
]

# Ranks that write to the same file wait for each other in the kernel, so large states are split over several files.
FILE_BYTES = 2 * 1024**3


DTYPE_CODES: Final = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
DTYPE_SIZES: Final[dict[str, int]] = {name: getattr(torch, name).itemsize for name in DTYPE_CODES}
"""Bytes per element, by dtype name."""


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name in `DTYPE_CODES`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@dataclass(frozen=True, slots=True)
class TensorShape:
    """Shape of a whole tensor, and its dtype's name in torch."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * DTYPE_SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class FileOffset:
    """The file of a tensor, and the offset of its first byte."""

    file: str
    offset: int


@dataclass(slots=True)
class FileLayout:
    """One file: its header, its size and its tensors.

    Attributes:
        name: File name in the checkpoint's folder.
        header: The first bytes: length and JSON.
        size: Bytes, with the header.
        entries: Tensors by their names in the file, in order.
    """

    name: str
    header: bytes = b""
    size: int = 0
    entries: dict[str, TensorShape] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Bytes after the header."""
        return self.size - len(self.header)

    def add(self, name: str, entry: TensorShape) -> None:
        """Append a tensor."""
        self.entries[name] = entry
        self.size += entry.nbytes

    def close(self) -> dict[str, int]:
        """Write the header; return the offset of each entry in the file."""
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin, offsets = 0, {}
        for name, entry in self.entries.items():
            offsets[name] = begin
            end = begin + entry.nbytes
            table[name] = {"dtype": DTYPE_CODES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.size += len(self.header)
        return {name: len(self.header) + start for name, start in offsets.items()}


def lay_out(
    tensors: Mapping[str, TensorShape], file_bytes: int = FILE_BYTES
) -> tuple[list[FileLayout], dict[str, FileOffset]]:
    """Assign tensors to files; each family (the name up to the first `/`) has files of its own.

    Returns:
        The files, and the file offset of each tensor.
    """
    families: dict[str, list[FileLayout]] = {}
    for full, shape in tensors.items():
        family, _, name = full.partition("/")
        files = families.setdefault(family, [FileLayout("")])
        if files[-1].entries and files[-1].data_bytes + shape.nbytes > file_bytes:
            files.append(FileLayout(""))
        files[-1].add(name, shape)
    offsets: dict[str, FileOffset] = {}
    for family, files in families.items():
        for file, name in zip(files, file_names(family, len(files)), strict=True):
            file.name = name
            offsets.update((f"{family}/{entry}", FileOffset(name, offset)) for entry, offset in file.close().items())
    return [file for files in families.values() for file in files], offsets


def file_names(family: str, count: int) -> Iterable[str]:
    """The names that safetensors readers expect: numbered only if there are several files."""
    if count == 1:
        return [f"{family}.safetensors"]
    return [f"{family}-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def index_text(file_layouts: Iterable[FileLayout]) -> str:
    """The JSON index of several files of one family."""
    layouts = list(file_layouts)
    table = {
        "metadata": {"total_size": sum(file.data_bytes for file in layouts)},
        "weight_map": {name: file.name for file in layouts for name in file.entries},
    }
    return json.dumps(table, indent=2, sort_keys=True) + "\n"
