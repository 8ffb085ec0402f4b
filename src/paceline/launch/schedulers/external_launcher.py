"""Running a program that starts the ranks, such as mpirun: signals are forwarded to it until it exits."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from paceline.errors import WorkerError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["raise_for_exit", "run_launcher"]

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SHELLS = ("sh", "dash", "bash", "busybox", "ksh", "zsh")


def run_launcher(
    command: Sequence[str], environment: Mapping[str, str], stop: Sequence[str] = ()
) -> tuple[int, int | None]:
    """Run a command that starts ranks until it exits.

    Args:
        command: The launcher's command line.
        environment: The launcher's environment.
        stop: A command that stops the ranks, for a launcher that does not when it gets a signal; without one, signals
            are forwarded to the launcher.

    Returns:
        The launcher's return code, and the first signal that came meanwhile; None without one.
    """
    process = subprocess.Popen(command, env=environment)
    received: list[int] = []
    stopping: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        if stop:
            if not stopping:
                stopping.append(subprocess.Popen(stop, env=environment))
            return
        for receiver in _receivers(process.pid):
            with contextlib.suppress(psutil.Error):
                receiver.send_signal(number)

    old = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        code = process.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        for stopper in stopping:
            stopper.wait()
    return code, received[0] if received else None


def _receivers(pid: int) -> list[psutil.Process]:
    """The program, or its children if it is a shell script, which does not forward signals (Intel MPI's mpirun)."""
    try:
        program = psutil.Process(pid)
        is_script = Path(program.exe()).name in _SHELLS
        return (program.children() if is_script else []) or [program]
    except psutil.Error:
        return []


def raise_for_exit(program: str, code: int, received: int | None) -> None:
    """Raise `WorkerError` when the launcher failed or a signal came; takes what `run_launcher` returned."""
    if received is not None:
        raise WorkerError(f"stopped by {signal.Signals(received).name}\n", 128 + received)
    if code:
        raise WorkerError(f"{program} exited with code {code}\n", code if code > 0 else 128 - code)
