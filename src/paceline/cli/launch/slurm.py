"""`paceline launch --slurm`: its flags, and the submission of the job."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.config import Detected, find_config_file, resolve
from paceline.errors import UsageError
from paceline.launch.command import check_command
from paceline.launch.schedulers.sbatch import Allocation, batch_options, batch_script, submit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.config import Resolved
    from paceline.launch.command import Command

__all__ = ["Submission", "slurm_options", "take_slurm_flags"]


_LAUNCH = (sys.executable, "-m", "paceline", "launch")


class _SlurmOption(click.Option):
    topic = "Slurm"


def slurm_options() -> list[click.Parameter]:
    """Return the flags that write and submit a batch script."""
    return [
        _SlurmOption(["--slurm"], is_flag=True, help="Submit a batch script that launches SCRIPT, and return."),
        _SlurmOption(["--slurm_nodes"], type=click.IntRange(1), help="Number of machines.  [default: 1]"),
        _SlurmOption(["--slurm_gpus_per_node"], type=click.IntRange(0), help="Number of GPUs of each machine."),
        _SlurmOption(["--slurm_partition"], help="Partition (queue); default: that of Slurm."),
        _SlurmOption(["--slurm_time"], help="Time limit, such as 24:00:00; default: that of the partition."),
        _SlurmOption(
            ["--slurm_option"],
            multiple=True,
            metavar="KEY[=VALUE]",
            help="Any other option of sbatch, such as account=abc or exclusive; may be repeated.",
        ),
    ]


class Submission:
    """A Slurm job, as the flags describe it.

    Args:
        flags: The flags of Slurm by name, without `slurm_`.
    """

    def __init__(self, flags: Mapping[str, Any]) -> None:
        options = dict(_split(text) for text in flags["option"])
        for key, flag in (("nodes", "nodes"), ("partition", "partition"), ("time", "time")):
            if key in options and flags[flag] is not None:
                raise click.UsageError(f"--slurm_option {key} and --slurm_{flag} set the same: give one of the two.")
        nodes = options.get("nodes", str(flags["nodes"] or 1))
        if not nodes.isdecimal():
            raise click.UsageError(f"--slurm_option nodes={nodes}: the number of machines must be one number.")
        self.allocation = Allocation(
            nodes=int(nodes),
            gpus_per_node=flags["gpus_per_node"],
            partition=flags["partition"],
            time=flags["time"],
            options=options,
        )

    def run(
        self,
        command: Command,
        flags: Mapping[str, object],
        config_file: Path | None,
        *,
        log_dir: Path | None,
        tee: bool,
        quiet: bool,
        dry_run: bool,
    ) -> None:
        """Check the configuration, write the batch script, submit it, and print how to follow the job."""
        check_command(command, os.environ)
        file = find_config_file(os.environ, config_file)
        machines = {"num_machines": Detected(self.allocation.nodes, "--slurm_nodes")}
        resolved = resolve(flags=flags, env=os.environ, file=file, detected=machines, starts_ranks=True)
        _refuse_other_starters(resolved)
        for note in () if quiet else resolved.notes:
            click.echo(f"paceline: {note}", err=True)
        name = Path(command.script).stem
        folder = (log_dir or Path("runs", "slurm", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")).absolute()
        logs = [*([f"--log_dir={folder}"] if log_dir else []), *["--tee"] * tee, *["--quiet"] * quiet]
        words = [*_LAUNCH, *logs, *_rest_of_launch(command, flags, file)]
        text = batch_script(batch_options(self.allocation, name, folder), words, Path.cwd())
        if dry_run:
            click.echo(text, nl=False)
            return
        script = _write(folder, text)
        job = submit(script, os.environ)
        log = (self.allocation.options or {}).get("output", f"{folder}/%j.log").replace("%j", job)
        click.echo(f"submitted job {job}; its script is {script}")
        click.echo(f"  output   tail -F {shlex.quote(log)}")
        click.echo(f"  state    squeue --job {job}")
        click.echo(f"  end it   scancel {job}")


def take_slurm_flags(values: dict[str, Any]) -> Submission | None:
    """Remove the flags of Slurm from all flags; return None without `--slurm`."""
    flags = {name.removeprefix("slurm_"): values.pop(name) for name in list(values) if name.startswith("slurm_")}
    if values.pop("slurm"):
        return Submission(flags)
    given = [f"--slurm_{name}" for name, value in flags.items() if value not in (None, ())]
    if given:
        raise click.UsageError(f"{', '.join(given)}: these flags need --slurm.")
    return None


def _split(text: str) -> tuple[str, str]:
    key, _, value = text.lstrip("-").partition("=")
    return key, value


def _refuse_other_starters(resolved: Resolved) -> None:
    """Raise `UsageError` when mpirun or DeepSpeed's launcher would start ranks on the machines too."""
    config = resolved.config
    if config.mpirun_config is not None or config.spans_machines:
        starter = "mpirun" if config.mpirun_config is not None else "DeepSpeed's launcher"
        raise UsageError(
            f"--slurm conflicts with {starter} in the configuration",
            "Slurm starts a launcher on each machine of the job, and each would start ranks on all of them",
            "Leave one of the two out; `paceline config show --explain` shows where the settings come from",
        )


def _rest_of_launch(command: Command, flags: Mapping[str, object], file: Path | None) -> Iterator[str]:
    """Yield the words of the same launch, for each machine of the job."""
    if file is not None:
        yield f"--config_file={file.absolute()}"
    yield from (f"--{name}={value}" for name, value in flags.items())
    if command.kind != "script":
        yield {"module": "--module", "program": "--no_python"}[command.kind]
    yield command.script
    yield from command.arguments


def _write(folder: Path, text: str) -> Path:
    script = folder / "job.sh"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        script.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"The batch script cannot be written to {str(folder)!r}",
            error.strerror or str(error),
            "Give --log_dir a writable folder on a disk that all machines share",
        ) from error
    return script
