"""Addresses, interfaces and ports of this machine and of those it connects to."""

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
    """Return the address of a host name; None when it cannot be resolved."""
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def is_loopback(address: str) -> bool:
    """Whether an address is a loopback address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_own_address(address: str) -> bool:
    """Whether an address is one of this machine's."""
    return is_loopback(address) or interface_with(address) is not None


def interface_with(address: str) -> str | None:
    """Return the interface of this machine that has an address; None when there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None


def source_address(address: str) -> str | None:
    """Return the address of this machine from which packets to `address` leave; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return None


def connection_error(host: str, port: int) -> str | None:
    """Return why no TCP connection can be made; None when one can."""
    try:
        with socket.create_connection((host, port), timeout=_PROBE_SECONDS):
            return None
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return error.strerror or str(error)


def port_error(port: int) -> str | None:
    """Return why a port of this machine cannot be listened on; None when it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError as error:
            return error.strerror or str(error)
    return None


def gloo_variables(interface: str | None, env: Mapping[str, str]) -> dict[str, str]:
    """Return the variable that sets gloo's interface: its default is the one that the host name resolves to."""
    return {"GLOO_SOCKET_IFNAME": interface} if interface and "GLOO_SOCKET_IFNAME" not in env else {}
