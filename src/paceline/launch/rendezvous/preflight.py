"""What is tried before the ranks start: do the machines agree, and do they reach each other."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo

from paceline.errors import first_line
from paceline.launch.rendezvous.store_client import call_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch._C._distributed_c10d import Store

    from paceline.launch.rendezvous.machine_info import MachineInfo

__all__ = ["connectivity_error"]

_PATIENCE = timedelta(seconds=10)


def connectivity_error(store: Store, index: int, machines: Sequence[MachineInfo], meanwhile: Callable[[], None]) -> str:
    """Sum one number over all machines, straight between them; return why that fails, or nothing.

    Collective: every machine must call it.

    Args:
        store: In which they find each other's addresses, used by nothing else.
        index: Which of them this is.
        machines: All of them.
        meanwhile: Called every moment while waiting.
    """
    try:
        total = call_in_thread(lambda: _sum(store, index, machines), meanwhile, "paceline-preflight")
    except RuntimeError as error:
        here = machines[index]
        others = ", ".join(f"{m} ({m.address})" for m in machines if m is not here)
        reason = first_line(error, 160)
        return f"{here} ({here.address}) does not reach {others} straight, as ranks must: {reason}"
    if total != sum(range(1, len(machines) + 1)):
        return f"a sum over all machines is {total} on {machines[index]}"
    return ""


def _sum(store: Store, index: int, machines: Sequence[MachineInfo]) -> int:
    gloo: Any = ProcessGroupGloo  # torch's stubs leave out what it is made with
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=machines[index].address)]
    options._timeout = _PATIENCE
    number = torch.tensor([index + 1])
    group = gloo(PrefixStore("sum", store), index, len(machines), options)
    group.allreduce([number]).wait(_PATIENCE)
    return int(number.item())
