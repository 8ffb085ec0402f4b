"""Reads the files of a run: `metrics.jsonl` and `run.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paceline.errors import TrackingError
from paceline.tracking import METRICS_FILE, RECORD_FILE
from paceline.tracking.log_values import flatten

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = ["FACTS", "Entry", "Point", "Run", "each_step_once", "read_run"]

FACTS = ("optimizer_steps", "samples_seen", "tokens_seen", "peak_memory_bytes")
_NOT_NUMBERS = {"NaN", "Infinity", "-Infinity"}


class Point(NamedTuple):
    """One value: the step, the seconds since the run began, and the value."""

    step: float
    time: float
    value: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log.

    Attributes:
        start: The start of the run that wrote it, from 0.
        step: The logged step; lines without one are counted.
        time: Seconds since 1970.
        values: Numbers by name.
        facts: Counters that the run logged about itself: steps, samples, tokens, memory.
    """

    start: int
    step: float
    time: float
    values: Mapping[str, float]
    facts: Mapping[str, float]


@dataclass
class Run:
    """Everything about a run.

    Attributes:
        folder: Its folder.
        entries: Its log; steps that a resumed run repeats are there once, as repeated.
        record: The contents of `run.json`.
        broken: Number of lines that could not be read.
        series: Points by name.
    """

    folder: Path
    entries: Sequence[Entry]
    record: Mapping[str, Any]
    broken: int = 0
    series: dict[str, list[Point]] = field(default_factory=dict)

    @property
    def began(self) -> float:
        """When its first entry was written, in seconds since 1970."""
        return self.entries[0].time if self.entries else 0.0


def read_run(folder: Path) -> Run:
    """Read the files of a run.

    Args:
        folder: The folder of the run.

    Returns:
        The run.

    Raises:
        TrackingError: The folder holds no log; names folders below that do.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise _nothing(folder)
    record = _read_record(folder / RECORD_FILE)
    lines, broken = _read_lines(path)
    if not lines:
        raise TrackingError(
            f"{path} holds no log entry", "A report shows log entries", "Log a value, or wait until the run does"
        )
    run = Run(folder, _current_history(list(_entries(lines, _starts(record)))), record, broken)
    for name in dict.fromkeys(name for entry in run.entries for name in entry.values):
        run.series[name] = _points(run, name)
    return run


def _nothing(folder: Path) -> TrackingError:
    if not folder.is_dir():
        return TrackingError(f"{folder} is not a folder", "A report needs the folder of a run", "Name an existing one")
    found = sorted({path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{METRICS_FILE}")})
    named = ", ".join(map(str, found[:8]))
    return TrackingError(
        f"{folder} holds no {METRICS_FILE}",
        "A Trainer writes it to output_dir, and a script that calls init_trackers to project_dir",
        f"Name one of {named}" if found else "Name the folder of a run that has logged something",
    )


def _read_record(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if isinstance(found, dict):
        return found
    return {}


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the entries and the number of broken lines: a killed run may leave half a line."""
    lines, broken = [], 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                broken += bool(text.strip())
                continue
            if isinstance(line, dict):
                lines.append(line)
            else:
                broken += 1
    return lines, broken


def _starts(record: Mapping[str, Any]) -> list[float]:
    starts = record.get("starts")
    if isinstance(starts, list):
        return [float(start.get("began", 0.0)) for start in starts]
    return []


def _entries(lines: Sequence[Mapping[str, Any]], starts: Sequence[float]) -> Iterator[Entry]:
    for count, line in enumerate(lines, 1):
        numbers = {name: _number(value) for name, value in flatten(line).items()}
        found = {name: value for name, value in numbers.items() if value is not None}
        time, step = found.pop("time", 0.0), found.pop("step", float(count))
        facts = {name: found.pop(name) for name in FACTS if name in found}
        yield Entry(max(0, sum(began <= time + 0.01 for began in starts) - 1), step, time, found, facts)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float) or value in _NOT_NUMBERS:
        return float(value)
    return None


def _current_history(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries that led to the current state: a resumed run drops what came after its checkpoint.

    A start that only evaluates is left out, unless nothing was trained at all.
    """
    training_starts = {entry.start for entry in entries if _clock(entry)}
    kept: list[Entry] = []
    for entry in entries:
        if training_starts and _clock(entry) == 0 and entry.start not in training_starts:
            continue
        if kept and _goes_back(entry, kept[-1]):
            kept = _up_to(_clock(entry) or 0, kept)
        kept.append(entry)
    return kept


def _up_to(clock: float, entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if (_clock(entry) or 0) <= clock]


def _goes_back(entry: Entry, last: Entry) -> bool:
    clock = _clock(entry)
    return bool(clock) and (entry.start > last.start or (clock or 0) < (_clock(last) or 0))


def _clock(entry: Entry) -> float | None:
    """Return how far the training was; None where the log does not say."""
    return next((entry.facts[name] for name in ("optimizer_steps", "samples_seen") if name in entry.facts), None)


def _points(run: Run, name: str) -> list[Point]:
    """The points of a series, each step once."""
    found = (entry for entry in run.entries if name in entry.values)
    return each_step_once(Point(entry.step, entry.time - run.began, entry.values[name]) for entry in found)


def each_step_once(points: Iterable[Point]) -> list[Point]:
    """Points in the order of their steps: one that goes back takes the place of what was there from its step on."""
    kept: list[Point] = []
    for point in points:
        while kept and kept[-1].step >= point.step:
            kept.pop()
        kept.append(point)
    return kept
