"""Batch scripts for Slurm, written to be read, edited and submitted again."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from paceline.errors import PREEMPTED, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Allocation", "batch_options", "batch_script", "reject_partial_allocation", "submit"]

_WARNING: Final = "USR1@120"
"""The signal that Slurm sends to every launcher, and how many seconds before the time limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What a job requests from Slurm.

    Attributes:
        nodes: Number of machines.
        gpus_per_node: Devices per machine; None requests none.
        partition: The partition; None is Slurm's default.
        time: Time limit in Slurm's format, such as 24:00:00; None is the partition's.
        options: More options of sbatch without their dashes; they override all others, an empty value is a switch.
    """

    nodes: int = 1
    gpus_per_node: int | None = None
    partition: str | None = None
    time: str | None = None
    options: Mapping[str, str] | None = None


def batch_options(allocation: Allocation, name: str, folder: Path) -> dict[str, str]:
    """Return sbatch's options, by their names without dashes."""
    chosen = {
        "job-name": name,
        "nodes": str(allocation.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": "" if allocation.gpus_per_node is None else str(allocation.gpus_per_node),
        "partition": allocation.partition or "",
        "time": allocation.time or "",
        "output": f"{folder}/%j.log",
        "open-mode": "append",
        "signal": _WARNING,
    }
    return {**{key: value for key, value in chosen.items() if value}, "requeue": "", **(allocation.options or {})}


def batch_script(options: Mapping[str, str], command: Sequence[str], directory: Path) -> str:
    """Return the script: sbatch's options, then one launcher per machine; the job is requeued after a preemption."""
    directives = "\n".join(f"#SBATCH --{key}{f'={value}' if value else ''}" for key, value in options.items())
    return f"""#!/bin/bash
# Written by `paceline launch --slurm`.
{directives}

cd {shlex.quote(str(directory))} || exit

# One launcher per machine; it starts a rank for each device that Slurm has allocated there.
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --cpus-per-task="${{SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}}" \\
    {shlex.join(command)}
code=$?

# {PREEMPTED}: the run was preempted and has saved its state. It resumes when the job is started again.
if [ "$code" -eq {PREEMPTED} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def submit(script: Path, env: Mapping[str, str]) -> str:
    """Submit a batch script and return the job ID.

    Raises:
        UsageError: sbatch is not installed, or it refused the job; the error has its message.
    """
    program = shutil.which("sbatch", path=env.get("PATH"))
    if program is None:
        raise UsageError(
            "There is no program 'sbatch' in PATH",
            "--slurm submits the job with it",
            f"Run this on a login node of the cluster, or submit {script} there; --dry_run only shows the script",
        )
    done = subprocess.run([program, "--parsable", str(script)], env=env, text=True, capture_output=True, check=False)
    if done.returncode:
        raise UsageError(
            f"sbatch refused {script}: {done.stderr.strip()}",
            "Slurm did not accept the job",
            "Change the --slurm flags, or edit the script and submit it with sbatch",
        )
    return done.stdout.strip().partition(";")[0]


def reject_partial_allocation(env: Mapping[str, str]) -> None:
    """Raise `UsageError` in the batch script of a job with several machines, where only this one would train."""
    nodes = env.get("SLURM_JOB_NUM_NODES", "1")
    if not env.get("SLURM_STEP_ID") and nodes.isdecimal() and int(nodes) > 1:
        raise UsageError(
            f"Slurm has allocated {nodes} machines to this job ({env.get('SLURM_JOB_NODELIST', '')}), and this is one",
            "A launcher starts ranks on its own machine only: the others would be idle",
            "Put srun before it: `srun --ntasks-per-node=1 paceline launch …` starts a launcher on each machine; "
            "or pass --num_machines 1",
        )
