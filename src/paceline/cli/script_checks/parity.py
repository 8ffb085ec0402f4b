"""`paceline parity`: checks that a script trains the same on one process and on several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.cli.schema_flags import given_flags
from paceline.cli.script_checks.comparison import BASES, Training, compare, explain
from paceline.cli.script_checks.script_runs import (
    ScriptCheckFailed,
    ScriptRuns,
    check_script,
    run_options,
    script_command,
)
from paceline.cli.sources import one_process, resolve_sources
from paceline.config import Recording
from paceline.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paceline.cli.script_checks.comparison import Difference
    from paceline.config import Resolved

_HELP = """Check that SCRIPT trains the same on several processes as on one with the same global batch.

SCRIPT runs twice for --steps optimizer steps, unchanged: on one process, and with the processes and strategy of the
flags, the environment and the file, as under `paceline launch`. For each optimizer step the samples, the loss, the
gradient norm (before clipping) and the learning rate are compared. The first step that differs is shown with the usual
cause. The exit code is 0 if no step differs, else 1.

\b
    paceline parity train.py
    paceline parity --num_processes 4 --use_fsdp --steps 50 train.py --lr 1e-3
    paceline parity --link data train.py --data data/small

The single process takes the batches of all ranks as one batch: the same samples in the same number of micro-batches,
steps and epochs. That needs N times the memory for samples, so use few processes or small batches. Dropout is off in
both runs, since each rank draws its own mask, and a script that does not seed torch is seeded with 0. Streams can have
at most one worker.

At the first step losses may differ by 1e-5 relative (fp32; 1e-3 with TF32, 1e-2 in fp16, 2e-2 in bf16), and gradient
norms by 10 times that; each further step adds half of the first tolerance.

Each run has its own empty working directory. Name the files that the script reads with --link. In the script's
arguments {folder} stands for that directory.
"""

_MAX_SHOWN = 6


@script_command("parity", _HELP)
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1), help="Optimizer steps to compare.")
@click.option("--tolerance", type=float, help="Relative difference of losses allowed at the first step.")
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
    """Check a script; `_HELP` is what users read."""
    resolved = resolve_sources(given_flags(values), config_file)
    ranks = resolved.config.num_processes or 1
    if resolved.config.spans_machines or ranks == 1:
        count = "several machines" if resolved.config.spans_machines else "1"
        raise UsageError(
            f"parity needs at least 2 processes on this machine (got {count})",
            "It compares one process with several",
            "Give --num_processes 2 or more; on a machine with fewer devices add --cpu",
        )
    recording = Recording("", steps, parity=True, keep_dropout=keep_dropout)
    check_script(
        script,
        arguments,
        resolved,
        link=link,
        keep=keep,
        check=lambda runs: _check(runs, recording, tolerance),
    )


def _check(runs: ScriptRuns, recording: Recording, tolerance: float | None) -> None:
    """Run twice, compare, and print the result."""
    config = runs.resolved.config
    ranks = config.num_processes or 1
    one = _run(runs, "one", replace(recording, plays=ranks), one_process(runs.resolved))
    several = _run(runs, "several", recording, runs.resolved)
    click.echo(f"ran      {len(one.steps)} steps on 1 process, {len(several.steps)} on {ranks} ({config.strategy})")
    for note in _notes_of(one, recording):
        click.echo(f"note     {note}")
    base = tolerance if tolerance is not None else _base(config.mixed_precision, one)
    by_step = compare(one, several, base)
    first = next((differences for differences in by_step if differences), None)
    if first is None:
        click.echo(_worst(one, several))
        click.echo(
            f"PASS     losses, gradient norms, learning rates and samples agree (losses within {base:g} at first)"
        )
        return
    _print_differences(first)
    for reason in explain(several, first, dropout_kept=recording.keep_dropout):
        click.echo(f"usually  {reason}")
    count = sum(bool(differences) for differences in by_step[1:])
    raise ScriptCheckFailed(f"{_position(first)}; {count} of {len(by_step) - 1} steps differ")


def _run(runs: ScriptRuns, name: str, recording: Recording, resolved: Resolved) -> Training:
    failure = runs.start(name, "run", recording, resolved)
    count = "one process" if name == "one" else f"{resolved.config.num_processes} processes"
    if failure is not None:
        raise ScriptCheckFailed(f"the run on {count} failed", failure)
    notes = runs.notes(name, "run")
    if not notes:
        why = runs.why_nothing_recorded()
        raise ScriptCheckFailed(f"the script built no Accelerator of paceline, so there is nothing to compare{why}")
    training = Training.read(notes)
    if not training.steps:
        raise ScriptCheckFailed(
            f"the run on {count} took no optimizer step through accelerator.backward and optimizer.step"
        )
    return training


def _base(precision: str, one: Training) -> float:
    return BASES["tf32"] if precision == "no" and one.matmul != "highest" else BASES[precision]


def _notes_of(one: Training, recording: Recording) -> Iterator[str]:
    if not one.seeded:
        yield "the script had not seeded torch when it built its Accelerator: seeded with 0"
    if one.dropout and not recording.keep_dropout:
        yield "dropout was turned off in both runs"
    if len(one.steps) < recording.stop_at:
        yield f"the script ended after {len(one.steps)} of {recording.stop_at} steps"


def _worst(one: Training, several: Training) -> str:
    """Return the largest differences, which rounding explains."""
    pairs = list(zip(one.steps, several.steps, strict=False))
    loss = max(_relative(a.loss, b.loss) for a, b in pairs)
    norm = max(_relative(a.norms[index], b.norms[index]) for a, b in pairs for index in a.norms if index in b.norms)
    return f"largest relative difference: loss {loss:.1e}, gradient norm {norm:.1e}"


def _relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), abs(other), 1e-8)


def _print_differences(differences: Sequence[Difference]) -> None:
    for difference in differences[:_MAX_SHOWN]:
        where = f"step {difference.step + 1}: " if difference.step >= 0 else ""
        if difference.kind == "weights" or difference.one == difference.several:
            click.echo(f"differs  {where}{difference.what}")
            continue
        one, several = f"{difference.one:.9g}", f"{difference.several:.9g}"
        click.echo(f"differs  {where}{difference.what}: {one} on one process, {several} on several")


def _position(first: Sequence[Difference]) -> str:
    step = first[0].step
    return "before the first step" if step < 0 else f"the first difference is in step {step + 1}"
