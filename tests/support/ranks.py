"""Real ranks for tests: a few processes over gloo that stay up and run one test function after another.

Starting a process and importing torch takes seconds; a pool of ranks pays that once a session. Every test
function must be importable (defined at the top of a test module) and gets its arguments pickled.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import random
import socket
import traceback
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.context import SpawnProcess

_POOLS: dict[tuple[int, str], RankPool] = {}


START_SECONDS = 300.0


class RanksFailed(AssertionError):
    """One or more ranks raised; the text holds each rank's own traceback."""


def run_on_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, device: str = "cpu", timeout: float = 800.0
) -> list[Any]:
    """Run `function(*arguments)` on `size` real ranks at once; return what each returned, by rank."""
    pool = _POOLS.get((size, device))
    if pool is None or not pool.alive:
        pool = _POOLS[size, device] = RankPool(size, device)
    return pool.run(function, arguments, timeout)


def close_pools() -> None:
    """End every rank; called once when the session ends."""
    while _POOLS:
        _POOLS.popitem()[1].close()


class RankPool:
    """`size` processes with one process group among them."""

    def __init__(self, size: int, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.alive = True
        self.connections: list[Connection] = []
        self.processes: list[SpawnProcess] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, port, device), daemon=False)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)
        # On a busy machine importing torch takes half a minute, which no test's own time is to include.
        late = [rank for rank, connection in enumerate(self.connections) if not connection.poll(START_SECONDS)]
        if late:
            self.close()
            raise RanksFailed(f"ranks {late} did not start within {START_SECONDS:g} s")
        for connection in self.connections:
            with contextlib.suppress(EOFError):
                connection.recv()

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float) -> list[Any]:
        for connection in self.connections:
            connection.send((function, arguments))
        answers: dict[int, tuple[bool, Any, bool]] = {}
        while len(answers) < len(self.connections):
            waiting = [c for i, c in enumerate(self.connections) if i not in answers]
            ready = wait(waiting, timeout=timeout if not answers else min(timeout, 200.0))
            if not ready:
                break
            for rank in [i for i, c in enumerate(self.connections) if c in ready]:
                try:
                    answers[rank] = self.connections[rank].recv()
                except EOFError:
                    answers[rank] = (False, "the process ended", False)
            # A rank that failed leaves the others in a collective that never ends.
            if any(not fine for fine, _, _ in answers.values()):
                timeout = min(timeout, 5.0)
        failed = [f"rank {rank}: {value}" for rank, (fine, value, _) in sorted(answers.items()) if not fine]
        missing = sorted(set(range(len(self.connections))) - set(answers))
        if failed or missing:
            self.close()
            silent = [f"ranks {missing} did not answer"] if missing else []
            raise RanksFailed("\n".join([*failed, *silent]))
        # A test that closed the process group leaves none to the next.
        if not all(is_open for _, _, is_open in answers.values()):
            self.close()
        return [answers[rank][1] for rank in range(len(self.connections))]

    def close(self) -> None:
        """End the ranks, whatever they are at; again is nothing."""
        if not self.alive:
            return
        self.alive = False
        for connection, process in zip(self.connections, self.processes, strict=True):
            process.kill()
            process.join()
            process.close()
            connection.close()


def free_port() -> int:
    """A port that nobody uses, below those that the system hands out: so nobody gets it before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 12_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port


def _serve(connection: Connection, rank: int, size: int, port: int, device: str) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    # Workers of loaders start as they do in any script, not as this process did.
    multiprocessing.set_start_method(None, force=True)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", rank))
    else:
        dist.init_process_group("gloo")
    # torch imports this with the first optimizer: seconds, or a minute on a busy machine.
    import torch._dynamo

    connection.send("ready")
    logger = logging.getLogger("paceline")
    for function, arguments in _tasks(connection):
        try:
            answer = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        # A Trainer sets it, and the warnings that the next test expects would be lost.
        logger.setLevel(logging.NOTSET)
        _give_back()
        connection.send((*answer, dist.is_initialized()))
    if dist.is_initialized():
        dist.destroy_process_group()


def _give_back() -> None:
    """Destroy DeepSpeed engines that a test left behind.

    Each reserves buckets of some GiB that nobody touches; with a few of them the kernel lets a process start no worker.
    """
    if psutil.Process().memory_info().vms < 4 * 2**30:
        return
    from paceline.strategies.deepspeed.engine import destroy_engine

    for thing in gc.get_objects():
        if type(thing).__name__ == "DeepSpeedEngine":
            destroy_engine(thing)
    gc.collect()


def _tasks(connection: Connection) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        yield task
