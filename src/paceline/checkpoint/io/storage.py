"""Storage for torch.distributed.checkpoint: whole tensors in safetensors files that all ranks write at once.

Each rank writes its pieces in place, several at a time, and calls fsync. Reading verifies the checksum of every piece
before any of its bytes is used.
"""

from __future__ import annotations

import os
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future
from typing_extensions import override

from paceline.checkpoint.format.checksums import Span, of_spans
from paceline.checkpoint.format.layout import (
    FileLayout,
    FileOffset,
    TensorShape,
    dtype_name,
    dtype_named,
    index_text,
    lay_out,
)
from paceline.checkpoint.format.manifest import FileRecord, Piece, TensorRecord
from paceline.checkpoint.io.transfer import HostBuffers, in_threads
from paceline.errors import CheckpointError, DamagedCheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem

    from paceline.checkpoint.format.manifest import Manifest

__all__ = ["FolderReader", "FolderWriter", "Written", "damaged_piece"]


@dataclass(slots=True)
class Written:
    """What all ranks have written.

    Attributes:
        files: Files by disk (its lowest rank), then by name.
        tensors: Tensors by disk, then by name.
    """

    files: dict[int, dict[str, FileRecord]]
    tensors: dict[int, dict[str, TensorRecord]]


class FolderWriter(StorageWriter):
    """Writes pieces into the folder of an unfinished checkpoint.

    Args:
        folder: Folder on this rank's disk.
        rank: This rank.
        disk_owners: For each rank, the lowest rank that sees the same disk.
        documents: Texts that this rank writes beside the tensors, by file name.
        threads: How many pieces to write at a time.
        check_free_space: Called with the bytes that this disk needs, before the first is written.
        is_blocking: Whether training waits for the end: write-back to disk is then started at once.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        disk_owners: Sequence[int],
        documents: Mapping[str, str],
        threads: int,
        check_free_space: Callable[[int], None],
        *,
        is_blocking: bool,
    ) -> None:
        self._folder = folder
        self._rank = rank
        self._disk_owners = disk_owners
        self._documents = dict(documents)
        self._threads = threads
        self._check_free_space = check_free_space
        self._is_blocking = is_blocking
        self.written: Written | None = None
        self.fsync_seconds = 0.0

    @override
    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @override
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    @override
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    @override
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @override
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        shapes: dict[str, TensorShape] = {}
        for plan in plans:
            for name, shape in plan.planner_data.items():
                if shapes.setdefault(name, shape) != shape:
                    raise CheckpointError(
                        f"{name} is {shapes[name]} on one rank and {shape} on another",
                        "Each rank writes a part of one tensor",
                        "Build the same model and optimizer on every rank",
                    )
        files, offsets = lay_out(shapes)
        self._shapes, self._files, self._offsets = shapes, files, offsets
        nbytes = dict.fromkeys(self._disk_owners, 0)
        for disk, plan in zip(self._disk_owners, plans, strict=True):
            nbytes[disk] += sum(_nbytes(item) for item in plan.items)
        # Here, so that a failure reaches all ranks before any of them writes.
        self._make_files(files, nbytes[self._rank])
        pairs = zip(self._disk_owners, plans, strict=True)
        return [replace(plan, storage_data=(files, offsets, nbytes[disk])) for disk, plan in pairs]

    def _make_files(self, files: Iterable[FileLayout], nbytes: int) -> None:
        self._check_free_space(nbytes)
        for file in files:
            _make_file(self._folder / file.name, file)

    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files, offsets, nbytes = plan.storage_data
        if self._disk_owners[self._rank] == self._rank:
            if self._rank:
                self._make_files(files, nbytes)
            self._documents.update(_indices(files))
        results = [self._write_document(name, text) for name, text in self._documents.items()]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results + self._write_pieces(plan.items, planner, offsets))
        return done

    def _write_document(self, name: str, text: str) -> WriteResult:
        data = text.encode()
        with (self._folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return WriteResult(MetadataIndex(name), len(data), (self._disk_owners[self._rank], zlib.crc32(data)))

    def _write_pieces(
        self, items: Sequence[WriteItem], planner: SavePlanner, offsets: Mapping[str, FileOffset]
    ) -> list[WriteResult]:
        # Each rank starts at another item, so that few ranks write to the same file at once.
        first = len(items) * self._rank // len(self._disk_owners)
        names = {offsets[item.index.fqn].file for item in items}
        buffers = HostBuffers(self._threads)
        with _open_files(self._folder, names, _open_when_created) as handles:

            def write(item: WriteItem) -> WriteResult:
                location = offsets[item.index.fqn]
                values = planner.resolve_data(item)
                assert isinstance(values, torch.Tensor)
                assert item.tensor_data is not None
                offset = location.offset + item.tensor_data.chunk.offsets[0] * values.element_size()
                with buffers.on_host(values) as data:
                    crc = zlib.crc32(data)
                    _write_all(handles[location.file], data, offset)
                    if self._is_blocking:
                        _begin_writeback(handles[location.file], offset, len(data))
                return WriteResult(item.index, len(data), (self._disk_owners[self._rank], crc))

            results = in_threads(self._threads, "paceline-write", write, [*items[first:], *items[:first]])
            begin = time.perf_counter()
            in_threads(self._threads, "paceline-sync", os.fsync, list(handles.values()))
            self.fsync_seconds = time.perf_counter() - begin
        return results

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        disks = sorted(set(self._disk_owners))
        files: dict[int, dict[str, FileRecord]] = {disk: {} for disk in disks}
        pieces: dict[int, dict[str, list[Piece]]] = {disk: {name: [] for name in self._shapes} for disk in disks}
        for result in (result for of_rank in results for result in of_rank):
            disk, crc = result.storage_data
            name = result.index.fqn
            if result.index.offset is None:
                files[disk][name] = FileRecord(result.size_in_bytes, crc)
            else:
                start = result.index.offset[0]
                size = dtype_named(self._shapes[name].dtype).itemsize
                pieces[disk][name].append(Piece(start, start + result.size_in_bytes // size, crc))
        tensors = {disk: self._records(of_disk) for disk, of_disk in pieces.items()}
        for disk, records in tensors.items():
            files[disk] |= self._file_records(records.values())
        self.written = Written(files, tensors)

    def _file_records(self, tensors: Iterable[TensorRecord]) -> dict[str, FileRecord]:
        spans = {file.name: [Span(0, len(file.header), zlib.crc32(file.header))] for file in self._files}
        for tensor in tensors:
            spans[tensor.file] += tensor.spans()
        return {file.name: FileRecord(file.size, of_spans(file.size, spans[file.name])) for file in self._files}

    def _records(self, pieces: Mapping[str, list[Piece]]) -> dict[str, TensorRecord]:
        return {
            name: TensorRecord(
                shape.shape,
                shape.dtype,
                self._offsets[name].file,
                self._offsets[name].offset,
                tuple(sorted(pieces[name], key=lambda piece: piece.start)),
            )
            for name, shape in self._shapes.items()
        }


class FolderReader(StorageReader):
    """Reads pieces of a checkpoint.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        threads: How many pieces to read at a time.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        self._folder = folder
        self._manifest = manifest
        self._threads = threads

    @override
    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        pieces: dict[MetadataIndex, tuple[TensorRecord, Piece]] = {}
        for name, record in self._manifest.tensors.items():
            chunks = []
            for piece in record.pieces:
                offset = torch.Size([piece.start])
                chunks.append(ChunkStorageMetadata(offset, torch.Size([piece.stop - piece.start])))
                pieces[MetadataIndex(name, offset)] = record, piece
            properties = TensorProperties(dtype=dtype_named(record.dtype))
            tensors[name] = TensorStorageMetadata(properties, torch.Size([record.numel]), chunks)
        return Metadata(tensors, storage_data=pieces)

    @override
    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._pieces = metadata.storage_data

    @override
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    @override
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    @override
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    @override
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        buffers = HostBuffers(self._threads)
        names = {self._pieces[_bare_index(item.storage_index)][0].file for item in plan.items}
        with _open_files(self._folder, names, _open_unlinked) as handles:

            def read(item: ReadItem) -> None:
                record, piece = self._pieces[_bare_index(item.storage_index)]
                with buffers.of_size(_piece_bytes(record, piece)) as (raw, data):
                    read_piece(handles[record.file], data, record, piece, item.storage_index.fqn)
                    values = raw.view(dtype_named(record.dtype))
                    target = planner.resolve_tensor(item)
                    target.copy_(values.narrow(0, item.storage_offsets[0], item.lengths[0]))
                    planner.commit_tensor(item, target)

            in_threads(self._threads, "paceline-read", read, plan.items)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def read_piece(handle: int, data: memoryview, record: TensorRecord, piece: Piece, name: str) -> None:
    """Read one piece into memory and check it.

    Raises:
        DamagedCheckpointError: Its checksum differs.
    """
    size = dtype_named(record.dtype).itemsize
    read = 0
    while read < len(data):
        count = os.preadv(handle, [data[read:]], record.offset + piece.start * size + read)
        if not count:
            break
        read += count
    if read < len(data) or zlib.crc32(data) != piece.crc32:
        raise damaged_piece(record, piece, name)


def damaged_piece(record: TensorRecord, piece: Piece, name: str) -> DamagedCheckpointError:
    """The error for a piece whose checksum differs."""
    return DamagedCheckpointError(
        f"{record.file} is damaged: elements {piece.start} to {piece.stop} of {name} are not what was written",
        "Their checksum differs",
        "Load another checkpoint",
    )


def _piece_bytes(record: TensorRecord, piece: Piece) -> int:
    return (piece.stop - piece.start) * dtype_named(record.dtype).itemsize


def _bare_index(index: MetadataIndex) -> MetadataIndex:
    return MetadataIndex(index.fqn, index.offset)


def _nbytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    dtype = item.tensor_data.properties.dtype
    return int(item.tensor_data.chunk.sizes[0]) * dtype_named(dtype_name(dtype)).itemsize


def _make_file(path: Path, layout: FileLayout) -> None:
    """Create a file of its full size under a temporary name, then rename it, so that other ranks see it complete."""
    hidden = path.with_name(f".{path.name}")
    with hidden.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.size)
    hidden.rename(path)


@contextmanager
def _open_files(folder: Path, names: Iterable[str], open_one: Callable[[Path], int]) -> Iterator[dict[str, int]]:
    """Open files of a folder for the body; close those that were opened also where a later one cannot be."""
    handles: dict[str, int] = {}
    try:
        for name in names:
            handles[name] = open_one(folder / name)
        yield handles
    finally:
        for handle in handles.values():
            os.close(handle)


def _open_unlinked(path: Path) -> int:
    """Open a file to read it, but no link."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _open_when_created(path: Path, timeout: float = 60.0) -> int:
    """Open a file that another rank is creating at this moment."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return os.open(path, os.O_WRONLY)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.002)


def _write_all(handle: int, data: memoryview, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(handle, data[written:], offset + written)


def _begin_writeback(handle: int, offset: int, length: int) -> None:
    """Start writing to the disk now what fsync will wait for later."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, offset, length, os.POSIX_FADV_DONTNEED)


def _indices(files: Iterable[FileLayout]) -> dict[str, str]:
    """The index files of families that have several files, by name."""
    families: dict[str, list[FileLayout]] = {}
    for file in files:
        family, several, _ = file.name.partition("-")
        if several:
            families.setdefault(family, []).append(file)
    return {f"{family}.safetensors.index.json": index_text(layouts) for family, layouts in families.items()}
