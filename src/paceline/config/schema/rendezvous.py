"""The options of `rdzv_conf`, under torch elastic's names: how long machines wait for each other."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

__all__ = ["RENDEZVOUS", "RENDEZVOUS_OPTIONS", "RendezvousOptions", "read_rendezvous_options"]

RENDEZVOUS: Final = ("static", "c10d")
"""The ways in which machines meet."""


@dataclass(frozen=True, slots=True)
class RendezvousOptions:
    """What `rdzv_conf` says. Times are in seconds.

    Attributes:
        timeout: How long to wait for the machines that must take part.
        last_call_timeout: How long to wait for more, once those are there (c10d).
        keep_alive_interval: From one sign of life of a machine to its next.
        keep_alive_max_attempt: A machine is given up after so many that did not come.
        is_host: Whether this machine listens at main_process_ip; None finds out.
    """

    timeout: float = 300.0
    last_call_timeout: float = 30.0
    keep_alive_interval: float = 5.0
    keep_alive_max_attempt: float = 3.0
    is_host: bool | None = None

    @property
    def lost_after(self) -> float:
        """Seconds without a sign of life after which a machine is given up."""
        return self.keep_alive_interval * self.keep_alive_max_attempt


_ALIASES: Final = {"join_timeout": "timeout"}
RENDEZVOUS_OPTIONS: Final = (*(f.name for f in fields(RendezvousOptions)), *_ALIASES)
"""Every option that `rdzv_conf` may hold."""


def read_rendezvous_options(text: str | None) -> RendezvousOptions:
    """Read `key=value,key=value`; raise `ValueError` saying all that is wrong with it."""
    values: dict[str, float | bool] = {}
    wrong: list[str] = []
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        name = _ALIASES.get(name, name)
        if not equals or name not in RENDEZVOUS_OPTIONS:
            wrong.append(f"{part!r} is no option of the rendezvous")
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
        raise ValueError(f"{name} is {value!r}, which is no number above 0")
    return number


def _flag(name: str, value: str) -> bool:
    word = value.casefold()
    if word not in ("1", "0", "true", "false"):
        raise ValueError(f"{name} is {value!r}, which is neither true nor false")
    return word in ("1", "true")
