"""The default process group: opened once, and closed at exit, with its threads idle before Python finalizes.

The ranks meet in a store under a separate prefix for every attempt. torch's own rendezvous shares the keys of all
attempts, so that a restarted rank can read the address of a dead one.
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

__all__ = ["open_process_group", "with_devices"]

# On a busy file system some ranks import their libraries for minutes longer than others, so that the rendezvous may
# take longer than the timeout of a collective.
_RENDEZVOUS_TIMEOUT = timedelta(minutes=5)
_MIN_RENDEZVOUS_TIMEOUT = timedelta(minutes=1)
_WARN_INTERVAL = timedelta(seconds=30)
# For gloo's threads at the end of the program. Seconds.
_GLOO_TIMEOUT = 30.0
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
    """Open torch's default process group.

    A group that is already open is kept and never closed; `timeout` is applied to it. A group opened here is closed
    when the process exits. Collective: every rank must call it.

    Args:
        world: This rank and the world.
        device: This rank's device.
        backend: For example "gloo", "nccl" or "cpu:gloo,cuda:nccl"; None chooses gloo for the CPU, and with an
            accelerator its own backend in addition. A single name for an accelerator adds gloo for the CPU.
        timeout: Timeout of collectives; None is torch's default.
        init_method: A torch rendezvous URL, such as `file:///shared/meeting`, instead of the world's address.
        force: Open a group of one for a single process too.

    Returns:
        The backend string in use; None for a single process.

    Raises:
        WorldError: The ranks cannot connect, the port is taken, or an open group contradicts the world.
        DeviceError: The backend is not available for the device.
    """
    if dist.is_initialized():
        backend_in_use = _keep_open_group(world, device, backend, timeout)
        _finish_at_exit()
        return backend_in_use
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
        store = HashStore() if world.size == 1 else _rendezvous(world, timeout)
        dist.init_process_group(
            chosen, store=store, rank=world.rank, world_size=world.size, timeout=timeout, device_id=device_id
        )
    group = dist.group.WORLD
    assert group is not None
    _finish_at_exit()
    atexit.register(_close_at_exit, group, os.getpid())
    return _backend_in_use(device)


def _keep_open_group(world: World, device: torch.device, backend: str | None, timeout: timedelta | None) -> str:
    if (dist.get_rank(), dist.get_world_size()) != (world.rank, world.size):
        raise WorldError(
            f"In the open process group this is rank {dist.get_rank()} of {dist.get_world_size()}, "
            f"but in the environment rank {world.rank} of {world.size}",
            "One of them must be wrong",
            "Call torch.distributed.destroy_process_group() first, or correct the variables",
        )
    backend_in_use = _backend_in_use(device)
    if backend is not None:
        open_pairs = set(dist.get_backend_config().split(","))
        requested = {p for p in with_devices(device, backend).split(",") if p.split(":")[0] == device.type}
        if not requested <= open_pairs:
            raise DeviceError(
                f"The backend {backend!r} is requested, but a process group with {backend_in_use!r} is open",
                "The backend of an open group cannot be changed",
                "Set it where the group is first opened",
            )
    if timeout is not None:
        dist.distributed_c10d._set_pg_timeout(timeout)
    return backend_in_use


def _backend_in_use(device: torch.device) -> str:
    pairs = str(dist.get_backend_config())
    if device.type != "cpu":
        return pairs
    return next((pair[4:] for pair in pairs.split(",") if pair.startswith("cpu:")), pairs)


def _choose_backend(device: torch.device, backend: str | None) -> str:
    """Return `backend`, or the default, in torch's format; raise when it does not support `device`."""
    if not dist.is_available():
        raise DeviceError(
            "This build of torch has no torch.distributed",
            "Several processes cannot communicate without it",
            "Install an official build of torch",
        )
    chosen = with_devices(device, backend or _default_backend(device))
    for pair in chosen.split(","):
        kind, _, name = pair.partition(":")
        if name not in _available_backends(kind):
            raise DeviceError(
                f"The backend {name!r} is requested for {kind}",
                f"This build of torch has for {kind}: {', '.join(_available_backends(kind)) or 'none'}",
                "Choose one of those, or remove the backend",
            )
    if "," not in chosen:
        return chosen.removeprefix("cpu:")
    return chosen


def _default_backend(device: torch.device) -> str:
    if device.type != "cpu":
        return dist.get_default_backend_for_device(device)
    return "gloo"


def with_devices(device: torch.device, backend: str) -> str:
    """Write `nccl` as `cpu:gloo,cuda:nccl`: Python objects and checkpoints are exchanged on the CPU."""
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


def _rendezvous(world: World, timeout: timedelta | None) -> Store:
    """Return the store of this attempt once every rank has joined."""
    limit = _RENDEZVOUS_TIMEOUT
    if timeout is not None:
        limit = max(timeout, _MIN_RENDEZVOUS_TIMEOUT)
    base = _open_store(world, limit)
    store = PrefixStore(f"paceline/{world.run_id}/{world.restart_count}", base)
    store.set(f"here/{world.rank}", "1")
    if store.add("arrived", 1) == world.size:
        store.set("all", "1")
    _wait_for_all(store, world, limit)
    # torch waits in this store for each rank's address, with the timeout of collectives.
    if timeout is not None:
        store.set_timeout(timeout)
    return store


def _wait_for_all(store: Store, world: World, limit: timedelta) -> None:
    """Wait until every rank has joined; warn from time to time about those that have not."""
    deadline = time.monotonic() + limit.total_seconds()
    while True:
        left = timedelta(seconds=max(deadline - time.monotonic(), 0.001))
        try:
            store.wait(["all"], min(left, _WARN_INTERVAL))
            return
        except dist.DistStoreError as error:
            missing = [rank for rank in range(world.size) if not store.check([f"here/{rank}"])]
            where = f"{world.main_address}:{world.main_port}"
            if time.monotonic() >= deadline:
                raise WorldError(
                    f"Of {world.size} ranks, {named_ranks(missing)} did not join at {where} within "
                    f"{limit.total_seconds():.0f} s",
                    "All ranks must open the process group together",
                    "Check the output of the missing ranks: they exited early, are stuck before this point, or use "
                    "another address",
                ) from error
            # One of the waiting ranks warns for all.
            if missing and world.rank == min(set(range(world.size)) - set(missing)):
                waited = limit.total_seconds() - (deadline - time.monotonic())
                _LOG.warning(
                    "of %d ranks, %s did not join at %s yet, after %.0f s",
                    world.size, named_ranks(missing), where, waited, main_process_only=False,
                )  # fmt: skip


def _open_store(world: World, limit: timedelta) -> Store:
    is_host = world.rank == 0 and not world.use_agent_store
    where = f"{world.main_address}:{world.main_port}"
    try:
        return TCPStore(
            world.main_address,
            world.main_port,
            world.size,
            is_master=is_host,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        why = first_line(error).rstrip(". ")
        if is_host:
            raise WorldError(
                f"Rank 0 cannot listen at {where} ({why})",
                "Another program uses that port, perhaps another run on this machine",
                "Choose another one with MASTER_PORT or --main_process_port; without either, `paceline launch` "
                "chooses a free one",
            ) from error
        raise WorldError(
            f"Rank {world.rank} cannot reach rank 0 at {where} ({why})",
            "Rank 0 has not started, or its address or port is wrong or blocked",
            "Check MASTER_ADDR and MASTER_PORT, and that rank 0 is running",
        ) from error


@functools.cache
def _finish_at_exit() -> None:
    """Wait for gloo's threads before Python finalizes, whoever opens or closes the group.

    Registered once, before the handler that closes the first group: exit handlers run in reverse order.
    """
    atexit.register(_finish)


def _finish() -> None:
    # A rank that exits with an exception does not wait for other ranks.
    dying = _is_dying()
    if not wait_for_gloo_threads(_GLOO_TIMEOUT, for_peers=not dying) and not dying:
        _LOG.warning(
            "%.0f s after the end of the program an asynchronous collective that it did not wait for is pending: "
            "some rank does not take part. Call `wait()` on what `async_op=True` returns",
            _GLOO_TIMEOUT, main_process_only=False,
        )  # fmt: skip


def _is_dying() -> bool:
    return getattr(sys, "last_value", None) is not None


def _close_at_exit(group: dist.ProcessGroup, owner: int) -> None:
    """Close the group that this process opened.

    Closing waits for pending work of other ranks. A process that exits with an exception skips it, so that it exits at
    once and its launcher sees why.
    """
    if os.getpid() == owner and not _is_dying() and dist.is_initialized() and dist.group.WORLD is group:
        dist.destroy_process_group()
