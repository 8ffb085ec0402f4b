"""The process group over which the ranks talk: opened once, closed at exit, its threads at rest before Python ends.

The ranks meet in a store under a prefix of their own for every restart. torch's own rendezvous shares the
keys of all attempts, so that a rank started again can read the address of a dead one.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from paceline.environment.gloo_threads import wait_for_gloo_threads
from paceline.environment.logging import get_logger
from paceline.errors import DeviceError, WorldError, first_line, named_ranks

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from paceline.environment.world import World

__all__ = ["open_process_group"]

# On a loaded file system some ranks import their libraries for minutes longer than others, so that meeting
# may take longer than one collective is allowed to.
_MEETING = timedelta(minutes=5)
_SHORTEST_MEETING = timedelta(minutes=1)
_REMARK = timedelta(seconds=30)
# For gloo's threads at the end of the program.
_AT_THE_END = 30.0
_LOG = get_logger(__name__)


def open_process_group(
    world: World,
    device: torch.device,
    *,
    backend: str | None = None,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    force: bool = False,
) -> str | None:
    """Open torch's default process group; return the backend string in force, or None for a single process.

    A group that is already open is kept and never closed; an asked timeout is applied to it. A group opened
    here is closed when the process exits. Collective: every rank must call it.

    Args:
        world: This rank's place.
        device: This rank's device.
        backend: For example "gloo", "nccl" or "cpu:gloo,cuda:nccl"; None chooses gloo for the CPU, and
            with an accelerator its own backend beside gloo. A name alone, given for an accelerator, gets gloo
            for the CPU beside it.
        timeout: How long a collective may take; None is torch's own.
        init_method: A torch rendezvous address, such as `file:///shared/meeting`, instead of the world's.
        force: Open a group of one for a single process too.

    Raises:
        WorldError: The ranks do not find each other, the port is taken, or a group that is open contradicts
            the world.
        DeviceError: The backend is not available for the device.
    """
    if dist.is_initialized():
        in_force = _keep_open_group(world, device, backend, timeout)
        _finish_at_exit()
        return in_force
    if world.size == 1 and not force:
        return None
    chosen = _choose_backend(device, backend)
    device_id = None if device.type == "cpu" else device
    if init_method is not None:
        dist.init_process_group(
            chosen,
            init_method=init_method,
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=device_id,
        )
    else:
        store = HashStore() if world.size == 1 else _meet(world, timeout)
        dist.init_process_group(
            chosen, store=store, rank=world.rank, world_size=world.size, timeout=timeout, device_id=device_id
        )
    group = dist.group.WORLD
    assert group is not None
    _finish_at_exit()
    atexit.register(_close_at_exit, group, os.getpid())
    return _in_force(device)


def _keep_open_group(world: World, device: torch.device, backend: str | None, timeout: timedelta | None) -> str:
    if (dist.get_rank(), dist.get_world_size()) != (world.rank, world.size):
        raise WorldError(
            f"A process group is open in which this is rank {dist.get_rank()} of {dist.get_world_size()}, "
            f"but the environment says rank {world.rank} of {world.size}",
            "One of them must be wrong",
            "Call torch.distributed.destroy_process_group() first, or correct the variables",
        )
    in_force = _in_force(device)
    if backend is not None:
        open_pairs = set(dist.get_backend_config().split(","))
        asked = {p for p in _with_devices(device, backend).split(",") if p.split(":")[0] == device.type}
        if not asked <= open_pairs:
            raise DeviceError(
                f"The backend {backend!r} was asked for, but a process group with {in_force!r} is open",
                "The backend of an open group cannot be changed",
                "Ask for it where the group is first opened",
            )
    if timeout is not None:
        dist.distributed_c10d._set_pg_timeout(timeout)
    return in_force


def _in_force(device: torch.device) -> str:
    pairs = str(dist.get_backend_config())
    if device.type != "cpu":
        return pairs
    return next((pair[4:] for pair in pairs.split(",") if pair.startswith("cpu:")), pairs)


def _choose_backend(device: torch.device, backend: str | None) -> str:
    """Return `backend`, or the default one, as torch takes it; raise when it cannot serve `device`."""
    if not dist.is_available():
        raise DeviceError(
            "This build of torch has no torch.distributed",
            "Several processes cannot talk to each other with it",
            "Install an official build of torch",
        )
    chosen = _with_devices(device, backend or _default_backend(device))
    for pair in chosen.split(","):
        kind, _, name = pair.partition(":")
        if name not in _available_backends(kind):
            raise DeviceError(
                f"The backend {name!r} was asked for on {kind}",
                f"This build of torch has for {kind}: {', '.join(_available_backends(kind)) or 'none'}",
                "Choose one of those, or leave the backend out",
            )
    return chosen.removeprefix("cpu:") if "," not in chosen else chosen


def _default_backend(device: torch.device) -> str:
    return dist.get_default_backend_for_device(device) if device.type != "cpu" else "gloo"


def _with_devices(device: torch.device, backend: str) -> str:
    """Write `nccl` as `cpu:gloo,cuda:nccl`: values of the script and checkpoints travel on the CPU."""
    if ":" in backend:
        return backend.lower()
    name = backend.lower()
    return f"cpu:{name}" if device.type == "cpu" else f"cpu:gloo,{device.type}:{name}"


def _available_backends(kind: str) -> tuple[str, ...]:
    capability = dist.Backend.backend_capability
    return tuple(
        name
        for name in dist.Backend.backend_list
        if name not in ("undefined", "fake") and kind in capability.get(name, ()) and dist.is_backend_available(name)
    )


def _meet(world: World, timeout: timedelta | None) -> Store:
    """Return the store of this attempt once every rank has come to it."""
    patience = _MEETING if timeout is None else max(timeout, _SHORTEST_MEETING)
    base = _open_store(world, patience)
    store = PrefixStore(f"paceline/{world.run_id}/{world.restart_count}", base)
    store.set(f"here/{world.rank}", "1")
    if store.add("arrived", 1) == world.size:
        store.set("all", "1")
    _wait_for_all(store, world, patience)
    # torch waits in this store for each rank's address, under the collectives' own timeout.
    if timeout is not None:
        store.set_timeout(timeout)
    return store


def _wait_for_all(store: Store, world: World, patience: timedelta) -> None:
    """Wait until every rank is there; say now and then who is not."""
    deadline = time.monotonic() + patience.total_seconds()
    while True:
        left = timedelta(seconds=max(deadline - time.monotonic(), 0.001))
        try:
            store.wait(["all"], min(left, _REMARK))
            return
        except dist.DistStoreError as error:
            missing = [rank for rank in range(world.size) if not store.check([f"here/{rank}"])]
            where = f"{world.main_address}:{world.main_port}"
            if time.monotonic() >= deadline:
                raise WorldError(
                    f"Of {world.size} ranks, {named_ranks(missing)} did not come to {where} within "
                    f"{patience.total_seconds():.0f} s",
                    "All ranks must open the process group together",
                    "Look at the output of the missing ranks: they ended early, are stuck before this point, or "
                    "reach another address",
                ) from error
            # One of those that wait says it for all.
            if missing and world.rank == min(set(range(world.size)) - set(missing)):
                waited = patience.total_seconds() - (deadline - time.monotonic())
                _LOG.warning(
                    "of %d ranks, %s did not come to %s yet, after %.0f s",
                    world.size, named_ranks(missing), where, waited, main_process_only=False,
                )  # fmt: skip


def _open_store(world: World, patience: timedelta) -> Store:
    listens = world.rank == 0 and not world.use_agent_store
    where = f"{world.main_address}:{world.main_port}"
    try:
        return TCPStore(
            world.main_address,
            world.main_port,
            world.size,
            is_master=listens,
            timeout=patience,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        why = first_line(error).rstrip(". ")
        if listens:
            raise WorldError(
                f"Rank 0 cannot listen at {where} ({why})",
                "Another program uses that port, perhaps another run on this machine",
                "Choose another with MASTER_PORT or --main_process_port; without either, `paceline launch` "
                "finds a free one",
            ) from error
        raise WorldError(
            f"Rank {world.rank} cannot reach rank 0 at {where} ({why})",
            "Rank 0 has not started, or its name or port is blocked or wrong",
            "Check MASTER_ADDR and MASTER_PORT, and that rank 0 is running",
        ) from error


@functools.cache
def _finish_at_exit() -> None:
    """Let gloo's threads finish before Python ends, whoever opened the group, and whoever closes it.

    Registered once, before the first group is: exit handlers run last one first, so this comes after its closing.
    """
    atexit.register(_finish)


def _finish() -> None:
    # A rank that dies of an exception does not wait for other ranks.
    dying = _is_dying()
    if not wait_for_gloo_threads(_AT_THE_END, for_peers=not dying) and not dying:
        _LOG.warning(
            "%.0f s after the program's end, a collective that it started and did not wait for has not ended: some "
            "rank takes no part in it. Wait for what `async_op=True` returns",
            _AT_THE_END, main_process_only=False,
        )  # fmt: skip


def _is_dying() -> bool:
    return getattr(sys, "last_value", None) is not None


def _close_at_exit(group: dist.ProcessGroup, owner: int) -> None:
    """Close the group that this process opened.

    Closing waits for the other ranks' pending work. A process that dies of an exception leaves them alone, so
    that it dies at once and its launcher sees why.
    """
    if os.getpid() == owner and not _is_dying() and dist.is_initialized() and dist.group.WORLD is group:
        dist.destroy_process_group()
