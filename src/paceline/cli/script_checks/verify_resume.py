"""`paceline verify-resume`: checks that a killed script resumes exactly."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.cli.schema_flags import given_flags
from paceline.cli.script_checks.script_runs import (
    ScriptCheckFailed,
    ScriptRuns,
    check_script,
    run_options,
    script_command,
)
from paceline.cli.sources import resolve_sources
from paceline.config import Recording
from paceline.errors import UsageError, counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_HELP = """Check that SCRIPT resumes exactly: run it, kill it with SIGKILL, run it again, and compare.

SCRIPT runs three times: for --steps optimizer steps without interruption; again until one of its processes is killed
after --kill_at steps; and once more, when it must find its checkpoint itself (`accelerator.load_state()`) and continue.
Every batch and every loss of the interrupted run, repeated steps included, must equal those of the uninterrupted run.
The exit code is 0 if they do, else 1.

Each run has its own empty working directory, so that a checkpoint in `runs/a` is found only by the run that wrote it.
Name the files that the script reads with --link. In the script's arguments {folder} stands for that directory.

\b
    paceline verify-resume train.py
    paceline verify-resume --steps 40 --kill_at 25 --num_processes 2 --use_fsdp train.py --lr 1e-3
    paceline verify-resume --link data train.py --output_dir {folder}/out

The script must save before step --kill_at; one that saves later needs a higher --kill_at and --steps. It needs no other
change: `backward` and the prepared loaders record what is compared. A script with a Trainer must pass
`resume_from_checkpoint` where there is a checkpoint; with a Trainer of transformers it needs --as_accelerate.
"""

_FOREIGN_CHECKPOINT = (
    "it found a checkpoint of another run. Each run has its own working directory: save to a relative path, or pass "
    "{folder} where the script takes a folder"
)

Key = tuple[int, int, int]
"""Rank, optimizer step, and micro-batch of the step."""
Notes = dict[Key, dict[str, Any]]
_MAX_SHOWN = 8


@script_command("verify-resume", _HELP)
@click.option("--steps", default=20, show_default=True, help="Optimizer steps to compare.")
@click.option("--kill_at", default=11, show_default=True, help="Optimizer steps after which the run is killed.")
@click.option(
    "--tolerance", default=0.0, show_default=True, help="Relative difference of losses allowed; 0: bit-equal."
)
@run_options
def command(
    script: Path,
    arguments: tuple[str, ...],
    steps: int,
    kill_at: int,
    tolerance: float,
    link: tuple[Path, ...],
    config_file: Path | None,
    keep: Path | None,
    **values: Any,
) -> None:
    """Check a script; `_HELP` is what users read."""
    if not 0 < kill_at < steps:
        raise UsageError(
            f"--kill_at {kill_at} with --steps {steps}",
            "The run is killed within these steps, and resumed",
            "Make --kill_at at least 1 and less than --steps",
        )
    resolved = resolve_sources(given_flags(values), config_file)
    check_script(
        script,
        arguments,
        resolved,
        link=link,
        keep=keep,
        check=lambda runs: _check(runs, steps, kill_at, tolerance),
    )


def _check(runs: ScriptRuns, steps: int, kill_at: int, tolerance: float) -> None:
    """Run three times, compare, and print the result."""
    straight = _run_straight(runs, steps)
    before = _run_until_killed(runs, steps, kill_at, _ranks(straight))
    after = _run_resumed(runs, steps, kill_at)
    resumed_at = _first_step(after)
    problems = [*_differences(straight, before, "before the kill", tolerance)]
    problems += _differences(straight, after, "after the resume", tolerance)
    missing = {key for key in straight if key[1] >= resumed_at} - after.keys()
    problems += [f"step {step + 1}, rank {rank}: missing after the resume" for rank, step, _ in sorted(missing)]
    for problem in problems[:_MAX_SHOWN]:
        click.echo(f"differs  {problem}")
    if problems:
        raise ScriptCheckFailed(f"{len(problems)} of {len(straight)} batches differ")
    how = "bit for bit" if tolerance == 0 else f"within {tolerance:g}"
    count = len(before) + len(after)
    click.echo(f"PASS     {count} batches and losses equal those of the uninterrupted run, {how}")


def _run_straight(runs: ScriptRuns, steps: int) -> Notes:
    failure = runs.start("straight", "run", Recording("", steps))
    if failure is not None:
        raise ScriptCheckFailed("the uninterrupted run failed", failure)
    notes = _notes(runs, "straight", "run")
    if not notes:
        raise ScriptCheckFailed(f"the uninterrupted run recorded no backward pass{runs.why_nothing_recorded()}")
    first = _first_step(notes)
    if first:
        raise ScriptCheckFailed(f"the uninterrupted run began at step {first}: {_FOREIGN_CHECKPOINT}")
    ranks = _ranks(notes)
    click.echo(f"ran      {_steps(notes)} steps on {counted(ranks, 'rank')} without interruption")
    return notes


def _run_until_killed(runs: ScriptRuns, steps: int, kill_at: int, ranks: int) -> Notes:
    failure = runs.start("killed", "before", Recording("", steps, kill_at))
    notes = _notes(runs, "killed", "before")
    if failure is None:
        first = steps
        if notes:
            first = _first_step(notes)
        why = f": it began at step {first}: {_FOREIGN_CHECKPOINT}" if first else ""
        raise ScriptCheckFailed(f"the run ended before step {kill_at}; there was nothing to kill{why}")
    click.echo(f"killed   rank {ranks - 1} with SIGKILL before its step {kill_at + 1}")
    return notes


def _run_resumed(runs: ScriptRuns, steps: int, kill_at: int) -> Notes:
    saved = _complete_checkpoint(runs.root / "killed" / "work")
    failure = runs.start("killed", "after", Recording("", steps))
    notes = _notes(runs, "killed", "after")
    first = _first_step(notes) if notes else 0
    if saved is None and first == 0:
        later = max(25, 2 * kill_at)
        raise ScriptCheckFailed(
            f"the run saved no complete checkpoint in its first {kill_at} steps: use --kill_at {later} "
            f"--steps {max(40, 2 * steps)}, or save more often",
            failure,
        )
    if failure is not None or not notes:
        raise ScriptCheckFailed("the resumed run failed", failure)
    if first == 0:
        raise ScriptCheckFailed(
            f"the resumed run began at step 0 and did not load {saved}, which was complete when the run was killed: "
            f"{_how_to_load(runs)}"
        )
    click.echo(f"resumed  from the checkpoint of step {first}, continued to step {_steps(notes)}")
    return notes


def _how_to_load(runs: ScriptRuns) -> str:
    from paceline.launch.script_imports import has_trainer

    if has_trainer(runs.command):
        return "call trainer.train(resume_from_checkpoint=True) where output_dir has a checkpoint"
    return "call accelerator.load_state() before the loop"


def _complete_checkpoint(folder: Path) -> Path | None:
    """A complete checkpoint in a folder, at any depth, as a path within it; None without one."""
    from paceline.checkpoint import open_checkpoint
    from paceline.checkpoint.catalog import is_foreign_state
    from paceline.errors import DamagedCheckpointError

    for parent, _, _ in os.walk(folder):
        path = Path(parent)
        try:
            open_checkpoint(path)
        except DamagedCheckpointError:
            if path == folder or not is_foreign_state(path):
                continue
        return path.relative_to(folder)
    return None


def _notes(runs: ScriptRuns, where: str, name: str) -> Notes:
    lines = runs.notes(where, name)
    return {(rank, note["step"], note["micro"]): note for rank, notes in lines.items() for note in notes}


def _ranks(notes: Mapping[Key, Any]) -> int:
    return 1 + max(rank for rank, _, _ in notes)


def _first_step(notes: Mapping[Key, Any]) -> int:
    return min(step for _, step, _ in notes)


def _steps(notes: Mapping[Key, Any]) -> int:
    return 1 + max(step for _, step, _ in notes)


def _differences(straight: Notes, other: Notes, when: str, tolerance: float) -> Iterator[str]:
    for key, note in sorted(other.items()):
        rank, step, _ = key
        expected = straight.get(key)
        difference = "the uninterrupted run has no such batch"
        if expected:
            difference = _difference(note, expected, tolerance)
        if difference:
            yield f"step {step + 1}, rank {rank}, {when}: {difference}"


def _difference(note: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float) -> str:
    """Say how a batch differs from that of the uninterrupted run; empty when it does not."""
    position = _position(note)
    if position != _position(expected):
        return f"{position} instead of {_position(expected)}"
    if note.get("content") != expected.get("content"):
        return f"other values in the batch that ends at {position}"
    are_nan = math.isnan(note["loss"]) and math.isnan(expected["loss"])
    if not are_nan and not math.isclose(note["loss"], expected["loss"], rel_tol=tolerance, abs_tol=0.0):
        return f"loss {note['loss']!r} instead of {expected['loss']!r}"
    return ""


def _position(note: Mapping[str, Any]) -> str:
    return f"sample {note.get('samples')} of epoch {note.get('epoch')}"
