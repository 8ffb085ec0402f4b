"""`paceline parity`: whether a script trains the same on one process and on several."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.cli.comparison import BASES, Training, compare, explain
from paceline.cli.schema_flags import SETTINGS, SchemaCommand, given_flags, schema_options
from paceline.cli.script_runs import Runs, run_options, runs_of, script_argument
from paceline.cli.sources import resolve_sources
from paceline.cli.variants import alone
from paceline.config import Recording
from paceline.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.cli.comparison import Difference
    from paceline.config import Resolved

_HELP = """Check that SCRIPT trains the same on several processes as on one with the same global batch.

SCRIPT is run twice for --steps optimizer steps, unchanged: on one process, and on the processes and under the strategy
that the flags, the environment and the file ask for, as under `paceline launch`. Compared are, for each optimizer step,
the samples, the loss, the gradient norm (before clipping) and the learning rate. The first step that differs is shown,
with what usually is behind it. The exit code is 0 if nothing differs, else 1.

\b
    paceline parity train.py
    paceline parity --num_processes 4 --use_fsdp --steps 50 train.py --lr 1e-3
    paceline parity --link data train.py --data data/small

The one process gets, as one batch, the batches that the ranks get at the same moment, in the order of the ranks: the
same samples in as many micro-batches, steps and epochs, so that the script's own counting is the same. That is N times
the samples in memory: choose few processes or small batches. Dropout is off in both runs (what it drops is drawn by
each rank for itself), and a script that does not seed torch is seeded with 0. Streams are compared with at most one
worker.

Losses may differ by 1e-5 relative at the first step (fp32; 1e-3 with TF32, 1e-2 in fp16, 2e-2 in bf16), gradient norms
by 10 times that, and both by half as much again after each step.

Each run has an empty folder of its own as working directory. Name what the script reads from here with --link. In the
script's own arguments {folder} stands for that folder.
"""

_SHOWN = 6


@click.command(
    name="parity",
    cls=SchemaCommand,
    help=_HELP,
    context_settings={**SETTINGS, "allow_interspersed_args": False},
    params=schema_options(),
)
@script_argument
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1), help="Optimizer steps to compare.")
@click.option("--tolerance", type=float, help="Relative difference of losses at the first step.")
@click.option("--keep_dropout", is_flag=True, help="Leave dropout on, where the script makes it the same on all ranks.")
@run_options
def command(
    script: Path,
    arguments: tuple[str, ...],
    steps: int,
    tolerance: float | None,
    keep_dropout: bool,
    link: tuple[Path, ...],
    config_file: Path | None,
    keep: Path | None,
    **values: Any,
) -> None:
    """Check a script; the text above is what people read."""
    resolved = resolve_sources(given_flags(values), config_file)
    ranks = resolved.config.num_processes or 1
    if resolved.config.spans_machines or ranks == 1:
        asked = "several machines" if resolved.config.spans_machines else "one process"
        raise UsageError(
            f"parity is asked for {asked}",
            "It compares one process with several on this machine",
            "Give --num_processes 2 or more; on a machine with fewer devices add --cpu",
        )
    recording = Recording("", steps, parity=True, keep_dropout=keep_dropout)
    with runs_of(script, arguments, resolved, link, keep) as runs:
        fine = _check(runs, recording, tolerance)
    sys.exit(0 if fine else 1)


def _check(runs: Runs, recording: Recording, tolerance: float | None) -> bool:
    """Run twice and compare; print what was found."""
    ranks = runs.resolved.config.num_processes or 1
    one = _run(runs, "one", replace(recording, plays=ranks), alone(runs.resolved))
    several = _run(runs, "several", recording, runs.resolved) if one is not None else None
    if one is None or several is None:
        return False
    strategy = runs.resolved.config.strategy
    click.echo(f"ran      {len(one.steps)} steps on 1 process, {len(several.steps)} on {ranks} ({strategy})")
    for note in _notes_of(one, recording):
        click.echo(f"note     {note}")
    precision = runs.resolved.config.mixed_precision
    base = tolerance if tolerance is not None else _base(precision, one)
    found = compare(one, several, base)
    first = next((differences for differences in found if differences), None)
    if first is None:
        click.echo(_worst(one, several))
        click.echo(
            f"PASS     losses, gradient norms, learning rates and samples agree (losses within {base:g} at first)"
        )
        return True
    _tell(first, found)
    for reason in explain(several, first, dropout_kept=recording.keep_dropout):
        click.echo(f"usually  {reason}")
    steps = sum(bool(differences) for differences in found[1:])
    click.echo(f"FAIL     {_place(first)}; {steps} of {len(found) - 1} steps differ")
    return False


def _run(runs: Runs, name: str, recording: Recording, resolved: Resolved) -> Training | None:
    failure = runs.start(name, "run", recording, resolved)
    count = "one process" if name == "one" else f"{resolved.config.num_processes} processes"
    if failure is not None:
        click.echo(str(failure).rstrip())
        if "No such file" in str(failure):
            click.echo("hint     the runs have folders of their own: name what the script reads with --link")
        return _fail(f"the run on {count} failed")
    notes = runs.notes(name, "run")
    if not notes:
        return _fail("the script built no Accelerator, so that there was nothing to compare")
    training = Training.read(notes)
    if not training.steps:
        return _fail(f"the run on {count} took no optimizer step through accelerator.backward and optimizer.step")
    return training


def _fail(why: str) -> Training | None:
    click.echo(f"FAIL     {why}")
    return None


def _base(precision: str, one: Training) -> float:
    return BASES["tf32"] if precision == "no" and one.matmul != "highest" else BASES[precision]


def _notes_of(one: Training, recording: Recording) -> Sequence[str]:
    notes = []
    if not one.seeded:
        notes.append("the script had not seeded torch when it built its Accelerator: seeded with 0")
    if one.dropout and not recording.keep_dropout:
        notes.append("dropout was turned off in both runs")
    if len(one.steps) < recording.stop_at:
        notes.append(f"the script ended after {len(one.steps)} of {recording.stop_at} steps")
    return notes


def _worst(one: Training, several: Training) -> str:
    """The greatest differences, which rounding explains."""
    pairs = list(zip(one.steps, several.steps, strict=False))
    loss = max(_relative(a.loss, b.loss) for a, b in pairs)
    norm = max(_relative(a.norms[index], b.norms[index]) for a, b in pairs for index in a.norms if index in b.norms)
    return f"greatest relative difference: loss {loss:.1e}, gradient norm {norm:.1e}"


def _relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), abs(other), 1e-8)


def _tell(first: Sequence[Difference], found: Sequence[Sequence[Difference]]) -> None:
    for difference in first[:_SHOWN]:
        where = f"step {difference.step + 1}: " if difference.step >= 0 else ""
        if difference.kind == "weights" or difference.one == difference.several:
            click.echo(f"differs  {where}{difference.what}")
            continue
        one, several = f"{difference.one:.9g}", f"{difference.several:.9g}"
        click.echo(f"differs  {where}{difference.what}: {one} on one process, {several} on several")


def _place(first: Sequence[Difference]) -> str:
    step = first[0].step
    return "before the first step" if step < 0 else f"the first difference is in step {step + 1}"
