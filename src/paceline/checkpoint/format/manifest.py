"""What a checkpoint says of itself: facts about the run, every file, every tensor and every piece of it.

It is JSON, and nothing in it is believed before it was checked: a name that leads out of the folder, a size that
does not fit or a piece that is missing is an error, not a read.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from paceline.checkpoint.format.checksums import Span, of_spans
from paceline.checkpoint.format.layout import DTYPE_SIZES
from paceline.errors import DamagedCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["FORMAT", "MANIFEST", "FileRecord", "Manifest", "Piece", "TensorRecord"]

MANIFEST = "manifest.json"
FORMAT = 2

_PART = re.compile(r"(?!\.{1,2}$)[^/\0]+")


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `[start, stop)` of a tensor laid out row by row, and the CRC-32 of their bytes."""

    start: int
    stop: int
    crc32: int


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Where one whole tensor lies.

    Attributes:
        shape: Of the whole tensor.
        dtype: As torch calls it, without `torch.`.
        file: In the checkpoint's folder.
        offset: Of its first byte in the file.
        pieces: In order, without gaps. On disks that machines do not share, those of other machines are missing.
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
        """Yield the bytes of the file that each piece is."""
        size = DTYPE_SIZES[self.dtype]
        for piece in self.pieces:
            yield Span(self.offset + piece.start * size, self.offset + piece.stop * size, piece.crc32)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file.

    Attributes:
        size: In bytes.
        crc32: CRC-32 of all its bytes. Pieces of a tensor that are on the disks of other machines are zeros here.
    """

    size: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What `manifest.json` holds.

    Attributes:
        id: Of this save, the same on all machines.
        paceline: Version that wrote it.
        torch: Version that wrote it.
        created: Time in UTC, ISO 8601.
        step: Optimizer steps taken.
        epoch: Of the first prepared loader.
        samples: Position in that epoch, over all ranks.
        world_size: Ranks that wrote it.
        strategy: That they trained under.
        mixed_precision: `no`, `bf16` or `fp16`.
        shared: Whether the folder holds everything; else what the ranks of one machine wrote.
        files: By name.
        tensors: By name: `model/<parameter>`, `optimizer/<parameter>/<slot>`; a second model is `model_1`.
        ties: Further names of tensors.
    """

    id: str
    paceline: str
    torch: str
    created: str
    step: int
    epoch: int
    samples: int
    world_size: int
    strategy: str
    mixed_precision: str
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
            DamagedCheckpointError: It is of a later format, not well formed, or claims what cannot be.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _damaged(f"It is no JSON: {error}") from error
        if not isinstance(document, dict):
            raise _damaged("It holds no JSON object")
        version = document.pop("format", None)
        if version not in (1, FORMAT):
            raise DamagedCheckpointError(
                f"Its manifest has format {version!r}",
                f"This paceline reads formats 1 to {FORMAT}",
                "Load it with the version of paceline that wrote it",
            )
        try:
            made = cls(**{**_facts(document), **_records(document)})
            for fault in made._faults():
                raise _damaged(fault)
            return made if version == FORMAT else _from_format_1(made, document["files"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise _damaged(f"{type(error).__name__}: {error}") from error

    def _faults(self) -> Iterator[str]:
        """Yield what cannot be true."""
        for name, file in self.files.items():
            if name == MANIFEST or not all(_PART.fullmatch(part) for part in name.split("/")):
                yield f"It names the file {name!r}, which does not lie inside the folder"
            if file.size < 0:
                yield f"It gives {name} {file.size} bytes"
        for name, tensor in self.tensors.items():
            yield from self._tensor_faults(name, tensor)
        yield from self._overlaps()

    def _tensor_faults(self, name: str, tensor: TensorRecord) -> Iterator[str]:
        if tensor.dtype not in DTYPE_SIZES:
            yield f"{name} has the dtype {tensor.dtype!r}, which torch does not have"
            return
        file = self.files.get(tensor.file)
        if file is None or "/" in tensor.file:
            yield f"{name} lies in {tensor.file!r}, which it does not list"
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
            yield f"Pieces of {name} are missing from it"

    def _overlaps(self) -> Iterator[str]:
        file, reached, before = "", 0, ""
        for name, tensor in sorted(self.tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
            if tensor.file == file and tensor.offset < reached and tensor.nbytes:
                yield f"{name} lies over {before} in {file}"
            if tensor.nbytes or tensor.file != file:
                file, reached, before = tensor.file, tensor.offset + tensor.nbytes, name


def _facts(document: Mapping[str, Any]) -> dict[str, Any]:
    texts = {key: str(document[key]) for key in ("id", "paceline", "torch", "created", "strategy", "mixed_precision")}
    numbers = {key: int(document[key]) for key in ("step", "epoch", "samples", "world_size")}
    return {**texts, **numbers, "shared": bool(document["shared"])}


def _records(document: Mapping[str, Any]) -> dict[str, Any]:
    files = {str(name): FileRecord(int(held["size"]), int(held["crc32"])) for name, held in document["files"].items()}
    tensors = {
        str(name): TensorRecord(
            shape=tuple(int(size) for size in held["shape"]),
            dtype=str(held["dtype"]),
            file=str(held["file"]),
            offset=int(held["offset"]),
            pieces=tuple(Piece(int(start), int(stop), int(crc)) for start, stop, crc in held["pieces"]),
        )
        for name, held in document["tensors"].items()
    }
    ties = {str(alias): str(name) for alias, name in document["ties"].items()}
    return {"files": files, "tensors": tensors, "ties": ties}


def _from_format_1(manifest: Manifest, files: Mapping[str, Any]) -> Manifest:
    """Give every file a checksum of its own: format 1 had one of its first `checked` bytes, its header."""
    spans = {name: [Span(0, int(files[name]["checked"]), record.crc32)] for name, record in manifest.files.items()}
    for tensor in manifest.tensors.values():
        spans[tensor.file] += tensor.spans()
    whole = {name: replace(file, crc32=of_spans(file.size, spans[name])) for name, file in manifest.files.items()}
    return replace(manifest, files=whole)


def _damaged(why: str) -> DamagedCheckpointError:
    return DamagedCheckpointError("Its manifest is damaged, or somebody changed it", why, "Load another checkpoint")
