from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from paceline.environment.process_group import open_process_group
from paceline.environment.world import World
from paceline.errors import DeviceError, WorldError
from tests.support.ranks import free_port

CPU = torch.device("cpu")

HEAD = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from paceline.environment.process_group import open_process_group
from paceline.environment.world import World
WORLD, CPU = World.read(os.environ), torch.device("cpu")
"""


def start(tmp_path: Path, body: str, size: int, port: int) -> list[subprocess.Popen[str]]:
    script = tmp_path / "script.py"
    script.write_text(HEAD + textwrap.dedent(body))
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def run(tmp_path: Path, body: str, size: int = 2) -> list[tuple[int, str, str]]:
    results = []
    for process in start(tmp_path, body, size, free_port()):
        out, err = process.communicate(timeout=800)
        results.append((process.returncode, out, err))
    return results


def test_one_process_opens_none() -> None:
    assert open_process_group(World(), CPU) is None
    assert not torch.distributed.is_initialized()


def test_forced_group_of_one_and_a_group_that_is_open(tmp_path: Path) -> None:
    body = """
    print(open_process_group(WORLD, CPU, force=True), open_process_group(WORLD, CPU, backend="gloo"))
    value = torch.ones(2)
    dist.all_reduce(value)
    print(dist.get_world_size(), value.tolist())
    for world, backend in ((World(rank=0, size=2), None), (WORLD, "ucc")):
        try:
            open_process_group(world, CPU, backend=backend)
        except Exception as error:
            print(type(error).__name__)
    """
    ((code, out, err),) = run(tmp_path, body, size=1)
    assert (code, err) == (0, "")
    assert out.splitlines() == ["gloo gloo", "1 [1.0, 1.0]", "WorldError", "DeviceError"]


WAIT_ALONE = """
dist.barrier()
done = Path(__file__).with_name("done")
if WORLD.is_main:
    begin = time.monotonic()
    try:
        dist.barrier()
    except RuntimeError:
        print(time.monotonic() - begin)
    done.touch()
else:
    while not done.exists():
        time.sleep(0.05)
"""


def test_the_timeout_is_applied_and_the_exit_is_clean(tmp_path: Path) -> None:
    """A barrier that rank 1 never enters fails on rank 0 after the asked 2 s; then both leave quietly."""
    body = f"open_process_group(WORLD, CPU, timeout=timedelta(seconds=2)){WAIT_ALONE}"
    (code_0, out, err_0), (code_1, _, err_1) = run(tmp_path, body)
    assert (code_0, code_1) == (0, 0)
    assert 1.5 < float(out) < 50
    assert "destroy_process_group" not in err_0 + err_1


def test_the_timeout_reaches_a_group_opened_by_somebody_else(tmp_path: Path) -> None:
    opened = "assert open_process_group(WORLD, CPU, timeout=timedelta(seconds=2)) == 'gloo'"
    (_, out, _), _ = run(tmp_path, f"dist.init_process_group('gloo')\n{opened}{WAIT_ALONE}")
    assert 1.5 < float(out) < 50


def test_an_exception_ends_a_rank_at_once(tmp_path: Path) -> None:
    """Closing the group waits for the others; a dying rank must not."""
    body = """
    open_process_group(WORLD, CPU)
    dist.barrier()
    if WORLD.is_main:
        raise KeyError("mine")
    time.sleep(1)
    """
    (code, _, err), (other, _, _) = run(tmp_path, body)
    assert (code, other) == (1, 0)
    assert err.count("KeyError: 'mine'") == 1


def test_a_restart_does_not_meet_the_dead(tmp_path: Path) -> None:
    """The store outlives the attempt, as an elastic agent's does; the second attempt uses other keys."""
    from torch._C._distributed_c10d import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt in range(2):
        body = f"""
        from dataclasses import replace
        world = replace(WORLD, use_agent_store=True, restart_count={attempt})
        open_process_group(world, CPU)
        value = torch.ones(1)
        dist.all_reduce(value)
        print(value.item(), flush=True)
        os._exit(9)
        """
        results = [p.communicate(timeout=800) for p in start(tmp_path, body, 2, store.port)]
        assert [out for out, _ in results] == ["2.0\n", "2.0\n"]


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        world = World(rank=0, size=2, local_size=2, main_port=port)
        text = rf"cannot listen at 127.0.0.1:{port}.*Choose another one with MASTER_PORT"
        with pytest.raises(WorldError, match=text):
            open_process_group(world, CPU, timeout=timedelta(seconds=1))


def test_an_unknown_backend_lists_what_there_is() -> None:
    with pytest.raises(DeviceError, match=r"'nccl' is requested for cpu.*has for cpu: gloo"):
        open_process_group(World(), CPU, backend="nccl", force=True)
    with pytest.raises(DeviceError, match=r"'glooo' is requested"):
        open_process_group(World(), CPU, backend="glooo", force=True)


def test_missing_ranks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from paceline.environment import process_group

    monkeypatch.setattr(process_group, "_MIN_RENDEZVOUS_TIMEOUT", timedelta(seconds=1))
    world = World(rank=0, size=3, local_size=3, main_port=free_port())
    with pytest.raises(WorldError, match=r"Of 3 ranks, ranks 1-2 did not join at 127.0.0.1:\d+ within 1 s"):
        open_process_group(world, CPU, timeout=timedelta(seconds=1))


@pytest.mark.parametrize(
    ("kind", "backend", "expected"),
    [("cpu", "gloo", "cpu:gloo"), ("cuda", "nccl", "cpu:gloo,cuda:nccl"), ("cuda", "cuda:nccl", "cuda:nccl")],
)
def test_a_device_gets_gloo_beside_its_backend(kind: str, backend: str, expected: str) -> None:
    from paceline.environment.process_group import with_devices

    assert with_devices(torch.device(kind), backend) == expected
