"""What follows from the log: rates, smoother curves, and fewer points where there are too many to see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.cli.report.reading import Point

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paceline.cli.report.reading import Entry, Run

__all__ = ["Rates", "rate", "smooth", "thin"]

MOST_POINTS = 800
_FLOPS_OF_A_PARAMETER = 6.0


@dataclass(frozen=True)
class Rates:
    """Throughput and what part it is of the most that the devices can do.

    Attributes:
        samples: Samples a second over all ranks.
        tokens: Tokens a second over all ranks.
        memory: Peak memory of rank 0 so far, in GiB.
        mfu: Share of the devices' peak, in percent.
        about_mfu: How it was worked out, or what is missing for it.
    """

    samples: list[Point]
    tokens: list[Point]
    memory: list[Point]
    mfu: list[Point]
    about_mfu: str

    @classmethod
    def of(cls, run: Run, *, peak: float | None = None, flops_per_token: float | None = None) -> Rates:
        """Work them out; the arguments override what the run recorded."""
        tokens = list(rate(run, "tokens_seen"))
        memory = [
            Point(entry.step, entry.time - run.began, entry.facts["peak_memory_bytes"] / 2**30)
            for entry in run.entries
            if "peak_memory_bytes" in entry.facts
        ]
        peak = peak or _positive(run.record.get("peak_flops"))
        parameters = _positive(run.record.get("parameters"))
        if flops_per_token is None and parameters is not None:
            flops_per_token = _FLOPS_OF_A_PARAMETER * parameters
        ranks = _positive(run.record.get("ranks")) or 1.0
        lacking = _lacking(tokens, peak, flops_per_token)
        if lacking or peak is None or flops_per_token is None:
            return cls(list(rate(run, "samples_seen")), tokens, memory, [], f"unknown: {lacking}")
        mfu = [p._replace(value=100 * p.value * flops_per_token / (peak * ranks)) for p in tokens]
        about = (
            f"{flops_per_token:.3g} operations a token (6 for each parameter; attention's own products and "
            f"recomputation are not counted), {ranks:.0f} x {peak / 1e12:.4g} TFLOP/s"
        )
        return cls(list(rate(run, "samples_seen")), tokens, memory, mfu, about)


def _positive(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _lacking(tokens: Sequence[Point], peak: float | None, flops: float | None) -> str:
    missing = []
    if not tokens:
        missing.append("the log does not say how many tokens were seen between two entries")
    if flops is None:
        missing.append("the number of parameters was not recorded (--flops_per_token)")
    if peak is None:
        missing.append("the device's peak is in no table (--peak_tflops)")
    return "; ".join(missing)


def rate(run: Run, counter: str) -> Iterator[Point]:
    """How fast a counter grew between entries, without the time that evaluations took."""
    before: Entry | None = None
    pauses = 0.0
    for entry in run.entries:
        pauses += sum(seconds for name, seconds in entry.values.items() if _is_pause(name))
        if counter not in entry.facts:
            continue
        if before is None or entry.start != before.start:
            before, pauses = entry, 0.0
            continue
        grown, took = entry.facts[counter] - before.facts[counter], entry.time - before.time - pauses
        if grown > 0:
            if took > 0:
                yield Point(entry.step, entry.time - run.began, grown / took)
            before, pauses = entry, 0.0


def _is_pause(name: str) -> bool:
    return name.endswith("_runtime") and not name.startswith("train")


def smooth(points: Sequence[Point]) -> list[Point]:
    """An exponential mean over about a fiftieth of the points; it passes over values that are no numbers."""
    keep = 1 - 1 / max(2.0, len(points) / 50)
    total = weight = 0.0
    found = []
    for point in points:
        if math.isfinite(point.value):
            total, weight = total * keep + point.value, weight * keep + 1
        found.append(point._replace(value=total / weight if math.isfinite(point.value) else math.nan))
    return found


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many points: of each stretch the first, least, greatest and last, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(5 * len(points) / most)
    kept: list[Point] = []
    for first in range(0, len(points), size):
        stretch = points[first : first + size]
        finite = [at for at, point in enumerate(stretch) if math.isfinite(point.value)] or [0]
        ends = {0, len(stretch) - 1}
        ends |= {min(finite, key=lambda at: stretch[at].value), max(finite, key=lambda at: stretch[at].value)}
        bad = next((at for at, point in enumerate(stretch) if not math.isfinite(point.value)), None)
        ends |= set() if bad is None else {bad}
        kept.extend(stretch[at] for at in sorted(ends))
    return kept
