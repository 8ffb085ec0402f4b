"""`paceline verify-resume`: whether a script that is killed and started again trains as if nothing had happened."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.cli.schema_flags import SETTINGS, SchemaCommand, given_flags, schema_options
from paceline.cli.script_runs import Runs, run_options, runs_of, script_argument
from paceline.cli.sources import resolve_sources
from paceline.config import Recording
from paceline.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.errors import WorkerError

_HELP = """Check that SCRIPT resumes exactly: run it, kill it with SIGKILL, run it again, and compare.

SCRIPT is run three times: for --steps optimizer steps without a break; again until --kill_at steps, when one of its
processes is killed; and once more, when it should find its checkpoint by itself (`accelerator.load_state()`) and go on.
Every batch and every loss of the interrupted run, steps that it repeats included, must be those of the run that was
never stopped. The exit code is 0 if they are, else 1.

Each run has an empty folder of its own as working directory, so that a checkpoint in `runs/a` is found only by the run
that belongs to it. Name what the script reads from here with --link. In the script's own arguments {folder} stands for
that folder.

\b
    paceline verify-resume train.py
    paceline verify-resume --steps 40 --kill_at 25 --num_processes 2 --use_fsdp train.py --lr 1e-3
    paceline verify-resume --link data train.py --output_dir {folder}/out

The script saves with `save_state` before step --kill_at, and calls nothing else for this: `backward` and the prepared
loaders take the notes.
"""

_OUTSIDE = (
    "it found a checkpoint that another run left. Each run has a folder of its own: save into a relative one, or give "
    "the script {folder} where it takes a folder"
)

Key = tuple[int, int, int]
"""Rank, optimizer step, and micro-batch of the step."""


@click.command(
    name="verify-resume",
    cls=SchemaCommand,
    help=_HELP,
    context_settings={**SETTINGS, "allow_interspersed_args": False},
    params=schema_options(),
)
@script_argument
@click.option("--steps", default=20, show_default=True, help="Optimizer steps to compare.")
@click.option("--kill_at", default=11, show_default=True, help="Optimizer step before which the run is killed.")
@click.option("--tolerance", default=0.0, show_default=True, help="Relative difference of losses; 0: to the bit.")
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
    """Check a script; the text above is what people read."""
    if not 0 < kill_at < steps:
        raise UsageError(f"--kill_at {kill_at} with --steps {steps}", "It must lie between 0 and the steps", "")
    resolved = resolve_sources(given_flags(values), config_file)
    with runs_of(script, arguments, resolved, link, keep) as runs:
        fine = _check(runs, steps, kill_at, tolerance)
    sys.exit(0 if fine else 1)


def _check(runs: Runs, steps: int, kill_at: int, tolerance: float) -> bool:
    """Run three times and compare; print what was found."""
    failure = runs.start("straight", "run", Recording("", steps))
    straight = _notes(runs, "straight", "run")
    if failure is not None or not straight:
        return _fail("the run without a break failed" if failure else "the run recorded no backward pass", failure)
    ranks = 1 + max(rank for rank, _, _ in straight)
    found = min(step for _, step, _ in straight)
    if found:
        return _fail(f"the run without a break began at step {found}: {_OUTSIDE}", None)
    click.echo(f"ran      {_steps(straight)} steps on {ranks} rank{'s' if ranks > 1 else ''} without a break")
    if runs.start("killed", "before", Recording("", steps, kill_at)) is None:
        begun = min((step for _, step, _ in _notes(runs, "killed", "before")), default=steps)
        why = f": it began at step {begun}: {_OUTSIDE}" if begun else ""
        return _fail(f"the run ended before step {kill_at}; there was nothing to kill{why}", None)
    click.echo(f"killed   rank {ranks - 1} with SIGKILL before its step {kill_at + 1}")
    failure = runs.start("killed", "after", Recording("", steps))
    before, after = _notes(runs, "killed", "before"), _notes(runs, "killed", "after")
    if failure is not None or not after:
        return _fail("the run that should have resumed failed", failure)
    begun = min(step for _, step, _ in after)
    if begun == 0:
        return _fail(
            "the run that should have resumed began at step 0: it saved no checkpoint before it was killed, or did "
            "not load it (accelerator.load_state() before the loop)",
            None,
        )
    click.echo(f"resumed  from the checkpoint of step {begun}, went on to step {_steps(after)}")
    problems = [*_differences(straight, before, "before the kill", tolerance)]
    problems += _differences(straight, after, "after the resume", tolerance)
    missing = {key for key in straight if key[1] >= begun} - after.keys()
    problems += [f"step {step + 1}, rank {rank}: missing after the resume" for rank, step, _ in sorted(missing)]
    for problem in problems[:8]:
        click.echo(f"differs  {problem}")
    if problems:
        return _fail(f"{len(problems)} of {len(straight)} batches differ", None)
    how = "to the bit" if tolerance == 0 else f"within {tolerance:g}"
    click.echo(f"PASS     {len(before) + len(after)} batches and losses are those of the run without a break, {how}")
    return True


def _notes(runs: Runs, where: str, name: str) -> dict[Key, dict[str, Any]]:
    """What one run recorded."""
    lines = runs.notes(where, name)
    return {(rank, note["step"], note["micro"]): note for rank, notes in lines.items() for note in notes}


def _steps(notes: Mapping[Key, Any]) -> int:
    return 1 + max(step for _, step, _ in notes)


def _fail(why: str, failure: WorkerError | None) -> bool:
    if failure is not None:
        click.echo(str(failure).rstrip())
    click.echo(f"FAIL     {why}")
    return False


def _differences(
    straight: Mapping[Key, dict[str, Any]], other: Mapping[Key, dict[str, Any]], when: str, tolerance: float
) -> Sequence[str]:
    found = []
    for key, note in sorted(other.items()):
        rank, step, _ = key
        where = f"step {step + 1}, rank {rank}, {when}"
        wanted = straight.get(key)
        if wanted is None:
            found.append(f"{where}: the run without a break has no such batch")
        elif (place := _place(note)) != _place(wanted):
            found.append(f"{where}: {place} in place of {_place(wanted)}")
        elif note.get("content") != wanted.get("content"):
            found.append(f"{where}: other values in the batch that ends at {place}")
        elif not math.isclose(note["loss"], wanted["loss"], rel_tol=tolerance, abs_tol=0.0) and not (
            math.isnan(note["loss"]) and math.isnan(wanted["loss"])
        ):
            found.append(f"{where}: loss {note['loss']!r} in place of {wanted['loss']!r}")
    return found


def _place(note: Mapping[str, Any]) -> str:
    return f"sample {note.get('samples')} of epoch {note.get('epoch')}"
