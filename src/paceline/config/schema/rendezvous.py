"""The options of `rdzv_conf`: how long machines wait for each other, under torch elastic's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["RENDEZVOUS", "RENDEZVOUS_OPTIONS", "RendezvousOptions", "read_rendezvous_options"]

RENDEZVOUS: Final = ("static", "c10d")
"""The supported rendezvous backends."""


@dataclass(frozen=True, slots=True)
class RendezvousOptions:
    """The options of `rdzv_conf`; times are in seconds.

    Attributes:
        timeout: How long to wait for the minimum number of machines.
        last_call_timeout: How long to wait for more machines after that (c10d).
        keep_alive_interval: Time between two heartbeats of a machine.
        keep_alive_max_attempt: Missed heartbeats after which a machine counts as lost.
        is_host: Whether this machine listens at main_process_ip; None finds out.
    """

    timeout: float = 300.0
    last_call_timeout: float = 30.0
    keep_alive_interval: float = 5.0
    keep_alive_max_attempt: float = 3.0
    is_host: bool | None = None

    @property
    def lost_after(self) -> float:
        """Seconds without a heartbeat after which a machine counts as lost."""
        return self.keep_alive_interval * self.keep_alive_max_attempt


_ALIASES: Final = {"join_timeout": "timeout"}
RENDEZVOUS_OPTIONS: Final = (*RendezvousOptions.__annotations__, *_ALIASES)
"""The names of all options."""


def read_rendezvous_options(text: str | None) -> RendezvousOptions:
    """Read `key=value,key=value`; raise `ValueError` with everything that is wrong with it."""
    values: dict[str, float | bool] = {}
    wrong: list[str] = []
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        name = _ALIASES.get(name, name)
        if not equals or name not in RENDEZVOUS_OPTIONS:
            wrong.append(f"{part!r} is not an option of the rendezvous")
            continue
        try:
            values[name] = _flag(name, value) if name == "is_host" else _seconds(name, value)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError(", and ".join(wrong))
    return RendezvousOptions(**values)  # type: ignore[arg-type]


def _seconds(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} is {value!r}, which is not a number above 0")
    return number


def _flag(name: str, value: str) -> bool:
    word = value.casefold()
    if word not in ("1", "0", "true", "false"):
        raise ValueError(f"{name} is {value!r}, which is neither true nor false")
    return word in ("1", "true")
