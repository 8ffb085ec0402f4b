"""From where all ranks stand to a few sentences: who is missing, in what the others wait, and what to look for."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from paceline.errors import named_ranks
from paceline.watchdog.locations import CodeLocation
from paceline.watchdog.recorder import Operation

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["RankStatus", "diagnose"]

# Operations for which every rank must bring tensors of one shape.
_ALIKE = ("all_reduce", "allreduce", "broadcast", "reduce", "all_gather", "allgather", "reduce_scatter", "barrier")

_SAME_CALLS = (
    "Every rank must make the same calls in the same order, with the same shapes and dtypes; with --debug, paceline "
    "compares before each of its own exchanges and names the odd rank"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """Where one rank is.

    Attributes:
        rank: Its number.
        host: Its machine.
        pid: Its process.
        place: The user's line that it is at; None once it has ended.
        operations: The last collectives that it entered, of each group, oldest first.
        fate: Empty while it runs; else how it ended, such as `has ended`.
        raised: Whether a collective raised there, the last that it entered.
    """

    rank: int
    host: str = ""
    pid: int = 0
    place: CodeLocation | None = None
    operations: tuple[Operation, ...] = ()
    fate: str = ""
    raised: bool = False

    def __str__(self) -> str:
        place = "" if self.place is None else str(self.place)
        last = f"  [{self.operations[-1]}]" if self.operations else ""
        return f"rank {self.rank}: {', '.join(part for part in (self.fate, place) if part)}{last}"

    def to_data(self) -> dict[str, Any]:
        """As values that JSON has."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> RankStatus:
        """From what `to_data` gave."""
        place = data["place"]
        operations = tuple(Operation(**operation) for operation in data["operations"])
        return cls(**{**data, "place": place and CodeLocation(**place), "operations": operations})


def diagnose(standings: Iterable[RankStatus], size: int, *, seconds: float) -> str:
    """Say who has not arrived, in which call the others are, and at which line each is.

    Args:
        standings: Of the ranks that answered.
        size: How many ranks there are.
        seconds: How long somebody has waited; 0 when a collective raised instead.
    """
    known = {standing.rank: standing for standing in standings}
    stuck = _stuck(known.values())
    silent = [rank for rank in range(size) if rank not in known]
    if stuck is None:
        head = _sentence_without_collective(known, silent, seconds)
        return "\n".join([head, *_lines(known, silent, None)])
    inside = [rank for rank, standing in known.items() if _at(standing, stuck) is not None]
    absent = [
        rank
        for rank, standing in sorted(known.items())
        if rank not in inside and (_is_default(stuck) or any(o.group == stuck.group for o in standing.operations))
    ]
    missing = [*absent, *(silent if _is_default(stuck) else [])]
    if missing:
        head, advice = _absence(known, stuck, inside, missing, seconds), _advice(known, inside, missing)
    else:
        head, advice = _difference(known, stuck, seconds)
    return "\n".join([head, *_lines(known, silent, stuck), advice])


def _is_default(operation: Operation) -> bool:
    return operation.group.rpartition("/")[2] == "0"


def _stuck(standings: Iterable[RankStatus]) -> Operation | None:
    """The collective that most ranks are in: the first that has not ended there."""
    found: list[Operation] = []
    for standing in standings:
        firsts: dict[str, Operation] = {}
        for operation in standing.operations:
            if not operation.done:
                firsts.setdefault(operation.group, operation)
        if not firsts and standing.raised and standing.operations:
            # A collective that raised counts as ended.
            last = max(standing.operations, key=lambda o: (o.group.endswith("/0"), o.number))
            firsts[last.group] = last
        found.extend(firsts.values())
    if not found:
        return None
    group = Counter(operation.group for operation in found).most_common(1)[0][0]
    return min((o for o in found if o.group == group), key=lambda o: o.number)


def _at(standing: RankStatus, stuck: Operation) -> Operation | None:
    """What the rank entered as that collective of the group, or later."""
    entered = [o for o in standing.operations if o.group == stuck.group and o.number >= stuck.number]
    return min(entered, key=lambda o: o.number, default=None)


def _absence(
    known: Mapping[int, RankStatus], stuck: Operation, inside: Sequence[int], missing: Sequence[int], seconds: float
) -> str:
    what = _what(known, stuck, inside)
    remote_request = _collective_calls(known, missing)
    if remote_request and len(missing) == len([rank for rank in missing if rank in known]):
        call = remote_request[0]
        return (
            f"{call} is not called by every rank: {named_ranks(missing, 'is', 'are')} in it, and "
            f"{named_ranks(inside, 'is', 'are')} in {what}"
        )
    if seconds:
        waiting = f"{named_ranks(inside, 'has', 'have')} waited for {seconds:.0f} s"
    else:
        waiting = named_ranks(inside, "was", "were")
    if not any(rank in known for rank in missing):
        return f"{named_ranks(missing, 'does', 'do')} not answer; {waiting} in {what}"
    if all(rank in known and known[rank].fate for rank in missing):
        return f"{_fates(known, missing)} without entering {what}, in which {waiting}"
    return f"{named_ranks(missing, 'has', 'have')} not entered {what}, in which {waiting}"


def _what(known: Mapping[int, RankStatus], stuck: Operation, inside: Sequence[int]) -> str:
    """The call of the user's that ranks are in, and the exchange that it has come to."""
    calls = {place.call for rank in inside if (place := known[rank].place) is not None}
    call = calls.pop() if len(calls) == 1 else ""
    return f"{call} ({stuck})" if call and call != stuck.name else str(stuck)


def _collective_calls(known: Mapping[int, RankStatus], ranks: Sequence[int]) -> list[str]:
    """The methods that every rank must call and that some of these ranks are in."""
    places = [known[rank].place for rank in ranks if rank in known]
    return sorted({place.call for place in places if place is not None and place.is_collective})


def _called_by_some(known: Mapping[int, RankStatus], ranks: Iterable[int]) -> list[str]:
    """The methods that every rank must call, and that some of these ranks are in and others are not."""
    places = [place for rank in ranks if (place := known[rank].place) is not None]
    calls = sorted({place.call for place in places if place.is_collective})
    return [call for call in calls if any(place.call != call for place in places)]


def _difference(known: Mapping[int, RankStatus], stuck: Operation, seconds: float) -> tuple[str, str]:
    """Every rank has come to as many collectives: do they do the same there?"""
    for number in sorted({o.number for s in known.values() for o in s.operations if o.group == stuck.group}):
        entered = {
            rank: operation
            for rank, standing in known.items()
            for operation in standing.operations
            if operation.group == stuck.group and operation.number == number
        }
        if len({_face(operation) for operation in entered.values()}) > 1:
            now = number == stuck.number
            texts = {rank: _what(known, o, [rank]) if now else str(o) for rank, o in entered.items()}
            seen = ", ".join(f"{named_ranks(ranks)} in {text}" for text, ranks in _grouped(texts).items())
            calls = _called_by_some(known, entered) if now else []
            if len(calls) == 1:
                return f"{calls[0]} is not called by every rank: {seen}", _branch(calls)
            head = f"the ranks {'are' if now else 'were'} in different calls: {seen}"
            return head, _branch(calls) if calls else _SAME_CALLS
    waited = f" for {seconds:.0f} s" if seconds else ""
    return (
        f"all ranks have been in {stuck}{waited}, and it does not end",
        "They agree about what they exchange, so look at what connects them: the network, or a device that stopped",
    )


def _face(operation: Operation) -> tuple[str, str]:
    return operation.name, operation.what if operation.name in _ALIKE else ""


def _sentence_without_collective(known: Mapping[int, RankStatus], silent: Sequence[int], seconds: float) -> str:
    ended = [rank for rank, standing in sorted(known.items()) if standing.fate]
    if silent:
        return f"{named_ranks(silent, 'does', 'do')} not answer"
    if ended:
        return f"{_fates(known, ended)} while others still exchanged something"
    return f"nothing has moved for {seconds:.0f} s" if seconds else "an exchange between ranks failed"


def _fates(known: Mapping[int, RankStatus], ranks: Iterable[int]) -> str:
    """How ranks ended; a fate is worded for one rank."""
    grouped = _grouped({rank: known[rank].fate for rank in ranks})
    return " and ".join(named_ranks(alike, fate, _of_several(fate)) for fate, alike in grouped.items())


def _of_several(fate: str) -> str:
    return fate.replace("has ", "have ", 1).replace("is at the end of its", "are at the end of their", 1)


def _lines(known: Mapping[int, RankStatus], silent: Sequence[int], stuck: Operation | None) -> list[str]:
    """One line for each place, with the ranks that are there."""
    texts = {rank: _where(standing, stuck) for rank, standing in sorted(known.items())}
    texts |= dict.fromkeys(silent, "no answer: the process is gone, stopped, or its interpreter does not run")
    return [f"  {named_ranks(ranks)}: {text}" for text, ranks in _grouped(texts).items()]


def _where(standing: RankStatus, stuck: Operation | None) -> str:
    text = ", ".join(part for part in (standing.fate, str(standing.place or "")) if part)
    operation = None if stuck is None else _at(standing, stuck)
    return f"{text}  [{operation}]" if operation is not None else text


def _advice(known: Mapping[int, RankStatus], inside: Sequence[int], missing: Sequence[int]) -> str:
    calls = _collective_calls(known, missing) or _collective_calls(known, inside)
    if not any(rank in known for rank in missing):
        return "Look at what that rank wrote last, and whether its machine can still be reached"
    if any(rank in known and known[rank].fate for rank in missing):
        return "Every rank must make as many calls: look for a loop that ends earlier there"
    if calls:
        return f"{_branch(calls)}; if a rank only needs longer, raise timeout"
    return (
        "Every rank must make the same calls in the same order; if a rank only needs longer, raise timeout (seconds "
        "that a collective may take)"
    )


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
