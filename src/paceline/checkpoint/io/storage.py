"""The storage behind torch.distributed.checkpoint: whole tensors in safetensors files that all ranks write at once.

Each rank writes its pieces to their place in the files, several at a time, and makes sure that they are on the disk.
Reading checks every piece that it touches before a byte of it is used.
"""

from __future__ import annotations

import os
import time
import zlib
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
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem

    from paceline.checkpoint.format.manifest import Manifest

__all__ = ["FolderReader", "FolderWriter", "Written"]


@dataclass(slots=True)
class Written:
    """What all ranks have written.

    Attributes:
        files: By name, with the disk (its lowest rank) that each is on.
        tensors: By disk, then by name.
    """

    files: dict[int, dict[str, FileRecord]]
    tensors: dict[int, dict[str, TensorRecord]]


class FolderWriter(StorageWriter):
    """Writes pieces into a folder that is not the checkpoint yet.

    Args:
        folder: Where to write, on this rank's disk.
        rank: This rank.
        disk_owners: For each rank, the lowest rank that sees the same disk.
        documents: Texts to be written beside the tensors, by file name: this rank's own.
        threads: How many pieces to write at a time.
        check_free_space: Called with the bytes to come on this disk, before the first is written.
        is_blocking: Whether somebody waits for the end: the disk then begins at once, beside the copying.
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
                    raise CheckpointError(f"{name} is {shapes[name]} on one rank and {shape} on another")
        files, places = lay_out(shapes)
        self._shapes, self._files, self._places = shapes, files, places
        coming = dict.fromkeys(self._disk_owners, 0)
        for home, plan in zip(self._disk_owners, plans, strict=True):
            coming[home] += sum(_nbytes(item) for item in plan.items)
        # Here, where a failure reaches all ranks before any of them has begun.
        self._make_files(files, coming[self._rank])
        pairs = zip(self._disk_owners, plans, strict=True)
        return [replace(plan, storage_data=(files, places, coming[home])) for home, plan in pairs]

    def _make_files(self, files: Iterable[FileLayout], coming: int) -> None:
        self._check_free_space(coming)
        for file in files:
            _make_file(self._folder / file.name, file)

    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files, places, coming = plan.storage_data
        if self._disk_owners[self._rank] == self._rank:
            if self._rank:
                self._make_files(files, coming)
            self._documents.update(_indices(files))
        results = [self._write_document(name, text) for name, text in self._documents.items()]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results + self._write_pieces(plan.items, planner, places))
        return done

    def _write_document(self, name: str, text: str) -> WriteResult:
        data = text.encode()
        with (self._folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return WriteResult(MetadataIndex(name), len(data), (self._disk_owners[self._rank], zlib.crc32(data)))

    def _write_pieces(
        self, items: Sequence[WriteItem], planner: SavePlanner, places: Mapping[str, FileOffset]
    ) -> list[WriteResult]:
        # Each rank begins elsewhere, so that they meet in a file as seldom as possible.
        turn = len(items) * self._rank // len(self._disk_owners)
        names = {places[item.index.fqn].file for item in items}
        handles = {name: _open_when_there(self._folder / name) for name in names}
        buffers = HostBuffers(self._threads)
        try:

            def write(item: WriteItem) -> WriteResult:
                place = places[item.index.fqn]
                values = planner.resolve_data(item)
                assert isinstance(values, torch.Tensor)
                assert item.tensor_data is not None
                offset = place.offset + item.tensor_data.chunk.offsets[0] * values.element_size()
                with buffers.on_host(values) as data:
                    crc = zlib.crc32(data)
                    _write_all(handles[place.file], data, offset)
                    if self._is_blocking:
                        _begin_writeback(handles[place.file], offset, len(data))
                return WriteResult(item.index, len(data), (self._disk_owners[self._rank], crc))

            results = in_threads(self._threads, "paceline-write", write, [*items[turn:], *items[:turn]])
            begun = time.perf_counter()
            in_threads(self._threads, "paceline-sync", os.fsync, list(handles.values()))
            self.fsync_seconds = time.perf_counter() - begun
        finally:
            for handle in handles.values():
                os.close(handle)
        return results

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        disk_owners = sorted(set(self._disk_owners))
        files: dict[int, dict[str, FileRecord]] = {home: {} for home in disk_owners}
        pieces: dict[int, dict[str, list[Piece]]] = {home: {name: [] for name in self._shapes} for home in disk_owners}
        for result in (result for of_rank in results for result in of_rank):
            home, crc = result.storage_data
            name = result.index.fqn
            if result.index.offset is None:
                files[home][name] = FileRecord(result.size_in_bytes, crc)
            else:
                start = result.index.offset[0]
                size = dtype_named(self._shapes[name].dtype).itemsize
                pieces[home][name].append(Piece(start, start + result.size_in_bytes // size, crc))
        tensors = {home: self._records(found) for home, found in pieces.items()}
        for home, records in tensors.items():
            files[home] |= self._file_records(records.values())
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
                self._places[name].file,
                self._places[name].offset,
                tuple(sorted(pieces[name], key=lambda piece: piece.start)),
            )
            for name, shape in self._shapes.items()
        }


class FolderReader(StorageReader):
    """Reads pieces of a checkpoint.

    Args:
        folder: The checkpoint.
        manifest: What it says of itself.
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
        names = {self._pieces[_plain(item.storage_index)][0].file for item in plan.items}
        handles = {name: os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW) for name in names}
        try:

            def read(item: ReadItem) -> None:
                record, piece = self._pieces[_plain(item.storage_index)]
                with buffers.of_size(_piece_bytes(record, piece)) as (raw, data):
                    read_piece(handles[record.file], data, record, piece, item.storage_index.fqn)
                    values = raw.view(dtype_named(record.dtype))
                    target = planner.resolve_tensor(item)
                    target.copy_(values.narrow(0, item.storage_offsets[0], item.lengths[0]))
                    planner.commit_tensor(item, target)

            in_threads(self._threads, "paceline-read", read, plan.items)
        finally:
            for handle in handles.values():
                os.close(handle)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def read_piece(handle: int, data: memoryview, record: TensorRecord, piece: Piece, name: str) -> None:
    """Read one piece into memory and check it.

    Raises:
        DamagedCheckpointError: Its bytes are not those that were written.
    """
    size = dtype_named(record.dtype).itemsize
    read = 0
    while read < len(data):
        got = os.preadv(handle, [data[read:]], record.offset + piece.start * size + read)
        if not got:
            break
        read += got
    if read < len(data) or zlib.crc32(data) != piece.crc32:
        raise damaged_piece(record, piece, name)


def damaged_piece(record: TensorRecord, piece: Piece, name: str) -> DamagedCheckpointError:
    """The error for a piece whose bytes are not those that were written."""
    return DamagedCheckpointError(
        f"{record.file} is damaged: elements {piece.start} to {piece.stop} of {name} are not what was written",
        "Their checksum differs",
        "Load another checkpoint",
    )


def _piece_bytes(record: TensorRecord, piece: Piece) -> int:
    return (piece.stop - piece.start) * dtype_named(record.dtype).itemsize


def _plain(index: MetadataIndex) -> MetadataIndex:
    return MetadataIndex(index.fqn, index.offset)


def _nbytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    dtype = item.tensor_data.properties.dtype
    return int(item.tensor_data.chunk.sizes[0]) * dtype_named(dtype_name(dtype)).itemsize


def _make_file(path: Path, layout: FileLayout) -> None:
    """Make a file of its full size under a name of its own, then show it to the other ranks."""
    hidden = path.with_name(f".{path.name}")
    with hidden.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.size)
    hidden.rename(path)


def _open_when_there(path: Path, patience: float = 60.0) -> int:
    """Open a file that another rank is making at this moment."""
    deadline = time.monotonic() + patience
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
    """Let the disk begin now what fsync will wait for."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, offset, length, os.POSIX_FADV_DONTNEED)


def _indices(files: Iterable[FileLayout]) -> dict[str, str]:
    """The texts of the indices over families of several files."""
    families: dict[str, list[FileLayout]] = {}
    for file in files:
        family, several, _ = file.name.partition("-")
        if several:
            families.setdefault(family, []).append(file)
    return {f"{family}.safetensors.index.json": index_text(held) for family, held in families.items()}
