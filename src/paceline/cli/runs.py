"""Runs of a script that is checked: each in a folder of its own, with the notes that it leaves."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import WorkerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.config import Recording, Resolved
    from paceline.launch import Command

__all__ = ["Runs"]


@dataclass(frozen=True, slots=True)
class Runs:
    """Starts runs of one script in folders of their own.

    Attributes:
        root: Holds the folders.
        resolved: The configuration of the runs.
        command: The script and its arguments, in which {folder} stands for the run's folder.
        links: What the runs see in their folder.
    """

    root: Path
    resolved: Resolved
    command: Command
    links: tuple[Path, ...]

    def start(
        self, where: str, name: str, recording: Recording, resolved: Resolved | None = None
    ) -> WorkerError | None:
        """Run the script in the folder `where`; return its failure, if it failed.

        What it prints goes to files, what it records to a folder `name` beside them.

        Args:
            where: Runs of one folder see each other's files.
            name: Of this run.
            recording: What to note; its folder is filled in here.
            resolved: Another configuration than that of all runs.
        """
        home = self.root / where
        work = home / "work"
        if not work.is_dir():
            work.mkdir(parents=True)
            for path in self.links:
                (work / path.name).symlink_to(path)
        recording = replace(recording, folder=str(home / name))
        arguments = tuple(word.replace("{folder}", str(work)) for word in self.command.arguments)
        from paceline.launch import launch

        try:
            with _inside(work):
                launch(
                    replace(resolved or self.resolved, recording=recording),
                    replace(self.command, arguments=arguments),
                    env=os.environ,
                    log_dir=home / f"{name}_output",
                )
        except WorkerError as failure:
            return failure
        return None

    def notes(self, where: str, name: str) -> dict[int, list[dict[str, Any]]]:
        """What each rank of one run recorded, line by line."""
        found: dict[int, list[dict[str, Any]]] = {}
        for path in sorted((self.root / where / name).glob("rank-*.jsonl")):
            lines = path.read_text(encoding="utf-8").splitlines()
            found[int(path.stem.removeprefix("rank-"))] = [json.loads(line) for line in lines]
        return found


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
