"""`paceline launch`: its flags are made from the configuration's one schema."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from paceline.cli.schema_flags import SETTINGS, SchemaCommand, complete_files, given_flags, schema_options
from paceline.cli.sources import resolve_sources

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
"""


@click.command(
    name="launch",
    cls=SchemaCommand,
    help=_HELP,
    context_settings={**SETTINGS, "allow_interspersed_args": False},
    params=schema_options(),
)
@click.argument("script", shell_complete=complete_files)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--config_file", type=click.Path(path_type=Path), help="YAML or JSON file to read.")
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module, as in `python -m`.")
@click.option("--no_python", is_flag=True, help="SCRIPT is a program to run as it is.")
@click.option("--dry_run", is_flag=True, help="Print the processes and their variables; start nothing.")
@click.option("--log_dir", type=click.Path(path_type=Path), help="Write each rank's output into files here.")
@click.option("-t", "--tee", is_flag=True, help="With --log_dir: show the ranks' lines as well.")
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
    resolved = resolve_sources(given_flags(values), config_file)
    if not quiet:
        for note in resolved.notes:
            click.echo(f"paceline: {note}", err=True)
    # The help, and a configuration that cannot work, come without importing torch.
    from paceline.launch import Command, launch, launch_machines, plan, plan_machines

    kind: Any = "module" if module else "program" if no_python else "script"
    what = Command(script=script, arguments=arguments, kind=kind)
    several = resolved.config.spans_machines
    if dry_run:
        click.echo(str((plan_machines if several else plan)(resolved, what, os.environ)))
        return
    if several:
        if log_dir is not None:
            raise click.UsageError("--log_dir: DeepSpeed's launcher starts the ranks; each writes to the console.")
        launch_machines(resolved, what, env=os.environ)
        return
    launch(resolved, what, env=os.environ, log_dir=log_dir, tee=tee)
