"""Machines come to one place: who listens there, who comes, and why somebody does not."""

from __future__ import annotations

import logging
import signal
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError

from paceline.errors import WorkerError, WorldError, first_line
from paceline.launch.network import (
    connection_error,
    interface_with,
    is_loopback,
    is_own_address,
    port_error,
    resolve_host,
    source_address,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch._C._distributed_c10d import Store

    from paceline.config import RunConfig
    from paceline.config.schema.rendezvous import RendezvousOptions

__all__ = ["RendezvousStore", "WaitTimer", "open_rendezvous_store"]

_LOG = logging.getLogger(__name__)
_STORE_PATIENCE = timedelta(seconds=20)
_SAY_EVERY = 10.0
# A name that leads to the machine itself, where nothing listens, is a mistake in most networks: machine 0 gets
# this long to prove the contrary. Seconds.
_LOOPBACK_PATIENCE = 15.0
_POLL = 0.2


class WaitTimer:
    """Time spent waiting: says every ten seconds for what, and when it is too long."""

    def __init__(self, limit: float, signals: Sequence[int] = ()) -> None:
        """Begin to wait.

        Args:
            limit: Seconds that it may take.
            signals: Those that came to this process; one ends the waiting.
        """
        self._signals = signals
        self._begin = time.monotonic()
        self._limit = limit
        self._next = _SAY_EVERY

    @property
    def seconds(self) -> float:
        """Since the waiting began."""
        return time.monotonic() - self._begin

    @property
    def is_over(self) -> bool:
        """Whether it has taken too long."""
        return self.seconds > self._limit

    def say(self, what: str) -> None:
        """Say what is waited for, if it is time to; raise `WorkerError` when a signal came."""
        if self._signals:
            name = signal.Signals(self._signals[0]).name
            raise WorkerError(f"stopped by {name} on {socket.gethostname()}\n", 128 + self._signals[0])
        if self.seconds >= self._next:
            self._next += _SAY_EVERY
            _LOG.warning("paceline: %s: %s ... %.0f s", socket.gethostname(), what, self.seconds)


@dataclass(frozen=True, slots=True)
class RendezvousStore:
    """The store at which machines meet, as one of them sees it.

    Attributes:
        store: Connected to it.
        name: Host as it was given.
        resolved: The address that it leads to from here.
        port: Its port.
        listens: Whether this machine hosts the store.
        address: This machine's own address there.
    """

    store: TCPStore
    name: str
    resolved: str
    port: int
    listens: bool
    address: str

    def connect(self) -> Store:
        """Open one more connection: calls on one wait for each other."""
        store: Any = self.store  # torch's stubs leave `clone` out
        cloned: Store = store.clone()
        return cloned

    @property
    def interface(self) -> str | None:
        """The network interface with that address."""
        return interface_with(self.address)

    def doubt(self) -> str:
        """Why other machines may not find this place; empty when nothing speaks for it."""
        return _doubt(self.name, self.resolved, self.port) if self.listens else ""


def _doubt(name: str, resolved: str, port: int) -> str:
    if is_loopback(resolved):
        return f"main_process_ip {_shown(name, resolved)}, which is {socket.gethostname()} itself"
    if not is_own_address(resolved) and (reason := connection_error(resolved, port)) is not None:
        return f"main_process_ip {_shown(name, resolved)}, which is no address of {socket.gethostname()} ({reason})"
    return ""


def _shown(name: str, resolved: str) -> str:
    return name if name == resolved else f"{name} resolved to {resolved}"


def open_rendezvous_store(
    config: RunConfig, name: str, port: int, options: RendezvousOptions, clock: WaitTimer
) -> RendezvousStore:
    """Listen where machines meet, or come there.

    Raises:
        WorldError: The name leads nowhere, the port is taken, or nobody listens there in time.
    """
    resolved = _resolve(config, name, clock)
    if _listens(config, resolved, port, options):
        store = _listen(name, port)
        address = resolved if interface_with(resolved) else source_address(resolved) or resolved
        return RendezvousStore(store, name, resolved, port, True, address)
    _wait_for_listener(config, name, resolved, port, clock)
    store = _connect(config, name, resolved, port)
    return RendezvousStore(store, name, resolved, port, False, source_address(resolved) or resolved)


def _resolve(config: RunConfig, name: str, clock: WaitTimer) -> str:
    while (resolved := resolve_host(name)) is None:
        clock.say(f"the name {name!r} of machine 0 leads to no address")
        if clock.is_over:
            raise _alone(config, f"the name {name!r} of machine 0 leads to no address")
        time.sleep(_POLL)
    return resolved


def _listens(config: RunConfig, resolved: str, port: int, options: RendezvousOptions) -> bool:
    if options.is_host is not None:
        return options.is_host
    if config.rdzv_backend == "static" or config.machine_rank:
        return config.machine_rank == 0
    # The same command on every machine: the one whose address it is; of several there the first.
    return is_own_address(resolved) and connection_error(resolved, port) is not None


def _listen(name: str, port: int) -> TCPStore:
    host = socket.gethostname()
    for attempt in range(10):
        try:
            # To itself it talks by the shortest way: its address outside may be another machine's, which hands on.
            return TCPStore("localhost", port, is_master=True, wait_for_workers=False, timeout=_STORE_PATIENCE)
        except DistError as error:
            if attempt < 9 and port_error(port) is None:
                time.sleep(_POLL)
                continue
            raise WorldError(
                f"{host} cannot listen at {name}:{port} ({first_line(error)})",
                "Another program uses that port, perhaps an earlier run that has not ended",
                "Choose another with --main_process_port, on every machine, or end that program",
            ) from error
    raise AssertionError


def _wait_for_listener(config: RunConfig, name: str, resolved: str, port: int, clock: WaitTimer) -> None:
    shown = f"{_shown(name, resolved)}, port {port}"
    while (reason := connection_error(resolved, port)) is not None:
        clock.say(f"waiting for machine 0 at {shown} ({reason})")
        itself = is_loopback(resolved)
        if itself and clock.seconds > _LOOPBACK_PATIENCE:
            raise _alone(config, _doubt(name, resolved, port))
        if clock.is_over:
            why = _doubt(name, resolved, port) if itself else f"nothing answers at {shown} ({reason})"
            raise _alone(config, why)
        time.sleep(_POLL)


def _connect(config: RunConfig, name: str, resolved: str, port: int) -> TCPStore:
    try:
        return TCPStore(resolved, port, is_master=False, wait_for_workers=False, timeout=_STORE_PATIENCE)
    except DistError as error:
        what = f"what answers at {_shown(name, resolved)}, port {port}, is no launcher"
        raise _alone(config, f"{what} ({first_line(error, 100)})") from error


def _alone(config: RunConfig, why: str) -> WorldError:
    return WorldError(
        f"{socket.gethostname()} sees 1 machine, expected {expected(config)}: {why}",
        "Machines that do not find machine 0 cannot train with it",
        "Give every machine the same --main_process_ip and --main_process_port: an address of machine 0 that they "
        "reach; and start machine 0",
    )


def expected(config: RunConfig) -> str:
    """How many machines must come, in words."""
    return str(config.min_machines) if config.min_machines == config.max_machines else f"{config.num_machines}"
