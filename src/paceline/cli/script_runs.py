"""Runs of a script that is checked: each in a folder of its own, with the notes that it leaves."""

from __future__ import annotations

import json
import os
import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from paceline.cli.interrupts import import_torch
from paceline.cli.paths import PathType
from paceline.cli.schema_flags import complete_files
from paceline.errors import WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.config import Recording, Resolved
    from paceline.launch import Command

__all__ = ["Runs", "run_options", "runs_of", "script_argument", "without_logs"]

F = TypeVar("F", bound="Callable[..., Any]")


def script_argument(function: F) -> F:
    """Add SCRIPT and its ARGUMENTS to a command."""
    function = click.argument("arguments", nargs=-1, type=click.UNPROCESSED)(function)
    script = PathType(exists=True, dir_okay=False, path_type=Path)
    return click.argument("script", type=script, shell_complete=complete_files)(function)


def run_options(function: F) -> F:
    """Add what a command that runs a script may be told of its runs: --link, --config_file, --keep."""
    folder = PathType(file_okay=False, path_type=Path)
    file, link = PathType(path_type=Path), PathType(exists=True, path_type=Path)
    function = click.option("--keep", type=folder, help="Keep the runs and their output here.")(function)
    function = click.option("--config_file", type=file, help="YAML or JSON file to read.")(function)
    return click.option("--link", multiple=True, type=link, help="Make this visible to the runs.")(function)


@dataclass(frozen=True, slots=True)
class Runs:
    """Starts runs of one script in folders of their own.

    Attributes:
        root: Holds the folders.
        resolved: The configuration of the runs.
        command: The script and its arguments, in which {folder} stands for the run's folder.
        links: What the runs see in their folder.
        are_kept: Whether the folders stay.
    """

    root: Path
    resolved: Resolved
    command: Command
    links: tuple[Path, ...]
    are_kept: bool = True

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
        import_torch()
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
            return failure if self.are_kept else WorkerError(without_logs(str(failure)), failure.code)
        return None

    def notes(self, where: str, name: str) -> dict[int, list[dict[str, Any]]]:
        """What each rank of one run recorded, line by line."""
        found: dict[int, list[dict[str, Any]]] = {}
        for path in sorted((self.root / where / name).glob("rank-*.jsonl")):
            lines = path.read_text(encoding="utf-8").splitlines()
            found[int(path.stem.removeprefix("rank-"))] = [json.loads(line) for line in lines]
        return found


@contextmanager
def runs_of(
    script: Path, arguments: tuple[str, ...], resolved: Resolved, links: tuple[Path, ...], keep: Path | None
) -> Iterator[Runs]:
    """Runs of a script in a folder that goes afterwards, or in `keep`."""
    from paceline.launch import Command

    what = Command(script=str(script.absolute()), arguments=arguments, kind="script")
    with tempfile.TemporaryDirectory(prefix="paceline_runs_") as made:
        root, seen = (keep or Path(made)).absolute(), tuple(path.absolute() for path in links)
        yield Runs(root, resolved, what, seen, are_kept=keep is not None)


def without_logs(report: str) -> str:
    """A launcher's report without files that are gone when it is read."""
    return re.sub(r"; its output is in .*", "; --keep FOLDER keeps its output", report)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
