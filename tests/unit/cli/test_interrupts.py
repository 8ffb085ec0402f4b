"""Ctrl-C while a command still imports what it needs."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from paceline import cli

DROPS = """
import signal, sys

{before}

class Torch:
    def find_spec(self, name, *_):
        if name == "torch":
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                print("dropped, as torch does")
            return None

sys.meta_path.insert(0, Torch())
from paceline.cli.interrupts import import_torch
import_torch()
assert signal.getsignal(signal.SIGINT) is {after}
print("went on")
"""


def run(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=800, check=False)


def test_an_interrupt_that_torch_would_drop_ends_the_command() -> None:
    # Whoever runs the tests may ignore SIGINT, as a job in the background does, and hand that down.
    listening = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    done = run(DROPS.format(before=listening, after="None"))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_command_that_ignores_interrupts_goes_on_ignoring_them() -> None:
    ignoring = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    done = run(DROPS.format(before=ignoring, after="signal.SIG_IGN"))
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


def test_ctrl_c_has_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.command, "invoke", interrupted)
    monkeypatch.setattr(sys, "argv", ["paceline", "env"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip() == "stopped by SIGINT"
