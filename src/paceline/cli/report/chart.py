"""A line chart as SVG text: drawn once here, so that the page needs no script to show it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from paceline.cli.report.series import smooth, thin

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.cli.report.reading import Point

__all__ = ["Chart", "draw", "short", "ticks"]

WIDTH, HEIGHT = 560, 280
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 40
_SMOOTH_FROM = 100
_FEW = 40


@dataclass(frozen=True)
class Chart:
    """One plot.

    Attributes:
        title: Above it.
        lines: Points by name; the names are the legend where there are several.
        unit: Of the values.
        note: Below the title.
        is_noisy: Draw a smoothed line over the values, where there are many.
        from_zero: Begin the scale at zero.
    """

    title: str
    lines: Mapping[str, Sequence[Point]]
    unit: str = ""
    note: str = ""
    is_noisy: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Scale:
    """From values to places on one axis."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        """The place of a value; what lies outside is put at the edge."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 1)


def draw(chart: Chart, *, by_time: bool) -> str:
    """The chart as SVG, against steps or against time."""
    seconds, unit = _time_unit(chart) if by_time else (1.0, "step")
    across = [_x(point, by_time) / seconds for line in chart.lines.values() for point in line]
    low, high = min(across), max(across)
    room = 0.5 if low == high else 0.0
    x = Scale(low - room, high + room, LEFT, WIDTH - RIGHT)
    bottom, top, is_cut = _range([p.value for line in chart.lines.values() for p in line], from_zero=chart.from_zero)
    y = Scale(bottom, top, HEIGHT - BOTTOM, TOP)
    parts = [*_axes(x, y, unit)]
    shown = []
    for index, points in enumerate(chart.lines.values()):
        shown.append(_line(points, x, y, index=index, noisy=chart.is_noisy, by_time=by_time, seconds=seconds))
        parts.append(shown[-1][0])
    data = json.dumps([[name, xs, values] for name, (_, xs, values) in zip(chart.lines, shown, strict=True)])
    frame = f'data-x="{x.low},{x.high},{LEFT},{WIDTH - RIGHT}" data-y="{y.low},{y.high},{HEIGHT - BOTTOM},{TOP}"'
    cut = '<text class="cut" x="66" y="24">some values lie beyond the scale</text>' if is_cut else ""
    kind = "by-time" if by_time else "by-step"
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}" '
        f'{frame} data-unit="{unit}" data-points="{escape(data)}">{"".join(parts)}{cut}</svg>'
    )


def _x(point: Point, by_time: bool) -> float:
    return point.time if by_time else point.step


def _time_unit(chart: Chart) -> tuple[float, str]:
    longest = max(point.time for line in chart.lines.values() for point in line)
    if longest > 7200:
        return 3600.0, "hours"
    return (60.0, "minutes") if longest > 180 else (1.0, "seconds")


def _range(values: Sequence[float], *, from_zero: bool) -> tuple[float, float, bool]:
    """Return the ends of the scale, and whether a few outliers are cut off."""
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return 0.0, 1.0, False
    low, high, is_cut = _without_outliers(finite, keep_low=from_zero)
    if from_zero:
        low = min(0.0, low)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - (0 if from_zero else margin), high + margin, is_cut
    margin = 0.06 * (high - low)
    return low if from_zero and low == 0 else low - margin, high + margin, is_cut


def _without_outliers(ordered: Sequence[float], *, keep_low: bool) -> tuple[float, float, bool]:
    """Cut off the outer 2 % where they are far away: a first loss of 1000 must not flatten the rest."""
    low, high, is_cut = ordered[0], ordered[-1], False
    if len(ordered) < 30:
        return low, high, is_cut
    outer = len(ordered) // 50
    near_low, near_high = ordered[outer], ordered[-1 - outer]
    spread = near_high - near_low
    if spread > 0 and high - near_high > 3 * spread:
        high, is_cut = near_high + 0.3 * spread, True
    if spread > 0 and near_low - low > 3 * spread and not keep_low:
        low, is_cut = near_low - 0.3 * spread, True
    return low, high, is_cut


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two ends, about so many.

    >>> ticks(0, 10)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(at * step, 12) for at in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few characters.

    >>> [short(v) for v in (0.0, 1234567, 15000, 0.00004, 2.5, 1000)]
    ['0', '1.23M', '15k', '4e-05', '2.5', '1000']
    """
    if not math.isfinite(value):
        return str(value)
    for least, divisor, sign in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / divisor:.3g}{sign}"
    return f"{value:.4g}"


def _axes(x: Scale, y: Scale, unit: str) -> list[str]:
    parts = []
    for value in ticks(y.low, y.high):
        at = y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{short(value)}</text>')
    for value in ticks(x.low, x.high, 6):
        if unit == "step" and value != round(value):
            continue
        at = x(value)
        parts.append(f'<path class="grid" d="M{at} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(value)}</text>'
        )
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{unit}</text>')
    return parts


def _line(
    points: Sequence[Point], x: Scale, y: Scale, *, index: int, noisy: bool, by_time: bool, seconds: float
) -> tuple[str, list[float], list[float | str]]:
    """Draw a line; return it with the points that the pointer finds."""
    seen = thin(points)
    xs = [_x(point, by_time) / seconds for point in seen]
    color = f"c{index % 6}"
    is_smoothed = noisy and len(points) >= _SMOOTH_FROM
    drawn = f'<path class="line {color}{" raw" if is_smoothed else ""}" d="{_path(xs, seen, x, y)}"/>'
    if is_smoothed:
        calm = thin(smooth([_clipped(point, y) for point in points]))
        calm_xs = [_x(point, by_time) / seconds for point in calm]
        drawn += f'<path class="line {color}" d="{_path(calm_xs, calm, x, y)}"/>'
    for at, point in zip(xs, seen, strict=True):
        if not math.isfinite(point.value):
            drawn += f'<path class="bad" d="M{x(at)} {HEIGHT - BOTTOM}v-8"/>'
        elif len(points) <= _FEW:
            drawn += f'<circle class="dot {color}" cx="{x(at)}" cy="{y(point.value)}" r="2.6"/>'
    return drawn, [round(at, 3) for at in xs], [_rounded(point.value) for point in seen]


def _rounded(value: float) -> float | str:
    """Round to five digits; JSON has no NaN or infinity, so these become text."""
    if math.isfinite(value):
        return float(f"{value:.5g}")
    return str(value)


def _clipped(point: Point, y: Scale) -> Point:
    """Move a value to the edge of the scale: a spike beyond it would distort the smoothed line for long."""
    if not math.isfinite(point.value):
        return point
    return point._replace(value=min(max(point.value, y.low), y.high))


def _path(xs: Sequence[float], points: Sequence[Point], x: Scale, y: Scale) -> str:
    """A path through the points, broken where a value is not a number."""
    words, is_drawing = [], False
    for at, point in zip(xs, points, strict=True):
        if not math.isfinite(point.value):
            is_drawing = False
            continue
        words.append(f"{'L' if is_drawing else 'M'}{x(at)} {y(point.value)}")
        is_drawing = True
    return "".join(words)
