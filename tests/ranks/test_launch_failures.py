"""Launches of real processes that end badly: the cause comes last and once, and nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.support.marked import marked, none_marked

if TYPE_CHECKING:
    from collections.abc import Iterator

DRIVER = """
import os, sys
from pathlib import Path
from paceline.config import Resolved, RunConfig
from paceline.errors import WorkerError
from paceline.launch import Command, launch
if __name__ == "__main__":
    config, options, script, arguments = eval(sys.argv[1]), eval(sys.argv[2]), sys.argv[3], sys.argv[4:]
    resolved = Resolved(RunConfig(**config), {})
    try:
        launch(resolved, Command(script, tuple(arguments)), env=os.environ, **options)
    except WorkerError as error:
        print(error, end="", file=sys.stderr)
        sys.exit(error.code)
"""

# Rank 1 does the given thing while rank 0 waits for it in a collective over gloo.
COLLECTIVE = """
import os, signal, sys, time
import torch, torch.distributed as dist
from paceline.environment.process_group import open_process_group
from paceline.environment.world import World
world = World.read(os.environ)
open_process_group(world, torch.device("cpu"))
dist.barrier()
os.write(1, b"ready\\n")
if world.rank == 1:
    {body}
dist.barrier()
"""
# Seconds for one launch on a machine that is busy otherwise; what must not be waited for takes longer.
PATIENCE = 800
SLEEP = """
import os, time
os.write(1, b"ready\\n")
time.sleep(1000)
"""


@dataclass
class Launches:
    """Starts launches whose processes all carry one marker, to find whatever of them is left."""

    folder: Path
    marker: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(
        self, source: str, *arguments: str, config: str = "dict(num_processes=2)", options: str = "{}"
    ) -> subprocess.Popen[str]:
        script = self.folder / "train.py"
        if not script.exists():  # ranks of an earlier launch may be about to read it
            script.write_text(source)
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, config, options, str(script), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TEST_MARKER": self.marker},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, source: str, *arguments: str, **keywords: str) -> tuple[int, str, str]:
        process = self.start(source, *arguments, **keywords)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err

    def left(self) -> list[psutil.Process]:
        return marked(self.marker)

    def none_left(self, within: float = 60.0) -> bool:
        return none_marked(self.marker, within)


@pytest.fixture
def launches(tmp_path: Path) -> Iterator[Launches]:
    launches = Launches(tmp_path)
    yield launches
    for process in launches.left():
        with contextlib.suppress(psutil.Error):
            process.kill()
    for started in launches.started:
        started.communicate()


def collective(body: str) -> str:
    return COLLECTIVE.format(body=textwrap.indent(textwrap.dedent(body), "    ").strip())


def wait_until_ready(process: subprocess.Popen[str], count: int) -> None:
    assert process.stdout is not None
    for _ in range(count):
        assert process.stdout.readline().startswith("ready")


@pytest.mark.parametrize(
    ("body", "code", "headline", "last"),
    [
        ('raise RuntimeError("boom")', 1, r"raised RuntimeError at \S+train.py:11", "RuntimeError: boom"),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGKILL)", 137, r"was killed by SIGKILL \(", "", marks=pytest.mark.slow
        ),
        pytest.param(
            "sys.exit(3)", 3, r"exited with code 3 at \S+train.py:11 \(sys.exit\)$", "", marks=pytest.mark.slow
        ),
    ],
)
def test_the_cause_comes_last_and_once(launches: Launches, body: str, code: int, headline: str, last: str) -> None:
    returned, _, err = launches.run(collective(body))
    assert returned == code, err
    lines = err.splitlines()
    assert sum(line.startswith("rank 1 on ") for line in lines) == 1, err
    assert lines[0].startswith("rank 0: "), err
    assert re.search(rf"^rank 1 on \S+ \(pid \d+\) {headline}", lines[1]), err
    if last:
        assert lines[-1] == last
        assert err.count(last) == 1
        assert err.count("Traceback (most recent call last)") == 1
    else:
        assert len(lines) == 2
    assert launches.none_left()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_everything(launches: Launches, number: signal.Signals) -> None:
    process = launches.start(collective("time.sleep(1000)"))
    wait_until_ready(process, 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert err.splitlines() == [f"stopped by {number.name}; all 2 processes have ended"]
    assert launches.none_left()


def test_a_rank_that_ignores_signals_is_killed_with_its_children(launches: Launches) -> None:
    source = """
import os, signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "1000"])
os.write(1, b"ready\\n")
time.sleep(1000)
"""
    process = launches.start(source, options="dict(shutdown_timeout=1, grace_period=1)")
    wait_until_ready(process, 2)
    process.terminate()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert launches.none_left()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_killing_the_launcher_kills_the_ranks(launches: Launches) -> None:
    process = launches.start(SLEEP)
    wait_until_ready(process, 2)
    assert len(launches.left()) == 3
    process.kill()
    assert launches.none_left()


def test_failed_ranks_are_started_again(launches: Launches) -> None:
    source = collective(
        """
        if world.restart_count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    code, out, err = launches.run(source, config="dict(num_processes=2, max_restarts=1)")
    assert code == 0, err
    assert out.count("ready") == 4
    assert "restarting (1 of 1)" in err


def test_output_goes_to_one_file_for_each_rank(launches: Launches) -> None:
    source = 'import os, sys\nprint("out", os.environ["RANK"])\nprint("err", file=sys.stderr)\nsys.exit(5)\n'
    folder = launches.folder / "logs"
    code, out, err = launches.run(source, options=f"dict(log_dir=Path({str(folder)!r}))")
    assert (code, out) == (5, "")
    assert f"its output is in {folder}" in err
    assert (folder / "rank_1.out").read_text() in ("out 1\n", "")  # it may have been stopped before
    names = {path.name for path in folder.iterdir()}
    assert names == {"rank_0.out", "rank_0.err", "rank_1.out", "rank_1.err"}


def test_a_folder_for_logs_that_cannot_be(launches: Launches) -> None:
    (launches.folder / "logs").write_text("a file")
    code, out, err = launches.run(SLEEP, options=f"dict(log_dir=Path({str(launches.folder / 'logs')!r}))")
    assert (code, out) == (1, "")
    assert "UsageError: The log folder" in err


def test_tee_writes_to_the_console_too(launches: Launches) -> None:
    folder = launches.folder / "logs"
    source = 'import os\nprint("out", os.environ["RANK"])\n'
    code, out, _ = launches.run(source, options=f"dict(log_dir=Path({str(folder)!r}), tee=True)")
    assert code == 0
    assert sorted(out.splitlines()) == ["[rank 0] out 0", "[rank 1] out 1"]
    assert (folder / "rank_1.out").read_text() == "out 1\n"


def test_a_plain_torch_script_finds_its_group(launches: Launches) -> None:
    source = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.ones(1)
dist.all_reduce(value)
os.write(1, b"%d\\n" % value.item())
dist.destroy_process_group()
"""
    code, out, err = launches.run(source)
    assert (code, out, err) == (0, "2\n2\n", "")


@pytest.mark.slow
def test_twenty_launches_at_once(launches: Launches) -> None:
    source = "import os, time\nos.write(1, os.environb[b'MASTER_PORT'] + b'\\n')\ntime.sleep(1)\n"
    processes = [launches.start(source) for _ in range(20)]
    ports = []
    for process in processes:
        out, err = process.communicate(timeout=800)
        assert process.returncode == 0, err
        first, second = out.split()
        assert first == second
        ports.append(first)
    assert len(ports) == 20
