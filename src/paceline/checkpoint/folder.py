"""Folders of checkpoints: their names, which of them are whole, and how a new one takes its place.

A checkpoint is written under a name that says it is partial, gets its manifest when all ranks have written, and is
renamed last. So a folder under its own name is whole, unless something happened to it later.
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

__all__ = [
    "Checkpoint",
    "check_place",
    "commit",
    "next_number",
    "open_checkpoint",
    "parent_folder_hint",
    "partial_name",
    "real_folder",
    "remove_leftovers",
    "remove_oldest",
]

TRAINING = "training.json"

_LOG = get_logger(__name__)
_NUMBERED = re.compile(r"checkpoint[_-](\d+)")
LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>partial|replaced)-(?P<id>[0-9a-f]{8})")
_LARGEST_MANIFEST = 2 * 1024**3
_NO_LINKS = "The folder itself may be a link, but no file in it: cp -rL makes a copy with the files themselves"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        folder: Where it is.
        manifest: What it says of itself, checked against the files' names and sizes.
    """

    folder: Path
    manifest: Manifest
    _documents: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    @property
    def training(self) -> dict[str, Any]:
        """Everything about the training that is no tensor and the same on all ranks."""
        return self.document(TRAINING)

    def of_rank(self, rank: int) -> dict[str, Any] | None:
        """What one rank noted for itself; None for a rank that was not there."""
        name = rank_document(rank)
        return self.document(name) if name in self.manifest.files else None

    def document(self, name: str) -> dict[str, Any]:
        """One of the JSON files; kept once it was read.

        Raises:
            DamagedCheckpointError: It is not what was written.
        """
        if name in self._documents:
            return self._documents[name]
        record = self.manifest.files.get(name)
        if record is None:
            raise DamagedCheckpointError(f"{self.folder} lists no {name}", "It is not a training state of this library")
        data = _read(self.folder / name)
        if zlib.crc32(data) != record.crc32:
            raise DamagedCheckpointError(
                f"{name} of {self.folder} is damaged", "Its checksum differs", "Load another checkpoint"
            )
        found: dict[str, Any] = json.loads(data)
        self._documents[name] = found
        return found

    def read(self, name: str) -> Tensor:
        """One whole tensor, mapped from its file: memory is used for what is looked at.

        Args:
            name: As the manifest lists it.

        Raises:
            DamagedCheckpointError: Not all of it is on this disk.
        """
        from safetensors import safe_open

        record = self.manifest.tensors[name]
        if not record.complete:
            raise _elsewhere(self.folder, name)
        with safe_open(self.folder / record.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name.partition("/")[2])
        return tensor

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read everything and compare it with its checksums.

        Args:
            progress: Called with the bytes checked since the last call.

        Raises:
            DamagedCheckpointError: Something is not what was written.
        """
        from paceline.checkpoint.io.verification import verify

        verify(self.folder, self.manifest, progress or (lambda _: None))


def real_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder that a name leads to: absolute, with `~`, `..` and links followed as far as they exist.

    Raises:
        DamagedCheckpointError: Links lead in a circle.
    """
    named = Path(os.path.expanduser(folder))  # noqa: PTH111 - Path.expanduser refuses names such as ~backup
    try:
        return named.resolve()
    except (OSError, RuntimeError) as error:
        # Python before 3.13 raises RuntimeError for a loop.
        raise DamagedCheckpointError(
            f"{named} cannot be followed",
            "It is a link that leads back to itself, or lies behind one",
            "Remove the link, or name the folder itself",
        ) from error


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint, checking its manifest and the names, kinds and sizes of its files.

    A link to a checkpoint is what it leads to. A checkpoint that was being replaced when its process was killed is
    found under its old content.

    Raises:
        DamagedCheckpointError: There is none, or it is not whole.
    """
    # Followed once: a link such as `latest` may be moved on while the files are read.
    path, named = real_folder(folder), Path(folder)
    if not (path / MANIFEST).exists() and not path.exists():
        path = next((kept for kept in _siblings(path, "replaced") if (kept / MANIFEST).is_file()), path)
    if not path.is_dir():
        seen = f"{path} is a file, not a folder" if path.exists() else f"There is no folder {path}"
        if named.is_symlink():
            seen += f", and {named} is a link to it"
        raise DamagedCheckpointError(seen, "", "Name a folder that save_state wrote")
    if not (path / MANIFEST).exists():
        raise DamagedCheckpointError(
            f"{path} has no {MANIFEST}",
            "The manifest is written last, when everything else is there",
            parent_folder_hint(path) or "Name a folder that save_state wrote to its end",
        )
    try:
        manifest = Manifest.from_json(_read(path / MANIFEST))
        _check_files(path, manifest)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{path} is no whole checkpoint", str(error)) from error
    return Checkpoint(path, manifest)


def parent_folder_hint(folder: Path) -> str:
    """Advice for who named the folder around checkpoints in place of one; empty if it is none."""
    numbered = [(number, path) for path in subfolders(folder) if (number := number_of(path)) is not None]
    return f"It is a folder around checkpoints: name one of them, such as {max(numbered)[1]}" if numbered else ""


def _check_files(folder: Path, manifest: Manifest) -> None:
    wrong = []
    for name, record in manifest.files.items():
        try:
            found = (folder / name).lstat()
        except OSError as error:
            missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
            wrong.append(f"{name} is missing" if missing else f"{name[:80]} cannot be looked at: {error.strerror}")
            continue
        if stat.S_ISLNK(found.st_mode) or _behind_link(folder, name):
            wrong.append(f"{name} is a link or lies behind one")
        elif not stat.S_ISREG(found.st_mode):
            wrong.append(f"{name} is not a plain file")
        elif found.st_size != record.size:
            wrong.append(f"{name} has {found.st_size:,} of {record.size:,} bytes")
    if wrong:
        shown = "; ".join(wrong[:4])
        advice = _NO_LINKS if any("is a link" in text for text in wrong) else ""
        raise DamagedCheckpointError(f"incomplete: {len(wrong)} of {len(manifest.files)} files ({shown})", "", advice)


def _behind_link(folder: Path, name: str) -> bool:
    """Whether a folder between a checkpoint and one of its files is a link, which may lead anywhere."""
    return any((folder / inner).is_symlink() for inner in PurePosixPath(name).parents if inner.name)


def _read(path: Path) -> bytes:
    """Read a small file, following no link."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(handle, "rb") as file:  # noqa: PTH123 - from the handle
            if os.fstat(handle).st_size > _LARGEST_MANIFEST:
                raise DamagedCheckpointError(f"{path} is larger than any such file can be")
            return file.read()
    except OSError as error:
        if path.is_symlink():
            raise DamagedCheckpointError(f"{path} is a link", "", _NO_LINKS) from error
        raise DamagedCheckpointError(f"{path} cannot be read", error.strerror or str(error), "") from error


def _elsewhere(folder: Path, name: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{folder} holds only a part of {name}",
        "It was saved to disks that the machines do not share, and the rest is on the others",
        "Load it on as many ranks of the same machines, under the same strategy",
    )


def subfolders(folder: str | os.PathLike[str]) -> list[Path]:
    """The folders in which a project's checkpoints may lie: those in `folder` and in its `checkpoints`."""
    root = Path(folder)
    roots = [root, root / "checkpoints"]
    # Also links that lead nowhere: the disk that one led to may be missing today only.
    return [path for root in roots if root.is_dir() for path in root.iterdir() if path.is_dir() or path.is_symlink()]


def number_of(path: Path) -> int | None:
    """The number in the name of a checkpoint that was named automatically."""
    matched = _NUMBERED.fullmatch(path.name)
    return int(matched[1]) if matched else None


def next_number(folder: Path, at_least: int) -> int:
    """The number of the next checkpoint: above all that are there."""
    numbers = [number_of(path) for path in folder.iterdir()] if folder.is_dir() else []
    return max([at_least, *(number + 1 for number in numbers if number is not None)])


def rank_document(rank: int) -> str:
    """The name of the file in which a rank notes what is its own."""
    return f"rank-{rank:05d}.json"


# Taking a place


def partial_name(folder: Path, save_id: str) -> Path:
    """The folder that a checkpoint is written into before it is whole."""
    return folder.with_name(f"{folder.name}.partial-{save_id[:8]}")


def commit(partial: Path, folder: Path, manifest: Manifest) -> None:
    """Make a written folder a checkpoint: its manifest last, then its name.

    A checkpoint that had the name before stays until then, and is removed afterwards. What else lay in its folder
    stays there.
    """
    path = partial / MANIFEST
    path.write_text(manifest.as_json(), encoding="utf-8")
    sync(path)
    sync(partial)
    kept = folder.with_name(f"{folder.name}.replaced-{manifest.id[:8]}")
    if folder.exists():
        folder.rename(kept)
    partial.rename(folder)
    sync(folder.parent)
    if kept.is_dir():
        _remove_replaced(kept, folder)


def check_place(folder: Path) -> None:
    """Refuse a name that a checkpoint could only take by harming what has it.

    Raises:
        CheckpointError: It is a file, or the folder that this process works in.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file", "A checkpoint is a folder", "Save under another name")
    if Path.cwd().is_relative_to(folder):
        raise CheckpointError(
            f"{folder} is the folder that this process works in, or one around it",
            "A checkpoint takes the place of the folder of its name when it is whole",
            "Save into a folder of its own, such as 'checkpoint'",
        )


def _remove_replaced(kept: Path, folder: Path) -> None:
    """Remove a checkpoint that was replaced, but not what else lay in its folder: that goes on in the new one.

    A kill on the way leaves each thing in one of both; the next save ends the work.
    """
    try:
        own = {PurePosixPath(name).parts[0] for name in Manifest.from_json(_read(kept / MANIFEST)).files}
    except DamagedCheckpointError:
        own = set()
    for path in list(kept.iterdir()):
        if path.name not in own | {MANIFEST} and not os.path.lexists(folder / path.name):
            path.rename(folder / path.name)
    shutil.rmtree(kept, ignore_errors=True)


def sync(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _siblings(folder: Path, kind: str) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        for path in folder.parent.iterdir():
            matched = LEFTOVER.fullmatch(path.name)
            if matched and matched["kind"] == kind and matched["name"] == folder.name:
                yield path


def remove_leftovers(folder: Path, *, all_names: bool) -> None:
    """Remove what saves left behind that were killed.

    What a checkpoint was replaced by is kept as long as the new one is not there.

    Args:
        folder: Of the checkpoint that is about to be written.
        all_names: Also leftovers of other checkpoints in the same folder.
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

    Of a link only the link goes: what it leads to lies elsewhere, and may be used there. A checkpoint that another
    link in the folder or in the one around it leads to, such as `best`, stays as long as that does.
    """
    numbered = sorted((number, path) for path in folder.iterdir() if (number := number_of(path)) is not None)
    places = list(dict.fromkeys(_place(path) for _, path in reversed(numbered)))
    doomed = [path for _, path in numbered if _place(path) in places[keep:]]
    links = [path for place in (folder, folder.parent) for path in place.iterdir() if path.is_symlink()]
    pins = {_place(path): path for path in links if path not in doomed}
    for path in doomed:
        pin = next((link for place, link in pins.items() if place.is_relative_to(_place(path))), None)
        if pin is not None and not path.is_symlink():
            _LOG.info("%s stays beyond total_limit: %s leads to it", path.name, pin)
            continue
        try:
            _remove(path)
        except OSError as error:
            _LOG.warning("%s stays beyond total_limit: %s", path.name, error)


def _place(path: Path) -> Path:
    """What a checkpoint's name leads to; itself where that cannot be told."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return path.absolute()


def _remove(path: Path) -> None:
    """Remove a checkpoint, which loses its name first, so that it is never half there under it."""
    if path.is_symlink():
        _LOG.info("%s led to %s, which stays", path.name, _place(path))
        path.unlink()
        return
    aside = path.with_name(f"{path.name}.partial-{os.urandom(4).hex()}")
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
