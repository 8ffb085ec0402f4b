"""Diagnosis of a hang from the status of all ranks: who is missing, where the others wait, and what to look for."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from paceline.collectives.watchdog.locations import CodeLocation
from paceline.collectives.watchdog.recorder import OPENING, Operation
from paceline.errors import named_ranks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["RankStatus", "diagnose"]

# Collectives for which every rank must pass tensors of the same shape.
_SAME_SHAPES = (
    "all_reduce",
    "allreduce",
    "broadcast",
    "reduce",
    "all_gather",
    "allgather",
    "reduce_scatter",
    "barrier",
)

_SAME_CALLS = (
    "Every rank must make the same calls in the same order, with the same shapes and dtypes; with --debug, paceline "
    "compares the ranks before each of its own collectives and names the one that differs"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """Where one rank is.

    Attributes:
        rank: Its rank.
        host: Its machine's name.
        pid: Its process ID.
        location: The user's line that it is at; None once it has ended.
        operations: The last collectives of each group that it entered, oldest first.
        fate: Empty while it runs; else how it ended, such as `has ended`.
        raised: Whether the last collective that it entered raised.
    """

    rank: int
    host: str = ""
    pid: int = 0
    location: CodeLocation | None = None
    operations: tuple[Operation, ...] = ()
    fate: str = ""
    raised: bool = False

    def __str__(self) -> str:
        location = ""
        if self.location is not None:
            location = str(self.location)
        last = f"  [{self.operations[-1]}]" if self.operations else ""
        return f"rank {self.rank}: {', '.join(part for part in (self.fate, location) if part)}{last}"

    def to_data(self) -> dict[str, Any]:
        """Return JSON-compatible values, which `from_data` reads."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> RankStatus:
        """Read what `to_data` returned."""
        location = data["location"]
        operations = tuple(Operation(**operation) for operation in data["operations"])
        return cls(**{**data, "location": location and CodeLocation(**location), "operations": operations})


def diagnose(statuses: Iterable[RankStatus], size: int, *, seconds: float) -> str:
    """Return who has not arrived, in which call the others are, and the line of each.

    Args:
        statuses: Of the ranks that responded.
        size: The number of ranks.
        seconds: How long a rank has waited; 0 when a collective raised instead.
    """
    return _Diagnosis(statuses, size, seconds).text()


class _Diagnosis:
    """The steps of `diagnose`.

    Attributes:
        known: Status of the ranks that responded.
        silent: The other ranks.
        stuck: The collective that most ranks are in.
        inside: Ranks that have entered it.
        missing: Ranks that have not, and must.
    """

    def __init__(self, statuses: Iterable[RankStatus], size: int, seconds: float) -> None:
        self.known = {status.rank: status for status in statuses}
        self.silent = [rank for rank in range(size) if rank not in self.known]
        self.seconds = seconds
        self.stuck = _stuck(self.known.values())
        self.inside: list[int] = []
        self.missing: list[int] = []
        if self.stuck is not None:
            self.inside = [rank for rank, status in self.known.items() if _entered(status, self.stuck) is not None]
            self.missing = self._missing(self.stuck)

    def text(self) -> str:
        if self.stuck is None:
            return "\n".join([self._without_collective(), *self._lines()])
        if self.missing:
            head, advice = self._absence(self.stuck), self._advice()
        else:
            head, advice = self._difference(self.stuck)
        return "\n".join([head, *self._lines(), advice])

    def _missing(self, stuck: Operation) -> list[int]:
        """Ranks that are in the group and have not entered the collective."""
        outside = [rank for rank in sorted(self.known) if rank not in self.inside]
        if _is_default(stuck):
            return [*outside, *self.silent]
        return [rank for rank in outside if any(o.group == stuck.group for o in self.known[rank].operations)]

    def _without_collective(self) -> str:
        ended = [rank for rank, status in sorted(self.known.items()) if status.fate]
        if self.silent:
            return f"{named_ranks(self.silent, 'does', 'do')} not respond"
        if ended:
            return f"{self._fates(ended)} while others were still in a collective"
        return f"nothing has moved for {self.seconds:.0f} s" if self.seconds else "a collective failed"

    def _absence(self, stuck: Operation) -> str:
        """Some ranks have not entered the collective."""
        what = self._what(stuck, self.inside)
        responding = [rank for rank in self.missing if rank in self.known]
        calls = self._collective_calls(self.missing)
        if calls and responding == self.missing:
            return (
                f"{calls[0]} is not called by every rank: {named_ranks(self.missing, 'is', 'are')} in it, and "
                f"{named_ranks(self.inside, 'is', 'are')} in {what}"
            )
        if self.seconds:
            waiting = f"{named_ranks(self.inside, 'has', 'have')} waited for {self.seconds:.0f} s"
        else:
            waiting = named_ranks(self.inside, "was", "were")
        if not responding:
            return f"{named_ranks(self.missing, 'does', 'do')} not respond; {waiting} in {what}"
        if all(rank in self.known and self.known[rank].fate for rank in self.missing):
            return f"{self._fates(self.missing)} without entering {what}, in which {waiting}"
        return f"{named_ranks(self.missing, 'has', 'have')} not entered {what}, in which {waiting}"

    def _advice(self) -> str:
        calls = self._collective_calls(self.missing) or self._collective_calls(self.inside)
        responding = [rank for rank in self.missing if rank in self.known]
        if not responding:
            return "Check the last output of that rank, and that its machine can still be reached"
        if any(self.known[rank].fate for rank in responding):
            return "Every rank must make the same number of calls: look for a loop that ends earlier there"
        if calls:
            return f"{_branch(calls)}; if a rank only needs longer, raise timeout, and hang_timeout if it is set"
        return (
            "Every rank must make the same calls in the same order; if a rank only needs longer, raise timeout "
            "(seconds that a collective may take), and hang_timeout if it is set"
        )

    def _difference(self, stuck: Operation) -> tuple[str, str]:
        """All ranks have entered as many collectives: find the first in which they differ."""
        numbers = {o.number for status in self.known.values() for o in status.operations if o.group == stuck.group}
        for number in sorted(numbers):
            entered = self._entered_as(stuck.group, number)
            if len(set(map(_signature, entered.values()))) > 1:
                return self._different_calls(entered, is_now=number == stuck.number)
        waited = f" for {self.seconds:.0f} s" if self.seconds else ""
        return (
            f"all ranks have been in {stuck}{waited}, and it does not complete",
            "The ranks agree about the collective, so check what connects them: the network, or a device that hangs",
        )

    def _entered_as(self, group: str, number: int) -> dict[int, Operation]:
        """By rank, the collective of a group with a number."""
        return {
            rank: operation
            for rank, status in self.known.items()
            for operation in status.operations
            if operation.group == group and operation.number == number
        }

    def _different_calls(self, entered: Mapping[int, Operation], *, is_now: bool) -> tuple[str, str]:
        texts = {rank: self._what(o, [rank]) if is_now else str(o) for rank, o in entered.items()}
        seen = ", ".join(f"{named_ranks(ranks)} in {text}" for text, ranks in _grouped(texts).items())
        calls = []
        if is_now:
            calls = self._called_by_some(entered)
        if len(calls) == 1:
            return f"{calls[0]} is not called by every rank: {seen}", _branch(calls)
        head = f"the ranks {'are' if is_now else 'were'} in different calls: {seen}"
        return head, _branch(calls) if calls else _SAME_CALLS

    def _what(self, operation: Operation, ranks: Iterable[int]) -> str:
        """The user's call that ranks are in, with the collective that it has entered."""
        calls = {location.call for location in self._locations(ranks)}
        call = ""
        if len(calls) == 1:
            call = calls.pop()
        if call and call != operation.name:
            return f"{call} ({operation})"
        return str(operation)

    def _locations(self, ranks: Iterable[int]) -> list[CodeLocation]:
        locations = [self.known[rank].location for rank in ranks if rank in self.known]
        return [location for location in locations if location is not None]

    def _collective_calls(self, ranks: Iterable[int]) -> list[str]:
        """The methods that every rank must call and that some of these ranks are in."""
        return sorted({location.call for location in self._locations(ranks) if location.is_collective})

    def _called_by_some(self, ranks: Iterable[int]) -> list[str]:
        """The methods that every rank must call, and that some of these ranks are in and others are not."""
        locations = self._locations(ranks)
        calls = self._collective_calls(ranks)
        return [call for call in calls if any(location.call != call for location in locations)]

    def _fates(self, ranks: Iterable[int]) -> str:
        """How ranks ended; a fate is worded for one rank."""
        grouped = _grouped({rank: self.known[rank].fate for rank in ranks})
        return " and ".join(named_ranks(alike, fate, _plural(fate)) for fate, alike in grouped.items())

    def _lines(self) -> list[str]:
        """One line per location, with the ranks that are there."""
        texts = {rank: _where(status, self.stuck) for rank, status in sorted(self.known.items())}
        no_response = "no response: the process is gone or stopped, or its interpreter does not run"
        texts |= dict.fromkeys(self.silent, no_response)
        return [f"  {named_ranks(ranks)}: {text}" for text, ranks in _grouped(texts).items()]


def _is_default(operation: Operation) -> bool:
    return operation.group.rpartition("/")[2] == "0"


def _stuck(statuses: Iterable[RankStatus]) -> Operation | None:
    """The collective that most ranks are in: the first that has not completed there."""
    pending: list[Operation] = []
    for status in statuses:
        pending.extend(_pending(status))
    if not pending:
        return None
    # Where as many are in a collective as open a group, the collective says more.
    pending.sort(key=lambda operation: operation.group == OPENING)
    group = Counter(operation.group for operation in pending).most_common(1)[0][0]
    return min((o for o in pending if o.group == group), key=lambda o: o.number)


def _pending(status: RankStatus) -> Iterable[Operation]:
    """The first collective of each group that has not completed on a rank, or the one that raised there."""
    firsts: dict[str, Operation] = {}
    for operation in status.operations:
        if not operation.done:
            firsts.setdefault(operation.group, operation)
    if not firsts and status.raised and status.operations:
        # A collective that raised counts as completed.
        return [max(status.operations, key=lambda o: (o.group.endswith("/0"), o.number))]
    return firsts.values()


def _entered(status: RankStatus, stuck: Operation) -> Operation | None:
    """What a rank entered as that collective of the group, or later."""
    entered = [o for o in status.operations if o.group == stuck.group and o.number >= stuck.number]
    return min(entered, key=lambda o: o.number, default=None)


def _signature(operation: Operation) -> tuple[str, str]:
    return operation.name, operation.what if operation.name in _SAME_SHAPES else ""


def _plural(fate: str) -> str:
    return fate.replace("has ", "have ", 1).replace("is at the end of its", "are at the end of their", 1)


def _where(status: RankStatus, stuck: Operation | None) -> str:
    text = ", ".join(part for part in (status.fate, str(status.location or "")) if part)
    operation = None
    if stuck is not None:
        operation = _entered(status, stuck)
    return f"{text}  [{operation}]" if operation is not None else text


def _branch(calls: Sequence[str]) -> str:
    return (
        f"Every rank must call {' and '.join(calls)}: look for a branch that only some ranks take, such as "
        "`if accelerator.is_main_process`"
    )


def _grouped(texts: Mapping[int, str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        groups.setdefault(text, []).append(rank)
    return groups
