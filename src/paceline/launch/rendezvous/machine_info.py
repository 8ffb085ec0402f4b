"""What a machine reports to the others before they train together, and which of it must match."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from paceline.config.resolved import values_of
from paceline.environment.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from paceline.config import RunConfig
    from paceline.launch.command import Command

__all__ = ["MachineInfo", "clock_skews", "local_machine_info", "mismatches"]

_PER_MACHINE: Final = frozenset(
    {
        "compute_environment",
        "enable_cpu_affinity",
        "gpu_ids",
        "machine_rank",
        "main_process_ip",
        "monitor_interval",
        "num_cpu_threads_per_process",
        "preflight",
    }
)
"""Settings that may differ from machine to machine."""

_MAX_CLOCK_SKEW = 2.0
_MAX_SHOWN = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineInfo:
    """One machine, as it reports itself.

    Attributes:
        token: Unique ID of its launcher; two launchers on one machine have different ones.
        host: Host name.
        address: Its address in the network of machine 0.
        machine_rank: Its configured machine_rank.
        num_machines: Its configured num_machines.
        processes: Number of ranks that it will start.
        versions: Version by package.
        config: Dotted key to value, as text, of all settings that must match.
        script: The script, and a digest of the file if there is one.
        problems: Why it cannot start; empty when it can.
    """

    token: str
    host: str
    address: str
    machine_rank: int
    num_machines: str
    processes: int
    versions: Mapping[str, str]
    config: Mapping[str, str]
    script: Sequence[str] = ()
    problems: Sequence[str] = field(default_factory=tuple)

    def __str__(self) -> str:
        return self.host

    def to_json(self) -> str:
        """Return one line of JSON, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> MachineInfo:
        """Read what `to_json` wrote; fields of another release are ignored."""
        data: dict[str, Any] = json.loads(text)
        return cls(**{name: value for name, value in data.items() if name in cls.__slots__})


def local_machine_info(
    config: RunConfig, command: Command, address: str, *, processes: int, detected: bool, problems: Sequence[str] = ()
) -> MachineInfo:
    """Collect the information about this machine.

    Args:
        config: Its configuration.
        command: What it runs.
        address: Its address in the network of machine 0.
        processes: Number of ranks that it will start.
        detected: Whether that number was detected here, so that another machine may have another one.
        problems: Why it cannot start.
    """
    ignored = _PER_MACHINE | {"num_processes"} if detected else _PER_MACHINE
    return MachineInfo(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        address=address,
        machine_rank=config.machine_rank,
        num_machines=str(config.num_machines),
        processes=processes,
        versions={"paceline": __version__, "torch": torch.__version__, "python": platform.python_version()},
        config={key: str(value) for key, value in values_of(config) if key not in ignored},
        script=_script(command),
        problems=tuple(problems),
    )


def _script(command: Command) -> tuple[str, ...]:
    path = Path(command.script)
    if command.kind != "script" or not path.is_file():
        return (command.script,)
    return (path.name, hashlib.sha256(path.read_bytes()).hexdigest()[:12])


def mismatches(machines: Sequence[MachineInfo]) -> list[str]:
    """Return a line for everything in which a machine must match the first one and does not."""
    named = _distinct(machines)
    return [line for other in named[1:] for line in _mismatches(named[0], other)]


def _distinct(machines: Sequence[MachineInfo]) -> list[MachineInfo]:
    """Add the index to hosts that share a name, as containers may."""
    hosts = [machine.host for machine in machines]
    return [
        replace(machine, host=f"{machine.host} (machine {index})") if hosts.count(machine.host) > 1 else machine
        for index, machine in enumerate(machines)
    ]


def _mismatches(one: MachineInfo, other: MachineInfo) -> Iterator[str]:
    for name in sorted({*one.versions, *other.versions}):
        here, there = one.versions.get(name, "none"), other.versions.get(name, "none")
        if here != there:
            yield f"{name} is {here} on {one} and {there} on {other}"
    differing = [
        key
        for key in sorted({*one.config, *other.config})
        if one.config.get(key, "not set") != other.config.get(key, "not set")
    ]
    for key in differing[:_MAX_SHOWN]:
        here, there = one.config.get(key, "not set"), other.config.get(key, "not set")
        yield f"{key} is {here} on {one} and {there} on {other}"
    if differing[_MAX_SHOWN:]:
        yield f"{len(differing) - _MAX_SHOWN} more settings differ between {one} and {other}"
    if tuple(one.script) != tuple(other.script):
        yield _scripts(one, other)


def _scripts(one: MachineInfo, other: MachineInfo) -> str:
    if one.script[0] != other.script[0]:
        return f"{one} runs {one.script[0]} and {other} runs {other.script[0]}"
    return f"{one.script[0]} on {other} differs from the file on {one}"


def clock_skews(machines: Sequence[MachineInfo], times: Sequence[float]) -> list[str]:
    """Return a line for every machine whose clock differs from the first one's by more than reading them can take."""
    lines = []
    for machine, time in zip(machines, times, strict=True):
        skew = time - times[0]
        if abs(skew) > _MAX_CLOCK_SKEW:
            direction = "ahead of" if skew > 0 else "behind"
            lines.append(f"the clock of {machine} is {abs(skew):.0f} s {direction} that of {machines[0]}")
    return lines
