"""The connectivity check before the ranks start: an all-reduce straight between the machines."""

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

_TIMEOUT = timedelta(seconds=10)


def connectivity_error(store: Store, index: int, machines: Sequence[MachineInfo], on_wait: Callable[[], None]) -> str:
    """All-reduce one number over direct connections between the machines.

    Collective: every machine must call it.

    Args:
        store: For the exchange of addresses; used by nothing else.
        index: Index of this machine.
        machines: All machines.
        on_wait: Called repeatedly while waiting.

    Returns:
        Why it failed; empty when it worked.
    """
    try:
        total = call_in_thread(lambda: _sum(store, index, machines), on_wait, "paceline-preflight")
    except RuntimeError as error:
        here = machines[index]
        others = ", ".join(f"{m} ({m.address})" for m in machines if m is not here)
        reason = first_line(error, 160)
        return f"{here} ({here.address}) cannot connect directly to {others}, as ranks must: {reason}"
    if total != sum(range(1, len(machines) + 1)):
        return f"a sum over all machines is {total} on {machines[index]}"
    return ""


def _sum(store: Store, index: int, machines: Sequence[MachineInfo]) -> int:
    gloo: Any = ProcessGroupGloo  # torch's stubs lack its constructor
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=machines[index].address)]
    options._timeout = _TIMEOUT
    number = torch.tensor([index + 1])
    group = gloo(PrefixStore("sum", store), index, len(machines), options)
    group.allreduce([number]).wait(_TIMEOUT)
    return int(number.item())
