"""The rendezvous store: which machine hosts it, how the others connect, and why one cannot."""

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
_STORE_TIMEOUT = timedelta(seconds=20)
_REPORT_INTERVAL = 10.0
# A name that resolves to this machine, where nothing listens, is a mistake in most networks, unless machine 0 starts
# there within this time. Seconds.
_LOOPBACK_TIMEOUT = 15.0
_POLL = 0.2


class WaitTimer:
    """Time spent waiting: logs every ten seconds for what, and knows when it is too long."""

    def __init__(self, limit: float, signals: Sequence[int] = ()) -> None:
        """Start the timer.

        Args:
            limit: Seconds that the wait may take.
            signals: Signals that this process has received; one ends the wait.
        """
        self._signals = signals
        self._begin = time.monotonic()
        self._limit = limit
        self._next = _REPORT_INTERVAL

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin

    @property
    def is_expired(self) -> bool:
        """Whether the limit is exceeded."""
        return self.seconds > self._limit

    def report(self, what: str) -> None:
        """Log what is waited for, if it is time to; raise `WorkerError` when a signal came."""
        if self._signals:
            name = signal.Signals(self._signals[0]).name
            raise WorkerError(f"stopped by {name} on {socket.gethostname()}\n", 128 + self._signals[0])
        if self.seconds >= self._next:
            self._next += _REPORT_INTERVAL
            _LOG.warning("paceline: %s: %s ... %.0f s", socket.gethostname(), what, self.seconds)


@dataclass(frozen=True, slots=True)
class RendezvousStore:
    """The store in which machines meet, as one of them sees it.

    Attributes:
        store: A connection to it.
        name: Its host as configured.
        resolved: The address that the host resolves to here.
        port: Its port.
        is_host: Whether this machine hosts the store.
        address: This machine's own address in that network.
    """

    store: TCPStore
    name: str
    resolved: str
    port: int
    is_host: bool
    address: str

    def connect(self) -> Store:
        """Open another connection: calls on the same one wait for each other."""
        store: Any = self.store  # torch's stubs leave `clone` out
        cloned: Store = store.clone()
        return cloned

    @property
    def interface(self) -> str | None:
        """The network interface of this machine's address."""
        return interface_with(self.address)

    def likely_mistake(self) -> str:
        """Why other machines may not reach the store; empty when nothing suggests it."""
        return _likely_mistake(self.name, self.resolved, self.port) if self.is_host else ""


def _likely_mistake(name: str, resolved: str, port: int) -> str:
    if is_loopback(resolved):
        return f"main_process_ip {_shown(name, resolved)}, which is {socket.gethostname()} itself"
    if not is_own_address(resolved) and (reason := connection_error(resolved, port)) is not None:
        return f"main_process_ip {_shown(name, resolved)}, which is not an address of {socket.gethostname()} ({reason})"
    return ""


def _shown(name: str, resolved: str) -> str:
    return name if name == resolved else f"{name} resolved to {resolved}"


def open_rendezvous_store(
    config: RunConfig, name: str, port: int, options: RendezvousOptions, timer: WaitTimer
) -> RendezvousStore:
    """Host the store in which machines meet, or connect to it.

    Raises:
        WorldError: The name cannot be resolved, the port is taken, or nothing listens there in time.
    """
    resolved = _resolve(config, name, timer)
    if _is_host(config, resolved, port, options):
        store = _listen(name, port)
        address = resolved if interface_with(resolved) else source_address(resolved) or resolved
        return RendezvousStore(store, name, resolved, port, True, address)
    _wait_for_listener(config, name, resolved, port, timer)
    store = _connect(config, name, resolved, port)
    return RendezvousStore(store, name, resolved, port, False, source_address(resolved) or resolved)


def _resolve(config: RunConfig, name: str, timer: WaitTimer) -> str:
    while (resolved := resolve_host(name)) is None:
        timer.report(f"the name {name!r} of machine 0 cannot be resolved")
        if timer.is_expired:
            raise _machine_0_not_found(config, f"the name {name!r} of machine 0 cannot be resolved")
        time.sleep(_POLL)
    return resolved


def _is_host(config: RunConfig, resolved: str, port: int, options: RendezvousOptions) -> bool:
    if options.is_host is not None:
        return options.is_host
    if config.rdzv_backend == "static" or config.machine_rank:
        return config.machine_rank == 0
    # With the same command on every machine, the one with that address; of several launchers there, the first.
    return is_own_address(resolved) and connection_error(resolved, port) is not None


def _listen(name: str, port: int) -> TCPStore:
    host = socket.gethostname()
    for attempt in range(10):
        try:
            # Its external address may belong to a NAT gateway, so that the host itself connects through localhost.
            return TCPStore("localhost", port, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT)
        except DistError as error:
            if attempt < 9 and port_error(port) is None:
                time.sleep(_POLL)
                continue
            raise WorldError(
                f"{host} cannot listen at {name}:{port} ({first_line(error)})",
                "Another program uses that port, perhaps an earlier run that is still alive",
                "Choose another port with --main_process_port, on every machine, or stop that program",
            ) from error
    raise AssertionError


def _wait_for_listener(config: RunConfig, name: str, resolved: str, port: int, timer: WaitTimer) -> None:
    shown = f"{_shown(name, resolved)}, port {port}"
    while (reason := connection_error(resolved, port)) is not None:
        timer.report(f"waiting for machine 0 at {shown} ({reason})")
        is_here = is_loopback(resolved)
        if is_here and timer.seconds > _LOOPBACK_TIMEOUT:
            raise _machine_0_not_found(config, _likely_mistake(name, resolved, port))
        if timer.is_expired:
            why = _likely_mistake(name, resolved, port) if is_here else f"nothing listens at {shown} ({reason})"
            raise _machine_0_not_found(config, why)
        time.sleep(_POLL)


def _connect(config: RunConfig, name: str, resolved: str, port: int) -> TCPStore:
    try:
        return TCPStore(resolved, port, is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT)
    except DistError as error:
        what = f"what listens at {_shown(name, resolved)}, port {port}, is not a launcher"
        raise _machine_0_not_found(config, f"{what} ({first_line(error, 100)})") from error


def _machine_0_not_found(config: RunConfig, why: str) -> WorldError:
    return WorldError(
        f"{socket.gethostname()} sees 1 machine, expected {expected(config)}: {why}",
        "Every machine must connect to machine 0",
        "Start machine 0, and give every machine the same --main_process_ip and --main_process_port: an address of "
        "machine 0 that they can reach",
    )


def expected(config: RunConfig) -> str:
    """Return how many machines must join, as text."""
    return str(config.min_machines) if config.min_machines == config.max_machines else f"{config.num_machines}"
