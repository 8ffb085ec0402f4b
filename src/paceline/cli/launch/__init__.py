"""`paceline launch`: runs a script; its flags are made from the configuration's schema."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.cli.click_helpers import PathType
from paceline.cli.interrupts import import_torch
from paceline.cli.launch.slurm import slurm_options, take_slurm_flags
from paceline.cli.schema_flags import SETTINGS, SchemaCommand, complete_files, given_flags, schema_options
from paceline.cli.sources import resolve_sources
from paceline.errors import ConfigError
from paceline.launch.command import Command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from paceline.config import Resolved

_HELP = """Run SCRIPT on all devices of this machine, or with the number of processes that you give.

Without flags and without a configuration file everything is detected: one process for each GPU, two on a machine
without. Flags come before the script; what follows the script is passed to it. Flags can be written with - or _. A
flag overrides the environment (PACELINE_MIXED_PRECISION=bf16), which overrides the file.

\b
    paceline launch train.py --lr 1e-3
    paceline launch --num_processes 4 --mixed_precision bf16 train.py
    paceline launch --use_fsdp --fsdp_offload_params true train.py
    paceline launch --config_file fsdp.yaml -m my_package.train
    paceline launch --num_machines 2 --machine_rank 1 --main_process_ip head train.py
    paceline launch --dry_run train.py

Inside a job of Slurm or Kubernetes no flags are needed: `srun paceline launch train.py`, with one task per machine or
one per rank. --slurm writes and submits the job:

\b
    paceline launch --slurm --slurm_nodes 2 --slurm_gpus_per_node 8 --slurm_time 24:00:00 train.py

Scripts that use Accelerate, or the Trainer of transformers, act on the same settings. --as_accelerate runs them on
paceline: `import accelerate` then finds its stand-in.

\b
    paceline launch --as_accelerate --use_fsdp train_with_transformers.py

The exit code is 0 if all ranks succeed, 2 if the configuration is wrong (nothing is started), 75 if the run saved its
state on a signal and can be started again, 76 if ranks waited too long for others, else that of the failed rank.
"""


def _shows_both_streams(ctx: click.Context, param: click.Parameter, value: str) -> bool:
    """Read torchrun's number of the streams to show."""
    if value not in ("0", "3"):
        raise click.BadParameter(f"{value} selects one stream; paceline shows both (3, or no value) or none (0).")
    return value == "3"


_LAUNCHERS_OWN = frozenset({"dry_run", "multi_gpu", "num_machines", "num_processes", "use_deepspeed", "use_fsdp"})


@click.command(
    name="launch",
    cls=SchemaCommand,
    help=_HELP,
    context_settings={**SETTINGS, "allow_interspersed_args": False},
    params=[*schema_options(), *slurm_options()],
)
@click.argument("script", shell_complete=complete_files)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--config_file", type=PathType(path_type=Path), help="YAML or JSON file to read.")
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module, as in `python -m`.")
@click.option("--no_python", is_flag=True, help="SCRIPT is a program that is not run by Python.")
@click.option("--dry_run", is_flag=True, help="Print the processes and their variables; start nothing.")
@click.option("--log_dir", type=PathType(path_type=Path), help="Write each rank's output to files in this folder.")
@click.option(
    *("-t", "--tee"),
    metavar="STREAMS",
    default="0",
    callback=_shows_both_streams,
    help="With --log_dir: also show the output. 3 (as for torchrun) or no value: both streams; 0: none.",
)
@click.option("-q", "--quiet", is_flag=True, help="Do not print notes about the configuration.")
def command(
    script: str,
    arguments: tuple[str, ...],
    config_file: Path | None,
    module: bool,
    no_python: bool,
    dry_run: bool,
    log_dir: Path | None,
    tee: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Run a script; `_HELP` is what users read."""
    if module and no_python:
        raise click.UsageError("--module and --no_python exclude each other: a module needs Python.")
    kind: Any = "script"
    if module or no_python:
        kind = "module" if module else "program"
    to_run = Command(script=script, arguments=arguments, kind=kind)
    submission = take_slurm_flags(values)
    flags = given_flags(values)
    with _outcome_of_problems():
        if submission is not None:
            submission.run(to_run, flags, config_file, log_dir=log_dir, tee=tee, quiet=quiet, dry_run=dry_run)
            return
        resolved = resolve_sources(flags, config_file)
        if not quiet:
            _print_notes([*resolved.notes, *_misplaced(arguments)])
        # The help and errors of the configuration come without importing torch.
        import_torch()
        _reject_not_carried(resolved, to_run)
        if _run_as_rank(resolved, to_run, log_dir, dry_run):
            return
        if not quiet:
            from paceline.launch.planning import performance_hints

            _print_notes(performance_hints(resolved.config, os.environ))
        _start(resolved, to_run, log_dir=log_dir, tee=tee, dry_run=dry_run)


@contextmanager
def _outcome_of_problems() -> Iterator[None]:
    """Add to a `ConfigError` that nothing was started: ranks that have been raise a `WorkerError`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(error.problems, "nothing was started") from error


def _reject_not_carried(resolved: Resolved, command: Command) -> None:
    """Raise where the script's own text shows that it would not learn about some settings."""
    from paceline.launch.accelerate_variables import installed_target, not_carried
    from paceline.launch.accelerators import count_accelerators
    from paceline.launch.script_imports import trains_with_accelerate

    if trains_with_accelerate(command):
        target = installed_target(resolved, resolved.config.num_processes or 1, count_accelerators()[0])
        problems = not_carried(resolved, target)
        if problems:
            raise ConfigError(problems)


def _misplaced(arguments: Sequence[str]) -> list[str]:
    """A note about flags behind the script that hardly any script has itself."""
    found = [word for word in arguments if word.partition("=")[0].replace("-", "_").strip("_") in _LAUNCHERS_OWN]
    if not found:
        return []
    return [f"the script gets {' '.join(found)}: flags of the launcher come before the script"]


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        click.echo(f"paceline: {note}", err=True)


def _start(resolved: Resolved, command: Command, *, log_dir: Path | None, tee: bool, dry_run: bool) -> None:
    """Start the ranks with torch elastic, DeepSpeed's launcher or mpirun; or print the plan."""
    from paceline.launch import launch, launch_deepspeed, plan, plan_deepspeed
    from paceline.launch.schedulers.mpirun import launch_mpirun, plan_mpirun

    make_plan: Callable[..., object] = plan
    start: Callable[..., object] = partial(launch, log_dir=log_dir, tee=tee)
    other_launcher = ""
    if resolved.config.mpirun_config is not None:
        make_plan, start, other_launcher = plan_mpirun, launch_mpirun, "mpirun"
    elif resolved.config.spans_machines:
        make_plan, start, other_launcher = plan_deepspeed, launch_deepspeed, "DeepSpeed's launcher"
    if dry_run:
        click.echo(str(make_plan(resolved, command, os.environ)))
        return
    if other_launcher and log_dir is not None:
        raise click.UsageError(f"--log_dir: {other_launcher} starts the ranks; each writes to the console.")
    start(resolved, command, env=os.environ)


def _run_as_rank(resolved: Resolved, command: Command, log_dir: Path | None, dry_run: bool) -> bool:
    """Become a rank where a scheduler started one task per rank.

    Returns:
        False where this process is not a rank; under `--dry_run` the plan is printed instead.
    """
    from paceline.launch.clusters import detect_cluster
    from paceline.launch.schedulers.sbatch import reject_partial_allocation
    from paceline.launch.schedulers.task import plan_task, run_task

    cluster = detect_cluster(os.environ)
    if cluster is None and not resolved.origin("num_machines").is_explicit and not resolved.config.spans_machines:
        reject_partial_allocation(os.environ)
    if cluster is None or cluster.task == "machine":
        return False
    if log_dir is not None:
        raise click.UsageError(f"--log_dir: {cluster.scheduler} started this rank, and keeps its output.")
    planned = plan_task(resolved, command, os.environ, cluster)
    if not dry_run:
        run_task(planned, os.environ)
    click.echo(str(planned))
    return True
