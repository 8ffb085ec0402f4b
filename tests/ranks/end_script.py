"""A rank that comes to its end while a thread of gloo is still letting go of a tensor."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paceline import Accelerator

# How long the thread is busy: longer than an interpreter takes from its exit handlers to its end.
BUSY = 1.0


def train(strategy: str) -> tuple[Accelerator, Any]:
    accelerator = Accelerator(cpu=True, strategy=strategy)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        accelerator.backward(model(torch.randn(3, 4)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return accelerator, model


def reduce_and_forget(rank: int, *, wait: bool, late: float = 0.0, group: dist.ProcessGroup | None = None) -> None:
    """Let gloo's thread hold the last reference to a tensor, and be busy for a while when it lets go."""
    begun = threading.Event()

    def be_busy(_: object) -> None:
        begun.set()
        until = time.monotonic() + BUSY
        while time.monotonic() < until:
            pass

    tensor = torch.ones(4)
    reference = weakref.ref(tensor, be_busy)
    # Whoever comes later finds the other waiting in its thread.
    time.sleep(late if rank == 1 else 0.0)
    dist.all_reduce(tensor, group=group, async_op=True)
    del tensor
    KEPT.append(reference)
    if wait:
        begun.wait()


def starve_gloo(rank: int) -> None:
    """Put all threads on one processor, and gloo's behind the main one there: what it wakes runs before it goes on."""
    processors = sorted(os.sched_getaffinity(0))
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), {processors[rank % len(processors)]})
        if (task / "comm").read_text().strip() == "pt_gloo_runloop":
            os.setpriority(os.PRIO_PROCESS, int(task.name), 19)


KEPT: list[Any] = []


def main(strategy: str, way: str) -> None:
    atexit.register(lambda: print("an early exit handler ran"))
    if way == "groups of its own":
        dist.init_process_group("gloo")
    accelerator, model = train(strategy)
    atexit.register(lambda: print("a late exit handler ran"))
    # Held until the very end, as in a script: its group cannot go before it does.
    KEPT.append(model)
    rank = accelerator.process_index
    match way:
        case "at once":
            starve_gloo(rank)
            accelerator.gather(torch.zeros(8))
        case "not waited for":
            reduce_and_forget(rank, wait=False, late=0.3)
        case "groups of its own":
            # Neither is ever closed.
            reduce_and_forget(rank, wait=True, group=dist.new_group([0, 1]))
        case _:
            reduce_and_forget(rank, wait=True)
    print("done")
    if way == "sys.exit(3)":
        sys.exit(3)
    if way == "words":
        sys.exit("some words")
    if way == "an exception":
        raise ValueError("the script's own")


if __name__ == "__main__":
    main(*sys.argv[1:])
