"""The manifest of a checkpoint: the run that wrote it, and every file, tensor and piece with its checksum.

It is JSON, and all of it is validated before anything is read: a path out of the folder, a size that does not fit or
a missing piece is an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint.format.checksums import Span, of_spans
from paceline.checkpoint.format.layout import DTYPE_SIZES
from paceline.environment.version import __version__
from paceline.errors import DamagedCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["FORMAT", "MANIFEST", "FileRecord", "Manifest", "Piece", "TensorRecord", "numbered"]

MANIFEST = "manifest.json"
FORMAT = 2

_PATH_PART = re.compile(r"(?!\.{1,2}$)[^/\0]+")


def numbered(what: str, index: int) -> str:
    """The name of a family of tensors: `model`, `model_1`, `model_2`..."""
    return f"{what}_{index}" if index else what


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `[start, stop)` of a tensor in row-major order, and the CRC-32 of their bytes."""

    start: int
    stop: int
    crc32: int


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Where one whole tensor is stored.

    Attributes:
        shape: Shape of the whole tensor.
        dtype: Name in torch, without `torch.`.
        file: File name in the checkpoint's folder.
        offset: Offset of its first byte in the file.
        pieces: In order, without gaps. If machines do not share the disk, the pieces of other machines are missing.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * DTYPE_SIZES[self.dtype]

    @property
    def complete(self) -> bool:
        """Whether every element is in this folder."""
        reached = 0
        for piece in self.pieces:
            if piece.start != reached:
                return False
            reached = piece.stop
        return reached == self.numel

    def spans(self) -> Iterator[Span]:
        """Yield the byte range of each piece in the file."""
        size = DTYPE_SIZES[self.dtype]
        for piece in self.pieces:
            yield Span(self.offset + piece.start * size, self.offset + piece.stop * size, piece.crc32)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file.

    Attributes:
        size: Bytes.
        crc32: CRC-32 of all bytes. Pieces that are on the disks of other machines are zeros here.
    """

    size: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        step: Optimizer steps taken.
        epoch: Epoch of the first prepared loader.
        samples: Samples of that epoch that were handed out, over all ranks.
        world_size: Number of ranks that wrote it.
        strategy: Strategy that they trained under.
        mixed_precision: `no`, `bf16` or `fp16`.
        id: Identifies the save; the same on all machines.
        paceline: Version of paceline that wrote it.
        torch: Version of torch that wrote it.
        created: Time in UTC, ISO 8601.
        shared: Whether the folder holds everything; if not, it holds what the ranks of one machine wrote.
        files: Files by name.
        tensors: Tensors by name: `model/<parameter>`, `optimizer/<parameter>/<slot>`; a second model is `model_1`.
        ties: Other names of tensors (tied weights), each with the name in `tensors`.
    """

    step: int
    epoch: int
    samples: int
    world_size: int
    strategy: str
    mixed_precision: str
    id: str = ""
    paceline: str = __version__
    torch: str = torch.__version__
    created: str = field(default_factory=_now)
    shared: bool = True
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> str:
        """The text of `manifest.json`."""
        document = {"format": FORMAT, **asdict(self)}
        for name, record in self.tensors.items():
            document["tensors"][name]["pieces"] = [[p.start, p.stop, p.crc32] for p in record.pieces]
        return json.dumps(document)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read a manifest.

        Raises:
            DamagedCheckpointError: It has a newer format, is not valid JSON, or contradicts itself.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _damaged(f"It is not valid JSON: {error}") from error
        if not isinstance(document, dict):
            raise _damaged("It is not a JSON object")
        version = document.pop("format", None)
        if version not in (1, FORMAT):
            raise DamagedCheckpointError(
                f"Its manifest has format {version!r}",
                f"This version of paceline reads formats 1 to {FORMAT}",
                "Load it with the version of paceline that wrote it",
            )
        try:
            manifest = cls(**_run_fields(document), **_records(document))
            for fault in manifest._faults():
                raise _damaged(fault)
            if version == FORMAT:
                return manifest
            return _from_format_1(manifest, document["files"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise _damaged(f"{type(error).__name__}: {error}") from error

    def _faults(self) -> Iterator[str]:
        """Yield contradictions."""
        for name, file in self.files.items():
            if name == MANIFEST or not all(_PATH_PART.fullmatch(part) for part in name.split("/")):
                yield f"It names the file {name!r}, which is not inside the folder"
            if file.size < 0:
                yield f"The size of {name} is {file.size} bytes"
        for name, tensor in self.tensors.items():
            yield from self._tensor_faults(name, tensor)
        yield from self._overlaps()

    def _tensor_faults(self, name: str, tensor: TensorRecord) -> Iterator[str]:
        if tensor.dtype not in DTYPE_SIZES:
            yield f"{name} has the dtype {tensor.dtype!r}, which torch does not have"
            return
        file = self.files.get(tensor.file)
        if file is None or "/" in tensor.file:
            yield f"{name} is in {tensor.file!r}, which it does not list"
            return
        if min(tensor.shape, default=0) < 0 or tensor.offset < 0 or tensor.offset + tensor.nbytes > file.size:
            yield f"{name} of shape {tensor.shape} does not fit into the {file.size} bytes of {tensor.file}"
        reached = 0
        for piece in tensor.pieces:
            if not reached <= piece.start < piece.stop <= tensor.numel:
                yield f"The pieces of {name} are out of order at {piece}"
                return
            reached = piece.stop
        if self.shared and not tensor.complete:
            yield f"It lacks pieces of {name}"

    def _overlaps(self) -> Iterator[str]:
        file, reached, previous = "", 0, ""
        for name, tensor in sorted(self.tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
            if tensor.file == file and tensor.offset < reached and tensor.nbytes:
                yield f"{name} and {previous} overlap in {file}"
            if tensor.nbytes or tensor.file != file:
                file, reached, previous = tensor.file, tensor.offset + tensor.nbytes, name


def _run_fields(document: Mapping[str, Any]) -> dict[str, Any]:
    texts = {key: str(document[key]) for key in ("id", "paceline", "torch", "created", "strategy", "mixed_precision")}
    numbers = {key: int(document[key]) for key in ("step", "epoch", "samples", "world_size")}
    return {**texts, **numbers, "shared": bool(document["shared"])}


def _records(document: Mapping[str, Any]) -> dict[str, Any]:
    files = {str(name): FileRecord(int(file["size"]), int(file["crc32"])) for name, file in document["files"].items()}
    tensors = {
        str(name): TensorRecord(
            shape=tuple(int(size) for size in entry["shape"]),
            dtype=str(entry["dtype"]),
            file=str(entry["file"]),
            offset=int(entry["offset"]),
            pieces=tuple(Piece(int(start), int(stop), int(crc)) for start, stop, crc in entry["pieces"]),
        )
        for name, entry in document["tensors"].items()
    }
    ties = {str(alias): str(name) for alias, name in document["ties"].items()}
    return {"files": files, "tensors": tensors, "ties": ties}


def _from_format_1(manifest: Manifest, files: Mapping[str, Any]) -> Manifest:
    """Compute a checksum of every file: format 1 has only one of the header, the first `checked` bytes."""
    spans = {name: [Span(0, int(files[name]["checked"]), record.crc32)] for name, record in manifest.files.items()}
    for tensor in manifest.tensors.values():
        spans[tensor.file] += tensor.spans()
    whole = {name: replace(file, crc32=of_spans(file.size, spans[name])) for name, file in manifest.files.items()}
    return replace(manifest, files=whole)


def _damaged(why: str) -> DamagedCheckpointError:
    return DamagedCheckpointError("Its manifest is damaged or was edited", why, "Load another checkpoint")
