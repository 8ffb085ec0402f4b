"""Running a program that starts the ranks, such as mpirun: signals go on to it, and its end is waited for."""

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
    """Run a command to its end; return its exit code, and the first signal that came for it meanwhile.

    Args:
        command: What starts the ranks.
        environment: Of it.
        stop: A command that ends the ranks, for a starter that does not when it gets a signal; without one, signals
            go on to the starter.
    """
    process = subprocess.Popen(command, env=environment)
    received: list[int] = []
    stopping: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: object) -> None:
        received.append(number)
        if stop:
            if not stopping:
                stopping.append(subprocess.Popen(stop, env=environment))
            return
        for receiver in _receivers(process.pid):
            with contextlib.suppress(psutil.Error):
                receiver.send_signal(number)

    old = {number: signal.signal(number, pass_on) for number in _FORWARDED}
    try:
        code = process.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        for stopper in stopping:
            stopper.wait()
    return code, received[0] if received else None


def _receivers(pid: int) -> list[psutil.Process]:
    """The program, or what it runs where it is a script of a shell, which keeps signals to itself (Intel MPI's)."""
    try:
        program = psutil.Process(pid)
        is_script = Path(program.exe()).name in _SHELLS
        return (program.children() if is_script else []) or [program]
    except psutil.Error:
        return []


def raise_for_exit(program: str, code: int, received: int | None) -> None:
    """Raise `WorkerError` when a program that started ranks failed, or a signal came for it; see `run_launcher`."""
    if received is not None:
        raise WorkerError(f"stopped by {signal.Signals(received).name}\n", 128 + received)
    if code:
        raise WorkerError(f"{program} ended with code {code}\n", code if code > 0 else 128 - code)
