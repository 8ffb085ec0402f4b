"""Runs of a script that is checked: each in its own folder, with the notes that its ranks record."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from paceline.cli.click_helpers import PathType
from paceline.cli.interrupts import import_torch
from paceline.cli.schema_flags import SETTINGS, SchemaCommand, complete_files, schema_options
from paceline.errors import WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

    from paceline.config import Recording, Resolved
    from paceline.launch import Command

__all__ = ["ScriptCheckFailed", "ScriptRuns", "check_script", "run_options", "script_command", "without_logs"]

F = TypeVar("F", bound="Callable[..., Any]")


class ScriptCheckFailed(Exception):
    """A check of a script did not pass.

    Args:
        why: One line for the user.
        failure: The failure of a run, where that is the reason.
    """

    def __init__(self, why: str, failure: WorkerError | None = None) -> None:
        self.why = why
        self.failure = failure
        super().__init__(why)


def script_command(name: str, help_text: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a command that takes SCRIPT and its ARGUMENTS, and the flags of `paceline launch` before them."""
    script = PathType(exists=True, dir_okay=False, path_type=Path)

    def decorate(function: Callable[..., Any]) -> click.Command:
        function = click.argument("arguments", nargs=-1, type=click.UNPROCESSED)(function)
        function = click.argument("script", type=script, shell_complete=complete_files)(function)
        settings = {**SETTINGS, "allow_interspersed_args": False}
        make = click.command(
            name=name, cls=SchemaCommand, help=help_text, context_settings=settings, params=schema_options()
        )
        return make(function)

    return decorate


def run_options(function: F) -> F:
    """Add the options of all commands that run a script: --link, --config_file, --keep."""
    folder = PathType(file_okay=False, path_type=Path)
    file, link = PathType(path_type=Path), PathType(exists=True, path_type=Path)
    function = click.option("--keep", type=folder, help="Keep the folders of the runs and their output here.")(function)
    function = click.option("--config_file", type=file, help="YAML or JSON file to read.")(function)
    text = "Link this file or folder into the folder of each run; may be repeated."
    return click.option("--link", multiple=True, type=link, help=text)(function)


@dataclass(frozen=True, slots=True)
class ScriptRuns:
    """Starts runs of one script, each in its own folder.

    Attributes:
        root: The parent of those folders.
        resolved: The configuration of the runs.
        command: The script and its arguments, in which {folder} stands for the run's folder.
        links: Files and folders that each run sees in its folder.
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
        """Run the script.

        Its output goes to files, its notes to a folder `name` beside them.

        Args:
            where: The folder; runs of the same folder see each other's files.
            name: The name of this run.
            recording: What to record; its folder is filled in here.
            resolved: Another configuration than that of all runs.

        Returns:
            The failure, if the run failed.
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

        if sys.stderr.isatty():
            click.echo(f"running {where} ({name}) ...", err=True)
        try:
            with _inside(work):
                launch(
                    replace(resolved or self.resolved, recording=recording),
                    replace(self.command, arguments=arguments),
                    env=os.environ,
                    log_dir=home / f"{name}_output",
                )
        except WorkerError as failure:
            if self.are_kept:
                return failure
            return WorkerError(without_logs(str(failure)), failure.code)
        return None

    def why_nothing_recorded(self) -> str:
        """Return the reason why a run of this script recorded nothing, where its text shows one, with what to do."""
        from paceline.launch.script_imports import imports_paceline, trains_with_accelerate

        if self.resolved.config.as_accelerate:
            return ""
        if not trains_with_accelerate(self.command):
            if imports_paceline(self.command):
                return ""
            return ": the script does not import paceline, and only what an Accelerator trains is recorded"
        return ": the script trains with Accelerate or a Trainer of transformers, which needs --as_accelerate here"

    def notes(self, where: str, name: str) -> dict[int, list[dict[str, Any]]]:
        """Return what each rank of a run recorded, line by line."""
        notes: dict[int, list[dict[str, Any]]] = {}
        for path in sorted((self.root / where / name).glob("rank-*.jsonl")):
            lines = path.read_text(encoding="utf-8").splitlines()
            notes[int(path.stem.removeprefix("rank-"))] = [json.loads(line) for line in lines]
        return notes


def check_script(
    script: Path,
    arguments: tuple[str, ...],
    resolved: Resolved,
    *,
    link: tuple[Path, ...],
    keep: Path | None,
    check: Callable[[ScriptRuns], None],
) -> NoReturn:
    """Run a check in a temporary folder, or in `keep`, and exit with 0 if it passes, else with 1.

    Args:
        script: The script.
        arguments: Its arguments.
        resolved: The configuration of its runs.
        link: Files and folders that the runs see in their folder.
        keep: The folder to keep.
        check: Runs the script, prints what it finds, and raises `ScriptCheckFailed` if the check does not pass.
    """
    from paceline.launch import Command

    command = Command(script=str(script.absolute()), arguments=arguments, kind="script")
    links = tuple(path.absolute() for path in link)
    with tempfile.TemporaryDirectory(prefix="paceline_runs_") as temporary:
        runs = ScriptRuns((keep or Path(temporary)).absolute(), resolved, command, links, are_kept=keep is not None)
        try:
            check(runs)
        except ScriptCheckFailed as failed:
            _report(failed)
            sys.exit(1)
    sys.exit(0)


def _report(failed: ScriptCheckFailed) -> None:
    if failed.failure is not None:
        report = str(failed.failure).rstrip()
        click.echo(report)
        if "no such file" in report.lower():
            click.echo("hint     each run has its own folder: name what the script reads with --link")
    click.echo(f"FAIL     {failed.why}")


def without_logs(report: str) -> str:
    """Return a launcher's report without the files that are deleted before it is read."""
    return re.sub(r"; its output is in .*", "; --keep FOLDER keeps its output", report)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
