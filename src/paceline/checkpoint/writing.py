"""Writing a checkpoint and reading one back, by all ranks together."""

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
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from paceline.checkpoint.folder import (
    check_place,
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

__all__ = ["Common", "Content", "SaveTimings", "load_shards", "save_checkpoint"]

_CHUNK = 16 * 1024**2
_SPARE = 16 * 1024**2
"""Bytes left free beside the tensors, for documents and the file system's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What one rank brings to a checkpoint.

    Attributes:
        shards: Its runs of the tensors, by the names that the manifest lists.
        documents: Its JSON texts, by file name; no two ranks bring the same name.
        common: Further tensors and texts that are the same for all; those of rank 0 count.
        facts: The manifest without files and tensors; that of rank 0 counts.
    """

    shards: Mapping[str, TensorShard]
    documents: Mapping[str, str]
    common: Common
    facts: Manifest


@dataclass(frozen=True, slots=True)
class Common:
    """What is the same for all ranks: whole tensors, and JSON texts by file name."""

    tensors: Mapping[str, TensorShard] = field(default_factory=dict)
    documents: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class SaveTimings:
    """Seconds that a save took on this rank.

    Attributes:
        planned: Until the first byte could be written.
        written: Writing, without `synced`.
        synced: Waiting for the disk.
        committed: From the last rank's last byte to the checkpoint's own name.
        blocked: How long the training thread was held up.
    """

    planned: float = 0.0
    written: float = 0.0
    synced: float = 0.0
    committed: float = 0.0
    blocked: float = 0.0

    @property
    def total(self) -> float:
        """From the beginning of the write to the checkpoint's own name."""
        return self.planned + self.written + self.synced + self.committed


@dataclass(slots=True)
class _Disks:
    """Which ranks see the same folder: for each rank the lowest one that does."""

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
    """Write a checkpoint; until it is whole, what was under its name before stays.

    Collective: every rank must call it.

    Args:
        folder: Its name, on this rank's disk.
        collect_content: Gives what this rank brings. It gets the folder being written, and may put files there itself.
        group: All ranks.
        keep: How many numbered checkpoints of the folder around it stay; None keeps all.
        numbered: Whether it is one of those.
        is_blocking: Whether somebody waits for the end.

    Raises:
        CheckpointError: On every rank, with the first failure of any; nothing is left of it.
    """
    times, begun = SaveTimings(), time.perf_counter()
    folder = _followed(Path(folder), group)
    save_id = group.broadcast_object(uuid.uuid4().hex)
    partial = partial_name(folder, save_id)
    disks = _open_partial(folder, partial, group, numbered=numbered)
    writes_for_disk = disks.disk_owners[group.rank] == group.rank
    brought: list[Content] = []
    try:
        run_on_all_ranks(group, "written", folder, lambda: brought.append(collect_content(partial)))
        (content,) = brought
        shards, documents = _with_common(content, group, disks, writes_for_disk=writes_for_disk)
        writer = FolderWriter(
            partial,
            group.rank,
            disks.disk_owners,
            documents,
            _threads(),
            lambda coming: _check_free_space(folder, coming),
            is_blocking=is_blocking,
        )
        times.planned = time.perf_counter() - begun
        begun = time.perf_counter()
        with _translated("written", folder):
            _write(shards, writer, ShardSavePlanner(disks.disk_owners), group)
        times.synced = writer.fsync_seconds
        times.written = time.perf_counter() - begun - times.synced
        begun = time.perf_counter()
        written: Written = group.broadcast_object(writer.written)  # type: ignore[assignment]
        facts = group.broadcast_object(content.facts)
        home = disks.disk_owners[group.rank]
        manifest = replace(
            facts, id=save_id, shared=disks.shared, files=written.files[home], tensors=written.tensors[home]
        )
        run_on_all_ranks(
            group, "written", folder, lambda: _finish(partial, folder, manifest) if writes_for_disk else None
        )
    except CheckpointError:
        if writes_for_disk:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if writes_for_disk and numbered and keep is not None:
        remove_oldest(folder.parent, keep)
    times.committed = time.perf_counter() - begun
    return times


def _followed(folder: Path, group: Group) -> Path:
    """What the name leads to on this rank's disk: of a link, that is replaced."""
    found: list[Path] = []
    run_on_all_ranks(group, "written", folder, lambda: found.append(real_folder(folder)))
    return found[0]


def _with_common(
    content: Content, group: Group, disks: _Disks, *, writes_for_disk: bool
) -> tuple[dict[str, TensorShard], dict[str, str]]:
    """What this rank writes, with what all share: on one disk rank 0 brings that, else a rank of each disk."""
    common = content.common if disks.shared else group.broadcast_object(content.common)
    if not writes_for_disk:
        return dict(content.shards), dict(content.documents)
    return {**content.shards, **common.tensors}, {**content.documents, **common.documents}


def _finish(partial: Path, folder: Path, manifest: Manifest) -> None:
    """List what else was put into the folder, and make it the checkpoint."""
    listed = dict(manifest.files)
    for inner, _, names in os.walk(partial):
        for path in (Path(inner) / name for name in sorted(names)):
            name = path.relative_to(partial).as_posix()
            if name not in listed and path.is_file() and not path.is_symlink():
                sync(path)
                listed[name] = _record_of(path)
        sync(Path(inner))
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
        dcp_save(dict(shards), storage_writer=writer, planner=planner, process_group=process_group)
        return
    # The same steps for one process, where DCP would warn that there is only one.
    planner.set_up_planner(shards, is_coordinator=True)
    (plan,), metadata = planner.create_global_plan([planner.create_local_plan()])
    (plan,) = writer.prepare_global_plan([plan])
    writer.finish(metadata, [writer.write_data(planner.finish_plan(plan), planner).wait()])


def _read(shards: Mapping[str, TensorShard], reader: FolderReader, planner: ShardLoadPlanner, group: Group) -> None:
    if group.size > 1:
        process_group = getattr(group, "process_group", None)
        dcp_load(dict(shards), storage_reader=reader, planner=planner, process_group=process_group)
        return
    metadata = reader.read_metadata()
    planner.set_up_planner(shards, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()


def _open_partial(folder: Path, partial: Path, group: Group, *, numbered: bool) -> _Disks:
    """Make the folder to write into, on every disk."""

    def make() -> None:
        check_place(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, all_names=numbered)
        partial.mkdir()
        sync(partial.parent)

    run_on_all_ranks(group, "written", folder, lambda: make() if group.rank == 0 else None)
    # A rank on another machine may see another disk under the same name.
    mine = None if partial.is_dir() else (socket.gethostname(), str(partial))
    seen = group.all_gather_object(mine)
    disk_owners = [0 if place is None else seen.index(place) for place in seen]
    if any(disk_owners):
        run_on_all_ranks(
            group, "written", folder, lambda: make() if disk_owners[group.rank] == group.rank != 0 else None
        )
    return _Disks(disk_owners)


def _check_free_space(folder: Path, coming: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < coming + _SPARE:
        raise CheckpointError(
            f"The checkpoint needs {_size(coming + _SPARE)}, and {_size(free)} are free at {folder.parent}",
            "Its files would be cut short",
            "Free some space or save elsewhere; nothing was written, and older checkpoints are as they were",
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _threads() -> int:
    """How many pieces a rank works on at a time: its share of the cores, within bounds that keep a disk busy."""
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1))
    return min(8, max(2, (os.cpu_count() or 2) // ranks))


def run_on_all_ranks(group: Group, what: str, folder: Path, work: Callable[[], Any]) -> None:
    """Do something on every rank; when one fails, all do.

    Collective: every rank must call it.

    Raises:
        CheckpointError: With the first failure; on the rank that had one of the script's own, its traceback too.
    """
    failure, cause = None, None
    try:
        work()
    except Exception as error:
        # Whatever it is, the other ranks wait to hear of it.
        failure = f"rank {group.rank}: {_reason(error)}", isinstance(error, DamagedCheckpointError)
        cause = None if isinstance(error, PacelineError) else error
    failures = [failed for failed in group.all_gather_object(failure) if failed]
    if failures:
        raise _failed(what, folder, *failures[0]) from cause


def _failed(what: str, folder: Path, reason: str, damaged: bool) -> CheckpointError:
    kind = DamagedCheckpointError if damaged else CheckpointError
    return kind(f"The checkpoint {folder} could not be {what}", reason, "")


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, PacelineError) else f"{type(error).__name__}: {error}"


@contextmanager
def _translated(what: str, folder: Path) -> Iterator[None]:
    """Let the first failing rank's own words come up in place of DCP's summary of all."""
    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = min(error.failures.items(), key=lambda failure: failure[0])
        damaged = isinstance(reason, DamagedCheckpointError)
        raise _failed(what, folder, f"rank {rank}: {_reason(reason)}", damaged) from reason
    except (OSError, ValueError) as error:
        raise _failed(what, folder, _reason(error), damaged=False) from error


def load_shards(checkpoint: Checkpoint, shards: Mapping[str, TensorShard], group: Group) -> None:
    """Fill live memory from a checkpoint, however it was cut; values are converted to the parts' dtype.

    Collective: every rank must call it.

    Args:
        checkpoint: On this rank's disk.
        shards: Live memory to write into; names that the checkpoint does not list are an error.
        group: All ranks.

    Raises:
        CheckpointError: On every rank, when a tensor is not there, has another shape or is damaged.
    """
    run_on_all_ranks(group, "read", checkpoint.folder, lambda: _check_shapes(checkpoint, shards))
    with _translated("read", checkpoint.folder):
        _read(shards, FolderReader(checkpoint.folder, checkpoint.manifest, _threads()), ShardLoadPlanner(), group)


def _check_shapes(checkpoint: Checkpoint, shards: Mapping[str, TensorShard]) -> None:
    tensors = checkpoint.manifest.tensors
    other = [name for name, part in shards.items() if tensors[name].shape != part.shape]
    if other:
        first = other[0]
        raise CheckpointError(
            f"{first} has shape {tensors[first].shape} in the checkpoint and {shards[first].shape} here"
            + (f", and so have others: {named(other[1:])}" if len(other) > 1 else ""),
            "A tensor of another shape cannot be loaded",
            "Build the model that was saved",
        )
    absent = [name for name, part in shards.items() if not _covers(checkpoint, name, part)]
    if absent:
        raise CheckpointError(
            f"{checkpoint.folder} does not hold what this rank needs of {named(absent)}",
            "It was saved to disks that the machines do not share, and the rest is on the others",
            "Load it on as many ranks of the same machines, under the same strategy",
        )


def _covers(checkpoint: Checkpoint, name: str, part: TensorShard) -> bool:
    reached = part.start
    for piece in checkpoint.manifest.tensors[name].pieces:
        if piece.start <= reached < piece.stop:
            reached = piece.stop
    return reached >= part.stop
