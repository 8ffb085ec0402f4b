"""One checkpoint folder: its name, how it is opened and checked, and how a new one replaces it.

A checkpoint is written under a temporary name, gets its manifest once all ranks have written, and is renamed last. So
a folder under its final name is complete, unless it was damaged later.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from paceline.checkpoint.format.manifest import MANIFEST, Manifest
from paceline.environment.logging import get_logger
from paceline.errors import CheckpointError, DamagedCheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from paceline.checkpoint.format.manifest import FileRecord

__all__ = [
    "LEFTOVER",
    "TRAINING",
    "Checkpoint",
    "check_target",
    "commit",
    "next_number",
    "number_of",
    "numbered_subfolders",
    "open_checkpoint",
    "parent_folder_hint",
    "partial_name",
    "rank_document",
    "real_folder",
    "remove_checkpoint",
    "remove_leftovers",
    "remove_oldest",
    "subfolders",
    "sync",
]

TRAINING = "training.json"
LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>partial|replaced)-(?P<id>[0-9a-f]{8})")

_LOG = get_logger(__name__)
_NUMBERED = re.compile(r"checkpoint[_-](\d+)")
_LARGEST_MANIFEST = 2 * 1024**3
_NO_LINKS = "The folder may be a symbolic link, but no file in it: cp -rL makes a copy with the files themselves"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        folder: Its path.
        manifest: Its manifest, checked against the names and sizes of the files.
    """

    folder: Path
    manifest: Manifest
    _documents: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    @property
    def training(self) -> dict[str, Any]:
        """Everything about the training that is not a tensor and is the same on all ranks."""
        return self.document(TRAINING)

    def of_rank(self, rank: int) -> dict[str, Any] | None:
        """What one rank saved for itself alone; None if no such rank took part in the save."""
        name = rank_document(rank)
        if name in self.manifest.files:
            return self.document(name)
        return None

    def document(self, name: str) -> dict[str, Any]:
        """One of the JSON files, read once and cached.

        Raises:
            DamagedCheckpointError: It is missing or its checksum differs.
        """
        if name in self._documents:
            return self._documents[name]
        record = self.manifest.files.get(name)
        if record is None:
            raise DamagedCheckpointError(
                f"{self.folder} lists no {name}",
                "It is not a paceline training state",
                "Name a folder that save_state wrote",
            )
        data = _read(self.folder / name)
        if zlib.crc32(data) != record.crc32:
            raise DamagedCheckpointError(
                f"{name} of {self.folder} is damaged", "Its checksum differs", "Load another checkpoint"
            )
        document: dict[str, Any] = json.loads(data)
        self._documents[name] = document
        return document

    def read(self, name: str) -> Tensor:
        """One whole tensor, memory-mapped: only the pages that are accessed are read.

        Args:
            name: Its name in the manifest.

        Raises:
            DamagedCheckpointError: Part of it is on another machine's disk.
        """
        from safetensors import safe_open

        record = self.manifest.tensors[name]
        if not record.complete:
            raise DamagedCheckpointError(
                f"{self.folder} holds only a part of {name}",
                "It was saved to disks that the machines do not share, and the rest is on the others",
                "Load it on as many ranks of the same machines, under the same strategy",
            )
        with safe_open(self.folder / record.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name.partition("/")[2])
        return tensor

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read everything and compare it with its checksums.

        Args:
            progress: Called with the bytes checked since the last call.

        Raises:
            DamagedCheckpointError: A checksum differs.
        """
        from paceline.checkpoint.io.verification import verify

        verify(self.folder, self.manifest, progress or (lambda _: None))


# Names


def real_folder(folder: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder, with `~`, `..` and symbolic links resolved as far as they exist.

    Raises:
        DamagedCheckpointError: The links form a loop.
    """
    path = Path(os.path.expanduser(folder))  # noqa: PTH111 - Path.expanduser refuses names such as ~backup
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError):
        # Python before 3.13 raises RuntimeError for a loop.
        resolved = None
    # Since 3.13 the link of a loop remains in the path.
    if resolved is None or any(os.path.islink(part) for part in (resolved, *resolved.parents)):  # noqa: PTH114 - no errors
        raise DamagedCheckpointError(
            f"{path} cannot be followed",
            "It is, or lies behind, a link that leads back to itself",
            "Remove the link, or name the folder itself",
        )
    return resolved


def rank_document(rank: int) -> str:
    """The name of the file with what one rank saves for itself alone."""
    return f"rank-{rank:05d}.json"


def number_of(path: Path) -> int | None:
    """The number of a checkpoint that was named automatically, or None."""
    matched = _NUMBERED.fullmatch(path.name)
    if matched:
        return int(matched[1])
    return None


def next_number(folder: Path, at_least: int) -> int:
    """The number of the next checkpoint: above all existing ones."""
    numbers = []
    if folder.is_dir():
        numbers = [number_of(path) for path in folder.iterdir()]
    return max([at_least, *(number + 1 for number in numbers if number is not None)])


def subfolders(folder: str | os.PathLike[str]) -> list[Path]:
    """The folders in a project folder, and in the `checkpoints` folder in it."""
    root = Path(folder)
    parents = [parent for parent in (root, root / "checkpoints") if parent.is_dir()]
    # Broken links too: the disk that one leads to may only be missing today.
    return [path for parent in parents for path in parent.iterdir() if path.is_dir() or path.is_symlink()]


def numbered_subfolders(folder: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """The subfolders named like numbered checkpoints, with their numbers."""
    numbered = [(number_of(path), path) for path in subfolders(folder)]
    return [(number, path) for number, path in numbered if number is not None]


def parent_folder_hint(folder: Path) -> str:
    """Advice for a user who named the parent folder of checkpoints instead of one; empty if it is not one."""
    numbered = numbered_subfolders(folder)
    if numbered:
        return f"It contains checkpoints: name one of them, such as {max(numbered)[1]}"
    return ""


# Opening


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint and check its manifest, and the names, kinds and sizes of its files.

    Args:
        folder: Its path; may be a symbolic link. If a save was killed while replacing it, the old content is opened.

    Raises:
        DamagedCheckpointError: There is none, or it is incomplete.
    """
    # Resolved once: a link such as `latest` may be moved on while the files are read.
    path, original = real_folder(folder), Path(folder)
    if not path.exists():
        path = next((old for old in _siblings(path, "replaced") if (old / MANIFEST).is_file()), path)
    if not path.is_dir():
        seen = f"{path} is a file, not a folder" if path.exists() else f"There is no folder {path}"
        if original.is_symlink():
            seen += f", and {original} is a link to it"
        raise DamagedCheckpointError(seen, "", "Name a folder that save_state wrote")
    if not (path / MANIFEST).exists():
        raise DamagedCheckpointError(
            f"{path} has no {MANIFEST}",
            "The manifest is written last, once everything else is there",
            parent_folder_hint(path) or "Name a folder that save_state finished writing",
        )
    try:
        manifest = Manifest.from_json(_read(path / MANIFEST))
        _check_files(path, manifest)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{path} is not a complete checkpoint", str(error)) from error
    return Checkpoint(path, manifest)


def _check_files(folder: Path, manifest: Manifest) -> None:
    checked = [_file_problem(folder, name, record) for name, record in manifest.files.items()]
    problems = [problem for problem in checked if problem]
    if problems:
        shown = "; ".join(problems[:4])
        advice = ""
        if any("is a link" in problem for problem in problems):
            advice = _NO_LINKS
        raise DamagedCheckpointError(f"{len(problems)} of {len(checked)} files: {shown}", "", advice)


def _file_problem(folder: Path, name: str, record: FileRecord) -> str:
    """What is wrong with one file of a checkpoint; empty if nothing is."""
    try:
        status = (folder / name).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except OSError as error:
        return f"{name[:80]} cannot be accessed: {error.strerror}"
    if stat.S_ISLNK(status.st_mode) or _behind_link(folder, name):
        return f"{name} is a link or lies behind one"
    if not stat.S_ISREG(status.st_mode):
        return f"{name} is not a plain file"
    if status.st_size != record.size:
        return f"{name} has {status.st_size:,} of {record.size:,} bytes"
    return ""


def _behind_link(folder: Path, name: str) -> bool:
    """Whether a folder between a checkpoint and one of its files is a link, which may lead anywhere."""
    return any((folder / inner).is_symlink() for inner in PurePosixPath(name).parents if inner.name)


def _read(path: Path) -> bytes:
    """Read a small file without following links."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(handle, "rb") as file:  # noqa: PTH123 - from the handle
            size = os.fstat(handle).st_size
            if size > _LARGEST_MANIFEST:
                raise DamagedCheckpointError(
                    f"{path} has {size:,} bytes",
                    f"A manifest or another JSON file of a checkpoint has at most {_LARGEST_MANIFEST:,}",
                    "Load another checkpoint",
                )
            return file.read()
    except OSError as error:
        if path.is_symlink():
            raise DamagedCheckpointError(f"{path} is a link", "", _NO_LINKS) from error
        raise DamagedCheckpointError(f"{path} cannot be read", error.strerror or str(error), "") from error


# Writing


def partial_name(folder: Path, save_id: str) -> Path:
    """The folder that a checkpoint is written into until it is complete."""
    return folder.with_name(f"{folder.name}.partial-{save_id[:8]}")


def commit(partial: Path, folder: Path, manifest: Manifest) -> None:
    """Turn a written folder into a checkpoint: write its manifest, then rename it.

    An older checkpoint of that name stays until then and is removed afterwards. Other files in its folder are moved
    to the new one.
    """
    path = partial / MANIFEST
    path.write_text(manifest.as_json(), encoding="utf-8")
    sync(path)
    sync(partial)
    replaced = folder.with_name(f"{folder.name}.replaced-{manifest.id[:8]}")
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    sync(folder.parent)
    if replaced.is_dir():
        _remove_replaced(replaced, folder)


def check_target(folder: Path) -> None:
    """Refuse a path that a checkpoint must not replace.

    Raises:
        CheckpointError: It is a file, or the working directory or a parent of it.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file", "A checkpoint is a folder", "Save under another name")
    if Path.cwd().is_relative_to(folder):
        raise CheckpointError(
            f"{folder} is the working directory of this process, or a parent of it",
            "A new checkpoint replaces the folder of its name",
            "Save into a separate folder, such as 'checkpoint'",
        )


def _remove_replaced(replaced: Path, folder: Path) -> None:
    """Remove a replaced checkpoint, but move other files that lay in its folder to the new one.

    If the process is killed meanwhile, every file is in one of the two, and the next save finishes the work.
    """
    try:
        names = {PurePosixPath(name).parts[0] for name in Manifest.from_json(_read(replaced / MANIFEST)).files}
    except DamagedCheckpointError:
        names = set()
    for path in list(replaced.iterdir()):
        if path.name not in names | {MANIFEST} and not os.path.lexists(folder / path.name):
            path.rename(folder / path.name)
    shutil.rmtree(replaced, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Removing


def _siblings(folder: Path, kind: str) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        for path in folder.parent.iterdir():
            matched = LEFTOVER.fullmatch(path.name)
            if matched and matched["kind"] == kind and matched["name"] == folder.name:
                yield path


def remove_leftovers(folder: Path, *, all_names: bool) -> None:
    """Remove what killed saves left behind.

    A replaced checkpoint is restored if the new one is not there.

    Args:
        folder: The checkpoint that is about to be written.
        all_names: Also remove leftovers of other checkpoints in the same parent folder.
    """
    with contextlib.suppress(FileNotFoundError):
        for path in list(folder.parent.iterdir()):
            matched = LEFTOVER.fullmatch(path.name)
            if matched is None or not (all_names or matched["name"] == folder.name):
                continue
            if matched["kind"] == "replaced" and not path.with_name(matched["name"]).exists():
                path.rename(path.with_name(matched["name"]))
            elif matched["kind"] == "replaced" and path.is_dir():
                _remove_replaced(path, path.with_name(matched["name"]))
            elif path.is_symlink():
                path.unlink(missing_ok=True)
            else:
                shutil.rmtree(path, ignore_errors=True)


def remove_oldest(folder: Path, keep: int) -> None:
    """Remove numbered checkpoints of a folder beyond the newest `keep`.

    If a checkpoint is a symbolic link, only the link is removed, since its target may be used elsewhere. A checkpoint
    to which another link in the folder or its parent leads, such as `best`, is kept as long as that link exists.
    """
    excess = _beyond(keep, folder)
    pins = _pins(folder, excess)
    for path in excess:
        pin = next((link for target, link in pins.items() if target.is_relative_to(_target(path))), None)
        if pin is not None and not path.is_symlink():
            _LOG.info("kept %s beyond total_limit: %s links to it", path.name, pin)
            continue
        remove_checkpoint(path)


def _beyond(keep: int, folder: Path) -> list[Path]:
    """The numbered checkpoints of a folder beyond the newest `keep`, oldest first; a link counts as its target."""
    numbers = {path: number_of(path) for path in folder.iterdir()}
    oldest_first = sorted((number, path) for path, number in numbers.items() if number is not None)
    targets = list(dict.fromkeys(_target(path) for _, path in reversed(oldest_first)))
    return [path for _, path in oldest_first if _target(path) in targets[keep:]]


def _pins(folder: Path, excess: list[Path]) -> dict[Path, Path]:
    """The links in a folder and its parent that are not to be removed themselves, by their targets."""
    links = [path for parent in (folder, folder.parent) for path in parent.iterdir() if path.is_symlink()]
    return {_target(path): path for path in links if path not in excess}


def _target(path: Path) -> Path:
    """Where a path leads once links are resolved; the absolute path if they cannot be."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return path.absolute()


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint beyond a limit, with a warning where that is not possible.

    It is renamed first, so that a partly removed one is never found under its name. Of a link only the link is removed.
    """
    try:
        if path.is_symlink():
            _LOG.info("removed the link %s; its target %s is kept", path.name, _target(path))
            path.unlink()
            return
        renamed = path.with_name(f"{path.name}.partial-{os.urandom(4).hex()}")
        path.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)
    except OSError as error:
        _LOG.warning("could not remove %s beyond the limit of checkpoints: %s", path.name, error)
