"""A Slurm of our own for tests: munged, slurmctld and two slurmd on this machine, all in one folder.

Its two machines are this one twice; only the first needs a name that others can look up. As on clusters with control
groups, a signal to a step reaches the tasks that Slurm started, not what these started in sessions of their own.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.ranks import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NODES = (socket.gethostname(), f"{socket.gethostname()}-two")
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue")

CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldLogFile={folder}/slurmctld.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=5
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=all Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Daemons in a folder, and the environment in which their commands find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        ports = [free_port() for _ in range(3)]
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self.folder, ports=ports, nodes=NODES))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        own = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--force", "--foreground", f"--socket={self.folder}/munge.socket", *own)
        wait_for((self.folder / "munge.socket").exists, "munged to listen")
        self._daemon("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        wait_for(lambda: self._is_running() and "all" in self.run("sinfo", check=False), "slurmctld to answer")
        for node in NODES:
            self._daemon("slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", node)
        wait_for(lambda: self.run("sinfo", "--noheader", "--format=%D %T").strip() == "2 idle", "two idle machines")

    def _daemon(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def _is_running(self) -> bool:
        ended = [daemon for daemon in self._daemons if daemon.poll() is not None]
        assert not ended, f"{ended[0].args!r} ended: {(self.folder / 'daemons.log').read_text()}"
        return True

    def stop(self) -> None:
        subprocess.run(["scancel", "--user", "root"], env=self.environment, check=False, capture_output=True)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(60)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, seconds: float = 400) -> str:
        """Run a command of Slurm's, or any other as a user of it would; return all that it wrote."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, text=True, timeout=seconds, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout
        return done.stdout


def wait_for(condition: object, what: str, seconds: float = 300) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def running_slurm(folder: Path) -> Iterator[Slurm]:
    """Yield a running Slurm, or skip where it cannot run."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(
            f"needs Slurm and munge: no {', '.join(missing)} here (Debian: slurmctld slurmd munge slurm-client)"
        )
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons start tasks as other users, which takes root")
    slurm = Slurm(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
