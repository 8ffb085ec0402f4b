"""Several machines, made of network namespaces: they train as one, fail as one, and say what keeps them apart."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.support.hosts import Hosts, Running, needs_hosts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = needs_hosts

TRAIN = """
import json, os, signal, sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from paceline import Accelerator

def boom(rank):
    raise ValueError("boom")

what = sys.argv[1] if len(sys.argv) > 1 else ""
accelerator = Accelerator()
from paceline.environment.world import World
world = World.read(os.environ)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
data = TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
loader = DataLoader(data, batch_size=16 // world.size, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05), loader)
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
print(f"rank {world.rank}/{world.size} local {world.local_rank}/{world.local_size} "
      f"node {world.node_rank}/{world.num_nodes} attempt {attempt}\\n", end="", flush=True)
losses = []
while True:
    for x, y in loader:
        loss = nn.functional.mse_loss(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    if what == "boom" and world.rank == world.size - 1:
        boom(world.rank)
    if what == "once" and attempt == 0 and world.rank == world.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "until" and world.num_nodes != int(sys.argv[2]) or what == "forever":
        time.sleep(0.1)
        continue
    if len(losses) >= 12:
        break
weights = next(model.parameters()).detach().flatten()[:4].tolist()
print(json.dumps([losses[:12], weights]) + "\\n", end="", flush=True)
"""
# A launcher on a loaded machine may be silent for long; only where one is to be lost is that noticed soon.
PATIENT = "keep_alive_interval=1,keep_alive_max_attempt=60,last_call_timeout=3"
FAST = "keep_alive_interval=1,keep_alive_max_attempt=10,last_call_timeout=3"


@pytest.fixture
def make_hosts(tmp_path: Path) -> Iterator[Callable[[int], Hosts]]:
    made: list[Hosts] = []

    def make(count: int) -> Hosts:
        made.append(Hosts(tmp_path, count))
        return made[-1]

    (tmp_path / "train.py").write_text(TRAIN)
    yield make
    for hosts in made:
        hosts.close()


def launch(
    hosts: Hosts, letter: str, *arguments: str, flags: str = "", extra: tuple[str, ...] = (), **keywords: Any
) -> Running:
    """Give the command on one host; `flags` are for paceline."""
    given = dict(zip(flags.split()[::2], flags.split()[1::2], strict=True))
    standard = {
        "--num_machines": str(len(hosts.names)),
        "--num_processes": str(len(hosts.names)),
        "--machine_rank": str("abcdefgh".index(letter)),
        "--main_process_ip": hosts.address("a"),
        "--rdzv_conf": PATIENT,
    }
    words = [word for pair in {**standard, **given}.items() if pair[1] != "-" for word in pair]
    command = [sys.executable, "-m", "paceline", "launch", "--cpu", *words, *extra, "train.py", *arguments]
    return hosts.start(letter, *command, **keywords)


def launch_all(hosts: Hosts, *arguments: str, flags: str = "") -> list[Running]:
    return [launch(hosts, letter, *arguments, flags=flags) for letter in hosts.names]


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Its variables; none when it has just ended."""
    with contextlib.suppress(psutil.Error):
        return process.environ()
    return {}


def result(running: Running) -> Any:
    return json.loads(next(line for line in running.lines if line.startswith("[[")))


def alone(folder: Path) -> Any:
    command = [sys.executable, "-m", "paceline", "launch", "--cpu", "--num_processes", "1", "train.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=800, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))


def assert_all_say(running: list[Running], *parts: str) -> None:
    for one in running:
        for part in parts:
            assert part in one.err, f"{part!r} is not in\n{one.err}"


def test_two_hosts_train_as_one_process_does(make_hosts: Callable[[int], Hosts], tmp_path: Path) -> None:
    hosts = make_hosts(2)
    running = launch_all(hosts, flags="--num_processes 4")
    assert [one.end() for one in running] == [0, 0], [one.err for one in running]
    for machine, one in enumerate(running):
        for local in range(2):
            rank = 2 * machine + local
            assert f"rank {rank}/4 local {local}/2 node {machine}/2 attempt 0\n" in one.out
    assert hosts.none_left()
    losses, weights = result(running[0])
    expected_losses, expected_weights = alone(tmp_path)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert weights == pytest.approx(expected_weights, abs=1e-5)


@pytest.mark.slow
def test_a_failure_on_one_host_is_reported_on_both(make_hosts: Callable[[int], Hosts]) -> None:
    hosts = make_hosts(2)
    running = launch_all(hosts, "boom")
    assert [one.end() for one in running] == [1, 1]
    assert_all_say(running, "\nrank 1 on b (pid ", "raised ValueError at", "train.py:9\n", "ValueError: boom\n")
    assert [one.err.count("Traceback") for one in running] == [1, 1]
    assert all(one.err.rstrip().endswith("ValueError: boom") for one in running)
    assert hosts.none_left()


@pytest.mark.slow
def test_preflight_names_all_that_differs(make_hosts: Callable[[int], Hosts], tmp_path: Path) -> None:
    hosts = make_hosts(2)
    fake = tmp_path / "older"
    fake.mkdir()
    (fake / "sitecustomize.py").write_text("import platform\nplatform.python_version = lambda: '3.9.1'\n")
    running = [
        launch(hosts, "a"),
        launch(
            hosts, "b",
            flags="--mixed_precision bf16 --num_processes 4",
            extra=("-m",),
            env={"PYTHONPATH": str(fake)},
        ),
    ]  # fmt: skip
    assert [one.end() for one in running] == [1, 1]
    assert_all_say(
        running,
        "mixed_precision is no on a and bf16 on b",
        "num_processes is 2 on a and 4 on b",
        "3.9.1 on b",
        "b: There is no module 'train.py'",
    )
    assert "rank" not in running[0].out + running[1].out
    assert hosts.none_left()


@pytest.mark.slow
def test_an_address_that_leads_to_the_machine_itself(make_hosts: Callable[[int], Hosts]) -> None:
    hosts = make_hosts(2)
    flags = "--main_process_ip head --rdzv_conf timeout=5"
    running = [
        launch(hosts, "a", flags=flags, names=f"{hosts.address('a')} head"),
        launch(hosts, "b", flags=flags, names="127.0.0.1 head"),
    ]
    assert [one.end() for one in running] == [1, 1]
    reason = "main_process_ip head resolved to 127.0.0.1, which is b itself"
    assert f"b sees 1 machine, expected 2: {reason}" in running[1].err, running[1].err
    assert "a sees 1 machine, expected 2: machine 1 did not join within 5 s" in running[0].err, running[0].err
    assert hosts.none_left()


@pytest.mark.slow
def test_three_hosts_train_as_one_process_does(make_hosts: Callable[[int], Hosts], tmp_path: Path) -> None:
    hosts = make_hosts(3)
    (tmp_path / "train.py").write_text(TRAIN.replace("64", "48").replace("16 //", "12 //"))
    running = launch_all(hosts)
    assert [one.end() for one in running] == [0, 0, 0], [one.err for one in running]
    losses, _ = result(running[0])
    assert losses == pytest.approx(alone(tmp_path)[0], abs=1e-5)
    assert hosts.none_left()


@pytest.mark.slow
def test_a_wrong_port(make_hosts: Callable[[int], Hosts]) -> None:
    hosts = make_hosts(2)
    running = [
        launch(hosts, "a", flags="--rdzv_conf timeout=12"),
        launch(hosts, "b", flags="--rdzv_conf timeout=12 --main_process_port 29600"),
    ]
    assert [one.end() for one in running] == [1, 1]
    assert "b sees 1 machine, expected 2: nothing listens at" in running[1].err
    assert ", port 29600 (Connection refused)" in running[1].err
    assert "waiting for machine 1 (of 2) ... 10 s" in running[0].err
    assert hosts.none_left()


@pytest.mark.slow
def test_one_that_is_not_of_the_run_does_not_disturb_it(make_hosts: Callable[[int], Hosts]) -> None:
    hosts = make_hosts(3)
    flags = "--num_machines 2 --num_processes 2 --max_restarts 1"
    running = [launch(hosts, letter, "forever", flags=flags) for letter in "ab"]
    for one in running:
        one.wait_for("attempt 0")
    stranger = launch(hosts, "c", "forever", flags=f"{flags} --machine_rank 1")
    assert stranger.end() == 1
    assert "b and c both have machine_rank 1" in stranger.err
    next(process for process in hosts.left() if "RANK" in environment_of(process)).kill()
    for one in running:
        one.wait_for("attempt 1")
    running[0].process.send_signal(signal.SIGTERM)
    assert [one.end() for one in running] == [143, 143]
    assert hosts.none_left()


@pytest.mark.slow
def test_each_host_has_as_many_ranks_as_it_finds_devices(make_hosts: Callable[[int], Hosts]) -> None:
    hosts = make_hosts(2)
    (hosts.folder / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('CORES'):\n    os.sched_getaffinity = lambda _: range(int(os.environ['CORES']))\n"
    )
    path = str(hosts.folder)
    running = [
        launch(hosts, letter, flags="--num_processes -", env={"PYTHONPATH": path, "CORES": cores})
        for letter, cores in (("a", "1"), ("b", "3"))
    ]
    assert [one.end() for one in running] == [0, 0], running[0].err + running[1].err
    assert "rank 0/3 local 0/1 node 0/2" in running[0].out
    assert "rank 2/3 local 1/2 node 1/2" in running[1].out
    assert hosts.none_left()


@pytest.mark.slow
def test_two_that_say_they_are_the_same(make_hosts: Callable[[int], Hosts]) -> None:
    hosts = make_hosts(3)
    running = [launch(hosts, "a"), launch(hosts, "b"), launch(hosts, "c", flags="--machine_rank 1")]
    assert [one.end() for one in running] == [1, 1, 1]
    assert_all_say(running, "both have machine_rank 1")
    assert hosts.none_left()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["static", "c10d"])
def test_a_rank_that_dies_makes_all_start_again(make_hosts: Callable[[int], Hosts], backend: str) -> None:
    hosts = make_hosts(2)
    running = launch_all(hosts, "once", flags=f"--max_restarts 1 --rdzv_backend {backend}")
    assert [one.end() for one in running] == [0, 0], [one.err for one in running]
    assert_all_say(running, "was killed by SIGKILL", "restarting (1 of 1)")
    assert all("attempt 1" in one.out for one in running)
    assert hosts.none_left()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["static", "c10d"])
@pytest.mark.parametrize("how", ["cut", "kill"])
def test_a_host_that_is_lost(make_hosts: Callable[[int], Hosts], backend: str, how: str) -> None:
    hosts = make_hosts(2)
    running = launch_all(hosts, "forever", flags=f"--rdzv_backend {backend} --rdzv_conf {FAST}")
    for one in running:
        one.wait_for("attempt 0")
    lose(hosts, running, how)
    assert running[0].end() == 1, running[0].err
    assert "b is lost with its 1 rank: no heartbeat for" in running[0].err
    if how == "cut":
        assert running[1].end() == 1
        assert "b lost the connection to machine 0 (" in running[1].err
    assert hosts.none_left()


def lose(hosts: Hosts, running: list[Running], how: str) -> None:
    """Take host b away: its cable, or its launcher and with it, by the kernel, its ranks."""
    if how == "cut":
        hosts.cut("b")
    else:
        running[1].process.kill()


@pytest.mark.slow
def test_the_host_of_the_meeting_is_killed(make_hosts: Callable[[int], Hosts]) -> None:
    hosts = make_hosts(2)
    running = launch_all(hosts, "forever")
    for one in running:
        one.wait_for("attempt 0")
    running[0].process.kill()
    assert running[1].end() == 1, running[1].err
    assert "b lost the connection to machine 0 (a)" in running[1].err
    assert hosts.none_left()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "kill"])
def test_the_others_go_on_with_fewer(make_hosts: Callable[[int], Hosts], how: str) -> None:
    hosts = make_hosts(2)
    flags = f"--rdzv_backend c10d --num_machines 1:2 --max_restarts 1 --rdzv_conf {FAST}"
    running = launch_all(hosts, "until", "1", flags=flags)
    for one in running:
        one.wait_for("attempt 0")
    assert "rank 1/2" in running[0].out + running[1].out
    lose(hosts, running, how)
    assert running[0].end() == 0, running[0].err
    assert "restarting (1 of 1)" in running[0].err
    assert "rank 0/1 local 0/1 node 0/1 attempt 1\n" in running[0].out
    # A host that was cut off gives machine 0 up when the store has not answered for 20 seconds.
    assert hosts.none_left()


@pytest.mark.slow
def test_a_host_that_comes_late_joins(make_hosts: Callable[[int], Hosts]) -> None:
    hosts = make_hosts(2)
    flags = "--rdzv_backend c10d --num_machines 1:2 --machine_rank -"
    first = launch(hosts, "a", "until", "2", flags=flags)
    first.wait_for("rank 0/1 local 0/1 node 0/1 attempt 0")
    wrong = launch(hosts, "b", "until", "2", flags=f"{flags} --mixed_precision bf16")
    assert wrong.end() == 1
    assert "mixed_precision is no on a and bf16 on b" in wrong.err
    assert first.process.poll() is None
    late = launch(hosts, "b", "until", "2", flags=flags)
    assert [first.end(), late.end()] == [0, 0], first.err + late.err
    assert "another machine joins" in first.err
    assert "/2 local 0/1" in first.out
    assert "/2 local 0/1" in late.out
    assert hosts.none_left()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_on_one_host_ends_all(make_hosts: Callable[[int], Hosts], number: signal.Signals) -> None:
    hosts = make_hosts(2)
    running = launch_all(hosts, "forever")
    for one in running:
        one.wait_for("attempt 0")
    running[1].process.send_signal(number)
    assert [one.end() for one in running] == [128 + number, 128 + number]
    assert_all_say(running, f"stopped by {number.name} on b; all 2 processes have ended")
    assert hosts.none_left()


@pytest.mark.slow
def test_twenty_launches_at_once_on_one_host(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        textwrap.dedent(
            """
            import os, torch
            from paceline.environment.process_group import open_process_group
            from paceline.environment.world import World
            open_process_group(World.read(os.environ), torch.device("cpu"))
            numbers = torch.ones(1)
            torch.distributed.all_reduce(numbers)
            print("sum", int(numbers))
            """
        )
    )
    command = [sys.executable, "-m", "paceline", "launch", "--cpu", "--num_processes", "2", "train.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(20)
    ]
    for one in running:
        out, err = one.communicate(timeout=800)
        assert one.returncode == 0, err
        assert out.count("sum 2") == 2
