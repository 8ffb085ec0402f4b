"""`paceline launch`: its flags are made from the configuration's one schema."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.cli.interrupts import import_torch
from paceline.cli.paths import PathType
from paceline.cli.schema_flags import SETTINGS, SchemaCommand, complete_files, given_flags, schema_options
from paceline.cli.slurm import slurm_options, take_slurm_flags
from paceline.cli.sources import resolve_sources

if TYPE_CHECKING:
    from paceline.config import Resolved
    from paceline.launch import Command

_HELP = """Run SCRIPT on all devices of this machine, or as many processes as you ask for.

Without flags and without a configuration file everything is detected: one process for each GPU, two on a
machine without. Flags stand before the script; what follows it is the script's own. Flags may be written with
- or _, and a flag beats the environment (PACELINE_MIXED_PRECISION=bf16), which beats the file.

\b
    paceline launch train.py --lr 1e-3
    paceline launch --num_processes 4 --mixed_precision bf16 train.py
    paceline launch --use_fsdp --fsdp_offload_params true train.py
    paceline launch --config_file fsdp.yaml -m my_package.train
    paceline launch --num_machines 2 --machine_rank 1 --main_process_ip head train.py
    paceline launch --dry-run train.py

Inside a job of Slurm or Kubernetes no flags are needed: `srun paceline launch train.py`, with one task on each
machine or one for each rank. --slurm writes and submits the job:

\b
    paceline launch --slurm --slurm_nodes 2 --slurm_gpus_per_node 8 --slurm_time 24:00:00 train.py
"""


def _both_or_none(ctx: click.Context, param: click.Parameter, value: str) -> bool:
    """Read torchrun's number for the streams that are shown."""
    if value not in ("0", "3"):
        raise click.BadParameter(f"{value} asks for one stream; both are shown (3, or no value), or none (0).")
    return value == "3"


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
@click.option("--no_python", is_flag=True, help="SCRIPT is a program to run as it is.")
@click.option("--dry_run", is_flag=True, help="Print the processes and their variables; start nothing.")
@click.option("--log_dir", type=PathType(path_type=Path), help="Write each rank's output into files here.")
@click.option(
    *("-t", "--tee"),
    metavar="STREAMS",
    default="0",
    callback=_both_or_none,
    help="With --log_dir: show the ranks' lines as well. 3, as torchrun counts, or no value: both streams.",
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
    """Run a script; the text above is what people read."""
    if module and no_python:
        raise click.UsageError("--module and --no_python exclude each other: a module needs Python.")
    kind: Any = "module" if module else "program" if no_python else "script"
    submission = take_slurm_flags(values)
    if submission is not None:
        from paceline.launch.command import Command

        what = Command(script=script, arguments=arguments, kind=kind)
        asked = given_flags(values)
        submission.run(what, asked, config_file, log_dir=log_dir, tee=tee, quiet=quiet, dry_run=dry_run)
        return
    resolved = resolve_sources(given_flags(values), config_file)
    if not quiet:
        for note in resolved.notes:
            click.echo(f"paceline: {note}", err=True)
    # The help, and a configuration that cannot work, come without importing torch.
    import_torch()
    from paceline.launch import launch, launch_deepspeed, plan, plan_deepspeed
    from paceline.launch.command import Command
    from paceline.launch.planning import performance_hints
    from paceline.launch.schedulers.mpirun import launch_mpirun, plan_mpirun

    what = Command(script=script, arguments=arguments, kind=kind)
    if _is_rank(resolved, what, log_dir, dry_run):
        return
    if not quiet:
        for remark in performance_hints(resolved.config, os.environ):
            click.echo(f"paceline: {remark}", err=True)
    by_mpirun, several = resolved.config.mpirun_config is not None, resolved.config.spans_machines
    if dry_run:
        make = plan_mpirun if by_mpirun else plan_deepspeed if several else plan
        click.echo(str(make(resolved, what, os.environ)))
        return
    if (by_mpirun or several) and log_dir is not None:
        starter = "mpirun" if by_mpirun else "DeepSpeed's launcher"
        raise click.UsageError(f"--log_dir: {starter} starts the ranks; each writes to the console.")
    if by_mpirun:
        launch_mpirun(resolved, what, env=os.environ)
    elif several:
        launch_deepspeed(resolved, what, env=os.environ)
    else:
        launch(resolved, what, env=os.environ, log_dir=log_dir, tee=tee)


def _is_rank(resolved: Resolved, what: Command, log_dir: Path | None, dry_run: bool) -> bool:
    """Where a scheduler started a task for each rank, become that rank, or print it and say that it was one."""
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
    planned = plan_task(resolved, what, os.environ, cluster)
    if not dry_run:
        run_task(planned, os.environ)
    click.echo(str(planned))
    return True
