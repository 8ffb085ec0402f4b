"""Where a machine stands in the network: what a name leads to, over which interface, at which port."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "connection_error",
    "gloo_variables",
    "interface_with",
    "is_loopback",
    "is_own_address",
    "port_error",
    "resolve_host",
    "source_address",
]

_PROBE_SECONDS = 3.0


def resolve_host(name: str) -> str | None:
    """Return the address that a name leads to, None when it leads nowhere."""
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def is_loopback(address: str) -> bool:
    """Whether an address means the machine itself, whichever that is."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_own_address(address: str) -> bool:
    """Whether an address is one of this machine's."""
    return is_loopback(address) or interface_with(address) is not None


def interface_with(address: str) -> str | None:
    """Return the name of the interface that has an address, None when no one here has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            return name
    return None


def source_address(address: str) -> str | None:
    """Return the address of this machine from which it would send to another; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return None


def connection_error(host: str, port: int) -> str | None:
    """Say why nothing answers at a place; None when something does."""
    try:
        with socket.create_connection((host, port), timeout=_PROBE_SECONDS):
            return None
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return error.strerror or str(error)


def port_error(port: int) -> str | None:
    """Say why nobody can listen at a port of this machine; None when somebody can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError as error:
            return error.strerror or str(error)
    return None


def gloo_variables(interface: str | None, env: Mapping[str, str]) -> dict[str, str]:
    """What gloo must know: left alone, it takes the interface that this machine's own name leads to."""
    return {"GLOO_SOCKET_IFNAME": interface} if interface and "GLOO_SOCKET_IFNAME" not in env else {}
