"""A batch script for Slurm that a person can read, change and submit again."""

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
"""What Slurm sends to every launcher, and how many seconds before the time limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What a job asks of Slurm.

    Attributes:
        nodes: Machines.
        gpus_per_node: Devices of each machine; None asks for none.
        partition: Queue; None is Slurm's default.
        time: Limit as Slurm writes it, such as 24:00:00; None is the partition's.
        options: More of sbatch's options without their dashes; these beat all others, an empty value is a switch.
    """

    nodes: int = 1
    gpus_per_node: int | None = None
    partition: str | None = None
    time: str | None = None
    options: Mapping[str, str] | None = None


def batch_options(asked: Allocation, name: str, folder: Path) -> dict[str, str]:
    """Return sbatch's options, by their names without dashes."""
    chosen = {
        "job-name": name,
        "nodes": str(asked.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": "" if asked.gpus_per_node is None else str(asked.gpus_per_node),
        "partition": asked.partition or "",
        "time": asked.time or "",
        "output": f"{folder}/%j.log",
        "open-mode": "append",
        "signal": _WARNING,
    }
    return {**{key: value for key, value in chosen.items() if value}, "requeue": "", **(asked.options or {})}


def batch_script(options: Mapping[str, str], command: Sequence[str], directory: Path) -> str:
    """Write the script: sbatch's options, then one launcher on each machine, queued again when it has made room."""
    asked = "\n".join(f"#SBATCH --{key}{f'={value}' if value else ''}" for key, value in options.items())
    return f"""#!/bin/bash
# Written by `paceline launch --slurm`.
{asked}

cd {shlex.quote(str(directory))} || exit

# One launcher on each machine; it starts a rank for each device that Slurm gave it there.
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --cpus-per-task="${{SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}}" \\
    {shlex.join(command)}
code=$?

# {PREEMPTED}: the run was asked to make room and has saved its state. It goes on when its turn comes again.
if [ "$code" -eq {PREEMPTED} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def submit(script: Path, env: Mapping[str, str]) -> str:
    """Hand a batch script to sbatch; return the number of the job.

    Raises:
        UsageError: There is no sbatch here, or it refuses the job; the message is its own.
    """
    program = shutil.which("sbatch", path=env.get("PATH"))
    if program is None:
        raise UsageError(
            "There is no program 'sbatch' in PATH",
            "--slurm hands the job to Slurm by it",
            f"Run this on a login node of the cluster, or submit {script} there; --dry-run only shows the script",
        )
    done = subprocess.run([program, "--parsable", str(script)], env=env, text=True, capture_output=True, check=False)
    if done.returncode:
        raise UsageError(
            f"sbatch refused {script}: {done.stderr.strip()}",
            "Slurm did not take the job",
            "Change the flags that begin with --slurm, or the script, and submit it with sbatch",
        )
    return done.stdout.strip().partition(";")[0]


def reject_partial_allocation(env: Mapping[str, str]) -> None:
    """Raise `UsageError` in the batch script of a job with several machines, of which only this one would train."""
    nodes = env.get("SLURM_JOB_NUM_NODES", "1")
    if not env.get("SLURM_STEP_ID") and nodes.isdecimal() and int(nodes) > 1:
        raise UsageError(
            f"Slurm gave this job {nodes} machines ({env.get('SLURM_JOB_NODELIST', '')}), and this is one of them",
            "A launcher starts ranks on its own machine: the others would stand idle",
            "Put srun before it: `srun --ntasks-per-node=1 paceline launch …` starts a launcher on each machine; "
            "or say --num_machines 1",
        )
