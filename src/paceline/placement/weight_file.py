"""Weights in files, found by position: read straight into memory, or mapped without being read."""

from __future__ import annotations

import json
import mmap
import os
import weakref
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.errors import PlacementError
from paceline.placement.tensors import as_dtype

__all__ = ["FileSlice", "OpenFile", "PathFile", "SafetensorsFile", "tensor_bytes"]

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


# What changes when a file is written: its size and time.
Stamp = tuple[int, int]


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns


def stamp_of(path: Path | str) -> Stamp | None:
    """Return the stamp of a file; None if there is no such file."""
    try:
        return _stamp(Path(path).stat())
    except OSError:
        return None


def check_stamp(path: Path | str, found: Stamp, expected: Stamp | None) -> None:
    """Check that a file is the one that it was when its weights were listed.

    Args:
        path: The file.
        found: Its stamp now.
        expected: Its stamp at that time; None if that is not known.

    Raises:
        PlacementError: It was written since.
    """
    if expected is not None and found != expected:
        raise PlacementError(
            f"{path} was written again after a model's weights were offloaded to it",
            "It may hold the weights of another model now",
            "Give each model an offload folder of its own, save to other files than those in use, and offload again",
        )


class OpenFile:
    """A file that is read by position, from any thread, as long as somebody has this object.

    Args:
        path: The file. It may be deleted or replaced later: this object goes on reading the file that it opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self.descriptor)

    def __deepcopy__(self, _memo: dict[int, Any]) -> OpenFile:
        return self  # reading changes nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFile, (self.path,)

    def stamp(self) -> Stamp:
        """Return what changes when the file is written: its size and time."""
        return _stamp(os.fstat(self.descriptor))

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fill memory with the bytes at a position.

        Raises:
            PlacementError: The file ends before that.
        """
        done = 0
        while done < len(memory):
            count = os.preadv(self.descriptor, [memory[done:]], offset + done)
            if count == 0:
                raise PlacementError(
                    f"{self.path} ends before byte {offset + len(memory)}",
                    "The file is shorter than when its weights were listed",
                    "Restore the file, and load the model again",
                )
            done += count

    def map(self) -> mmap.mmap:
        """Map the file; what is written to the memory does not reach the file."""
        return mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_COPY)


class PathFile:
    """A file that is opened for each reading: for folders with a file for each tensor.

    Args:
        path: The file.
        stamp: Its stamp when its weight was listed; with another one it is not read.
    """

    def __init__(self, path: Path, stamp: Stamp | None = None) -> None:
        self.path = path
        self.expected = stamp

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fill memory with the bytes at a position."""
        self._open().read_into(memory, offset)

    def map(self) -> mmap.mmap:
        """Map the file; what is written to the memory does not reach the file."""
        return self._open().map()

    def _open(self) -> OpenFile:
        try:
            file = OpenFile(self.path)
        except FileNotFoundError as error:
            raise PlacementError(
                f"The offloaded weight {self.path} is gone",
                "Its module needs it each time that it runs",
                "Keep the folder for as long as the model is used, or offload the model again",
            ) from error
        check_stamp(self.path, file.stamp(), self.expected)
        return file


@dataclass(frozen=True, kw_only=True)
class FileSlice:
    """A tensor in a file.

    Attributes:
        file: The file.
        offset: Where its bytes begin.
        dtype: Its dtype in the file.
        shape: Its shape.
    """

    file: OpenFile | PathFile
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The tensor's bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def read_into(self, memory: memoryview, start: int) -> None:
        """Fill memory with the tensor's bytes from a position in it on."""
        self.file.read_into(memory, self.offset + start)

    def tensor(self, mapped: mmap.mmap | None = None) -> torch.Tensor:
        """Return the tensor, whose bytes are read from the disk when they are used.

        Args:
            mapped: A map of the file, if there is one already.
        """
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        memory = self.file.map() if mapped is None else mapped
        flat = torch.frombuffer(memory, dtype=torch.uint8, count=self.nbytes, offset=self.offset)
        return flat.view(self.dtype).view(self.shape)


class SafetensorsFile:
    """A safetensors file: which tensors it has, and where.

    Args:
        path: The file.
    """

    def __init__(self, path: Path | str) -> None:
        self.file = OpenFile(Path(path))
        self._stamp: Stamp | None = None
        self._slices: dict[str, FileSlice] = {}
        self.metadata: dict[str, str] | None = None

    def slices(self) -> dict[str, FileSlice]:
        """Return every tensor by name; read again if the file was written since."""
        stamp = self.file.stamp()
        if stamp != self._stamp:
            self._read_header()
            self._stamp = stamp
            vars(self).pop("mapped", None)
        return self._slices

    @cached_property
    def mapped(self) -> mmap.mmap:
        """The whole file as memory."""
        return self.file.map()

    def __deepcopy__(self, _memo: dict[int, Any]) -> SafetensorsFile:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SafetensorsFile, (self.file.path,)

    def _read_header(self) -> None:
        length = bytearray(8)
        total = self.file.stamp()[0]
        if total < len(length):
            raise self._not_safetensors(f"It has {total} bytes, and its header alone takes more")
        self.file.read_into(memoryview(length), 0)
        size = int.from_bytes(length, "little")
        if size > total:
            raise self._not_safetensors("Its header is longer than the file")
        text = bytearray(size)
        self.file.read_into(memoryview(text), 8)
        try:
            header: dict[str, Any] = json.loads(bytes(text))
        except ValueError as error:
            raise self._not_safetensors("Its header is not JSON") from error
        self.metadata = header.pop("__metadata__", None)
        self._slices = {name: self._slice(name, entry, 8 + size) for name, entry in header.items()}
        end = max((each.offset + each.nbytes for each in self._slices.values()), default=0)
        if end > total:
            raise PlacementError(
                f"{self.file.path} has {total} bytes, and its header lists weights up to byte {end}",
                "The file is incomplete: a download or a copy of it did not end",
                "Fetch it again",
            )

    def _not_safetensors(self, why: str) -> PlacementError:
        todo = "Fetch it again; where it is a pointer of Git LFS, a small text file, run `git lfs pull`"
        return PlacementError(f"{self.file.path} is not a safetensors file", why, todo)

    def _slice(self, name: str, entry: dict[str, Any], start: int) -> FileSlice:
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise PlacementError(
                f"{name} in {self.file.path} has the dtype {entry['dtype']}",
                f"Known are {', '.join(_DTYPES)}",
                "Convert it to one of these",
            )
        found = FileSlice(
            file=self.file, offset=start + entry["data_offsets"][0], dtype=dtype, shape=tuple(entry["shape"])
        )
        if start + entry["data_offsets"][1] != found.offset + found.nbytes:
            raise PlacementError(
                f"{name} in {self.file.path} has a size that does not fit its shape",
                "The header of the file is damaged",
                "Fetch it again",
            )
        return found


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the memory of a contiguous tensor in host memory, as bytes."""
    flat: np.ndarray[Any, Any] = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return flat


def numpy_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a dtype's name in an offload index."""
    return as_dtype({"bool_": "bool"}.get(name, name))
