"""Saving a checkpoint, and loading its tensors, on all ranks at once."""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from paceline.checkpoint.folder import (
    check_target,
    commit,
    partial_name,
    real_folder,
    remove_leftovers,
    remove_oldest,
    sync,
)
from paceline.checkpoint.format.manifest import FileRecord
from paceline.checkpoint.io.planning import ShardLoadPlanner, ShardSavePlanner
from paceline.checkpoint.io.storage import FolderReader, FolderWriter
from paceline.errors import CheckpointError, DamagedCheckpointError, PacelineError, named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from paceline.checkpoint.folder import Checkpoint
    from paceline.checkpoint.format.manifest import Manifest
    from paceline.checkpoint.format.shards import TensorShard
    from paceline.checkpoint.io.storage import Written
    from paceline.collectives import Group

__all__ = ["Common", "Content", "SaveTimings", "load_shards", "run_on_all_ranks", "save_checkpoint"]

T = TypeVar("T")
_CHUNK = 16 * 1024**2
_SPARE = 16 * 1024**2
"""Bytes to leave free beside the tensors, for JSON files and the file system's own data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What one rank writes into a checkpoint.

    Attributes:
        shards: Its shards of the tensors, by their names in the manifest.
        documents: Its JSON texts, by file name; no two ranks have the same name.
        common: Tensors and texts that are the same on all ranks; only those of rank 0 are used.
        manifest: The manifest without files and tensors; only that of rank 0 is used.
    """

    shards: Mapping[str, TensorShard]
    documents: Mapping[str, str]
    common: Common
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Common:
    """What is the same on all ranks: whole tensors, and JSON texts by file name."""

    tensors: Mapping[str, TensorShard] = field(default_factory=dict)
    documents: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class SaveTimings:
    """Seconds that a save took on this rank.

    Attributes:
        planned: Until the first byte could be written.
        written: Writing, without `synced`.
        synced: Waiting for fsync.
        committed: From the last byte of the last rank until the checkpoint had its final name.
        blocked: How long the training thread waited.
    """

    planned: float = 0.0
    written: float = 0.0
    synced: float = 0.0
    committed: float = 0.0
    blocked: float = 0.0

    @property
    def total(self) -> float:
        """From the start of the save until the checkpoint had its final name."""
        return self.planned + self.written + self.synced + self.committed


@dataclass(slots=True)
class _Disks:
    """Which ranks see the same folder: for each rank, the lowest rank that does."""

    disk_owners: list[int] = field(default_factory=list)

    @property
    def shared(self) -> bool:
        return not any(self.disk_owners)


def save_checkpoint(
    folder: str | os.PathLike[str],
    collect_content: Callable[[Path], Content],
    group: Group,
    *,
    keep: int | None = None,
    numbered: bool = False,
    is_blocking: bool = True,
) -> SaveTimings:
    """Write a checkpoint. An older one of the same name stays until the new one is complete.

    Collective: every rank must call it.

    Args:
        folder: Its path, on this rank's disk.
        collect_content: Returns what this rank writes. It gets the folder being written and may put files there.
        group: All ranks.
        keep: How many numbered checkpoints to keep in the parent folder; None keeps all.
        numbered: Whether this is a numbered one.
        is_blocking: Whether training waits for the end.

    Returns:
        How long it took.

    Raises:
        CheckpointError: On every rank, with the first failure of any; what was written is removed.
    """
    timings, begin = SaveTimings(), time.perf_counter()
    path = Path(folder)
    folder = run_on_all_ranks(group, "written", path, lambda: real_folder(path))
    save_id = group.broadcast_object(uuid.uuid4().hex)
    partial = partial_name(folder, save_id)
    disks = _open_partial(folder, partial, group, numbered=numbered)
    disk = disks.disk_owners[group.rank]
    writes_for_disk = disk == group.rank
    try:
        content = run_on_all_ranks(group, "written", folder, lambda: collect_content(partial))
        shards, documents = _with_common(content, group, disks, writes_for_disk=writes_for_disk)
        writer = FolderWriter(
            partial,
            group.rank,
            disks.disk_owners,
            documents,
            _threads(),
            lambda nbytes: _check_free_space(folder, nbytes),
            is_blocking=is_blocking,
        )
        timings.planned = time.perf_counter() - begin
        begin = time.perf_counter()
        with _translated("written", folder):
            _write(shards, writer, ShardSavePlanner(disks.disk_owners), group)
        timings.synced = writer.fsync_seconds
        timings.written = time.perf_counter() - begin - timings.synced
        begin = time.perf_counter()
        written: Written = group.broadcast_object(writer.written)  # type: ignore[assignment]
        manifest = group.broadcast_object(content.manifest)
        files, tensors = written.files[disk], written.tensors[disk]
        manifest = replace(manifest, id=save_id, shared=disks.shared, files=files, tensors=tensors)

        def finish() -> None:
            if writes_for_disk:
                _finish(partial, folder, manifest)

        run_on_all_ranks(group, "written", folder, finish)
    except CheckpointError:
        if writes_for_disk:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if writes_for_disk and numbered and keep is not None:
        remove_oldest(folder.parent, keep)
    timings.committed = time.perf_counter() - begin
    return timings


def _with_common(
    content: Content, group: Group, disks: _Disks, *, writes_for_disk: bool
) -> tuple[dict[str, TensorShard], dict[str, str]]:
    """What this rank writes. What all ranks share is written by rank 0, or by one rank of each disk."""
    common = content.common if disks.shared else group.broadcast_object(content.common)
    if not writes_for_disk:
        return dict(content.shards), dict(content.documents)
    return {**content.shards, **common.tensors}, {**content.documents, **common.documents}


def _finish(partial: Path, folder: Path, manifest: Manifest) -> None:
    """List the other files that were put into the folder, and make it the checkpoint."""
    listed = dict(manifest.files)
    for parent, _, names in os.walk(partial):
        for path in (Path(parent) / name for name in sorted(names)):
            name = path.relative_to(partial).as_posix()
            if name not in listed and path.is_file() and not path.is_symlink():
                sync(path)
                listed[name] = _record_of(path)
        sync(Path(parent))
    commit(partial, folder, replace(manifest, files=listed))


def _record_of(path: Path) -> FileRecord:
    size = crc = 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            size, crc = size + len(data), zlib.crc32(data, crc)
    return FileRecord(size, crc)


def _write(shards: Mapping[str, TensorShard], writer: FolderWriter, planner: ShardSavePlanner, group: Group) -> None:
    if group.size > 1:
        process_group = getattr(group, "process_group", None)
        with group.translating_errors("save"):
            dcp_save(dict(shards), storage_writer=writer, planner=planner, process_group=process_group)
        return
    # The same steps without DCP's warning about a single process.
    planner.set_up_planner(shards, is_coordinator=True)
    (plan,), metadata = planner.create_global_plan([planner.create_local_plan()])
    (plan,) = writer.prepare_global_plan([plan])
    writer.finish(metadata, [writer.write_data(planner.finish_plan(plan), planner).wait()])


def _read(shards: Mapping[str, TensorShard], reader: FolderReader, planner: ShardLoadPlanner, group: Group) -> None:
    if group.size > 1:
        process_group = getattr(group, "process_group", None)
        with group.translating_errors("load"):
            dcp_load(dict(shards), storage_reader=reader, planner=planner, process_group=process_group)
        return
    metadata = reader.read_metadata()
    planner.set_up_planner(shards, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()


def _open_partial(folder: Path, partial: Path, group: Group, *, numbered: bool) -> _Disks:
    """Make the folder to write into, on every disk."""

    def make() -> None:
        check_target(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, all_names=numbered)
        partial.mkdir()
        sync(partial.parent)

    def make_on_rank_0() -> None:
        if group.rank == 0:
            make()

    def make_on_other_disks() -> None:
        if disk_owners[group.rank] == group.rank != 0:
            make()

    run_on_all_ranks(group, "written", folder, make_on_rank_0)
    # A rank on another machine may see another disk at the same path.
    own_disk = None
    if not partial.is_dir():
        own_disk = (socket.gethostname(), str(partial))
    disks = group.all_gather_object(own_disk)
    disk_owners = [0 if disk is None else disks.index(disk) for disk in disks]
    if any(disk_owners):
        run_on_all_ranks(group, "written", folder, make_on_other_disks)
    return _Disks(disk_owners)


def _check_free_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    needed = nbytes + _SPARE
    if free < needed:
        raise CheckpointError(
            f"The checkpoint needs {_size(needed)}, and {_size(free)} are free at {folder.parent}",
            "Its files would be truncated",
            "Free some space or save to another disk; nothing was written, and older checkpoints are unchanged",
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _threads() -> int:
    """How many pieces a rank writes at a time: its share of the cores, but enough to keep a disk busy."""
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1))
    return min(8, max(2, (os.cpu_count() or 2) // ranks))


def run_on_all_ranks(group: Group, what: str, folder: Path, work: Callable[[], T]) -> T:
    """Call `work` on every rank; if it fails on one rank, it fails on all.

    Collective: every rank must call it.

    Args:
        group: All ranks.
        what: What could not be done with the checkpoint if it fails: `written`, `read`.
        folder: The checkpoint, for the message.
        work: What to do on this rank.

    Returns:
        What `work` returned on this rank.

    Raises:
        CheckpointError: With the first failure; on the rank where the user's own code failed, chained to its error.
    """
    failure, cause, result = None, None, None
    try:
        result = work()
    except Exception as error:
        # Whatever it is, the other ranks wait for the outcome.
        failure = f"rank {group.rank}: {_reason(error)}", isinstance(error, DamagedCheckpointError)
        cause = error
        if isinstance(error, PacelineError):
            cause = None
    failures = [each for each in group.all_gather_object(failure) if each]
    if failures:
        raise _failed(what, folder, *failures[0]) from cause
    return result  # type: ignore[return-value]


def _failed(what: str, folder: Path, reason: str, damaged: bool) -> CheckpointError:
    kind = DamagedCheckpointError if damaged else CheckpointError
    return kind(f"The checkpoint {folder} could not be {what}", reason, "")


def _reason(error: BaseException) -> str:
    if isinstance(error, PacelineError):
        return str(error)
    return f"{type(error).__name__}: {error}"


@contextmanager
def _translated(what: str, folder: Path) -> Iterator[None]:
    """Raise the error of the first failing rank in place of DCP's summary of all of them."""
    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = min(error.failures.items(), key=lambda failure: failure[0])
        damaged = isinstance(reason, DamagedCheckpointError)
        raise _failed(what, folder, f"rank {rank}: {_reason(reason)}", damaged) from reason
    except (OSError, ValueError) as error:
        raise _failed(what, folder, _reason(error), damaged=False) from error


def load_shards(checkpoint: Checkpoint, shards: Mapping[str, TensorShard], group: Group) -> None:
    """Read tensors from a checkpoint into live memory, however they were sharded; dtypes are converted.

    Collective: every rank must call it.

    Args:
        checkpoint: On this rank's disk.
        shards: Live memory to write into, by names that the manifest lists.
        group: All ranks.

    Raises:
        CheckpointError: On every rank, if a tensor is missing, has another shape or is damaged.
    """
    run_on_all_ranks(group, "read", checkpoint.folder, lambda: _check_shapes(checkpoint, shards))
    with _translated("read", checkpoint.folder):
        _read(shards, FolderReader(checkpoint.folder, checkpoint.manifest, _threads()), ShardLoadPlanner(), group)


def _check_shapes(checkpoint: Checkpoint, shards: Mapping[str, TensorShard]) -> None:
    tensors = checkpoint.manifest.tensors
    mismatched = [name for name, shard in shards.items() if tensors[name].shape != shard.shape]
    if mismatched:
        first, others = mismatched[0], mismatched[1:]
        raise CheckpointError(
            f"{first} has shape {tensors[first].shape} in the checkpoint and {shards[first].shape} in this run"
            + (f"; the shapes of others differ too: {named(others)}" if others else ""),
            "A tensor of another shape cannot be loaded",
            "Build the model that was saved",
        )
    absent = [name for name, shard in shards.items() if not _covers(checkpoint, name, shard)]
    if absent:
        raise CheckpointError(
            f"{checkpoint.folder} does not hold what this rank needs of {named(absent)}",
            "It was saved to disks that the machines do not share, and the rest is on the others",
            "Load it on as many ranks of the same machines, under the same strategy",
        )


def _covers(checkpoint: Checkpoint, name: str, shard: TensorShard) -> bool:
    reached = shard.start
    for piece in checkpoint.manifest.tensors[name].pieces:
        if piece.start <= reached < piece.stop:
            reached = piece.stop
    return reached >= shard.stop
