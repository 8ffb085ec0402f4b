"""Trainings on two or three ranks that go wrong in the way that the first argument names.

Without RANK in the environment it starts the ranks itself, those of all scenarios at once, by forking: importing torch
takes longer than all the rest. It prints exit codes and errors of all ranks as JSON, and writes into this folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from paceline import Accelerator
from tests.support.ranks import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT = "5"


def run(scenario: str) -> None:
    accelerator = Accelerator(strategy="ddp")
    rank = accelerator.process_index
    model, optimizer = make(accelerator)
    for _ in range(2):
        step(accelerator, model, optimizer)
    match scenario:
        case "sleep":
            if rank == 1:
                time.sleep(1000)  # it sleeps here
            step(accelerator, model, optimizer)
        case "skip":
            if rank != 1:
                accelerator.gather(ones(accelerator, 4)).cpu()  # only some come here
            accelerator.wait_for_everyone()  # the one that skipped it
        case "save":
            if accelerator.is_main_process:
                accelerator.save_state("state")  # under a branch
            step(accelerator, model, optimizer)
            time.sleep(1000)
        case "first save":
            if accelerator.is_main_process:
                accelerator.save_state("state")  # the only one that saves
        case "first save elsewhere":
            if accelerator.is_main_process:
                accelerator.save_state("state")  # while the other is elsewhere
            time.sleep(1000)  # it is here
        case "killed in a save":
            accelerator.save_state("saves/first")
            large = torch.nn.Linear(4000, 4000)
            accelerator.register_for_checkpointing(large)
            accelerator.save_state("saves/second", blocking=False)
            if rank == 1:
                # Once files are being written, and thus in the midst of torch's own exchanges.
                while not any(Path("saves").glob("second.partial-*/*.safetensors")):
                    time.sleep(0.001)
                os.kill(os.getpid(), signal.SIGKILL)
            accelerator.wait_for_save()  # of a rank that is gone
        case "open":
            if rank == 0:
                torch.distributed.new_group()  # a group of its own
            time.sleep(1000)  # and opens none
        case "open and end":
            if rank == 0:
                torch.distributed.new_group()  # after the end
        case "shapes":
            accelerator.gather(ones(accelerator, 400 if rank == 1 else 4))  # of different shapes
            accelerator.wait_for_everyone()
        case "early":
            for _ in range(2 if rank == 1 else 3):
                accelerator.gather(ones(accelerator, 4))  # once more than the other
        case "stopped":
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            accelerator.gather(ones(accelerator, 4))
        case "long":
            # Not a hang: it takes longer than the limit, but nobody is in a collective meanwhile.
            with accelerator.main_process_first():
                if accelerator.is_main_process:
                    time.sleep(2 * float(LIMIT))
            time.sleep(2 * float(LIMIT))
            accelerator.wait_for_everyone()
        case "turns":
            # Longer than the limit, always in exchanges, and always in new ones.
            for _ in range(80):
                step(accelerator, model, optimizer)
                time.sleep(0.1)


def ones(accelerator: Accelerator, count: int) -> torch.Tensor:
    return torch.ones(count, device=accelerator.device)


def make(accelerator: Accelerator) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return model, optimizer


def step(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    accelerator.backward(model(torch.ones(3, 4, device=accelerator.device)).sum())  # waits in here
    optimizer.step()
    optimizer.zero_grad()


def fork(scenario: str, size: int) -> Callable[[], dict[str, list[object]]]:
    """Start one scenario on forked ranks; return what waits for the exit code and the standard error of each."""
    port = free_port()
    files = [f"{scenario}-{rank}" for rank in range(size)]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(files[rank], os.O_WRONLY | os.O_CREAT), 2)
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID=f"test-{port}",
                PACELINE_HANG_TIMEOUT=LIMIT, PACELINE_USE_CPU="true",
            )  # fmt: skip
            sys.argv = [__file__, scenario]
            code = 1
            try:
                run(scenario)
                code = 0
            except BaseException as error:
                sys.last_value = error
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            finally:
                # os._exit alone would leave the exit handlers out.
                import atexit

                atexit._run_exitfuncs()
                os._exit(code)
        children.append(child)

    def collect() -> dict[str, list[object]]:
        codes: list[object] = []
        for rank, child in enumerate(children):
            status = os.waitpid(child, 0)[1] if not (scenario == "stopped" and rank == 1) else _kill(child)
            codes.append(os.waitstatus_to_exitcode(status))
        return {"codes": codes, "errors": [Path(file).read_text() for file in files]}

    return collect


def _kill(child: int) -> int:
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        run(sys.argv[1])
    else:
        started = {name: fork(name, 3 if name == "sleep" else 2) for name in sys.argv[1:]}
        print(json.dumps({name: collect() for name, collect in started.items()}))
