"""What follows from the log: rates, smoother curves, and fewer points where there are too many to see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.cli.report.reading import Point, each_step_once

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paceline.cli.report.reading import Entry, Run

__all__ = ["Rates", "rate", "smooth", "thin"]

MOST_POINTS = 800
_FLOPS_OF_A_PARAMETER = 6.0
# Two products of a query with a key and a value, two operations each, three times for forward and backward.
_FLOPS_OF_A_PAIR = 12.0


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
        tokens = each_step_once(rate(run, "tokens_seen"))
        memory = each_step_once(
            Point(entry.step, entry.time - run.began, entry.facts["peak_memory_bytes"] / 2**30)
            for entry in run.entries
            if "peak_memory_bytes" in entry.facts
        )
        peak = peak or _positive(run.record.get("peak_flops"))
        counted, how = _operations(run)
        flops = counted if flops_per_token is None else flops_per_token
        ranks = _positive(run.record.get("ranks")) or 1.0
        samples, lacking = each_step_once(rate(run, "samples_seen")), _lacking(tokens, peak, flops)
        if lacking or peak is None or flops is None:
            return cls(samples, tokens, memory, [], f"unknown: {lacking}")
        mfu = [p._replace(value=100 * p.value * flops / (peak * ranks)) for p in tokens]
        how = how if flops_per_token is None else "as requested"
        about = f"{flops:.3g} operations a token ({how}), {ranks:.0f} x {peak / 1e12:.4g} TFLOP/s"
        return cls(samples, tokens, memory, mfu, about)


def _operations(run: Run) -> tuple[float | None, str]:
    """Operations of a training step for a token, and what is counted."""
    parameters = _positive(run.record.get("parameters"))
    if parameters is None:
        return None, ""
    flops = _FLOPS_OF_A_PARAMETER * parameters
    width, length = _positive(run.record.get("attention_width")), _mean_length(run)
    if width is None or length is None:
        return flops, "6 for each parameter; attention's own products and recomputation are not counted"
    flops += _FLOPS_OF_A_PAIR * width * length
    how = f"6 for each parameter, and attention over sequences of {length:.0f}; recomputation is not counted"
    return flops, how


def _mean_length(run: Run) -> float | None:
    """Tokens of a sample, padding included, over the whole run."""
    tokens = samples = 0.0
    before: Entry | None = None
    for entry in run.entries:
        if "tokens_seen" not in entry.facts or "samples_seen" not in entry.facts:
            continue
        if before is not None and entry.start == before.start:
            tokens += entry.facts["tokens_seen"] - before.facts["tokens_seen"]
            samples += entry.facts["samples_seen"] - before.facts["samples_seen"]
        before = entry
    return tokens / samples if samples > 0 and tokens > 0 else None


def _positive(value: object) -> float | None:
    if isinstance(value, int | float) and value > 0:
        return float(value)
    return None


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
        if grown > 0 and took > 0:
            yield Point(entry.step, entry.time - run.began, grown / took)
        if grown:
            # A counter that goes back is that of a training that was begun again.
            before, pauses = entry, 0.0


def _is_pause(name: str) -> bool:
    return name.endswith("_runtime") and not name.startswith("train")


def smooth(points: Sequence[Point]) -> list[Point]:
    """An exponential mean over about a fiftieth of the points; it passes over values that are not numbers."""
    keep = 1 - 1 / max(2.0, len(points) / 50)
    total = weight = 0.0
    found = []
    for point in points:
        value = math.nan
        if math.isfinite(point.value):
            total, weight = total * keep + point.value, weight * keep + 1
            value = total / weight
        found.append(point._replace(value=value))
    return found


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: of each stretch the first, least, greatest and last, so that no spike is lost."""
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
        if bad is not None:
            ends.add(bad)
        kept.extend(stretch[at] for at in sorted(ends))
    return kept
