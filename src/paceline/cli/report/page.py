"""The page: tiles, charts, tables; everything inside one file."""

from __future__ import annotations

import datetime
import math
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from paceline.cli.report.chart import Chart, draw, short
from paceline.errors import counted
from paceline.tracking.log_values import flatten

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from paceline.cli.report.reading import Point, Run
    from paceline.cli.report.series import Rates

__all__ = ["build_page"]

_NOT_SHOWN = ("_runtime", "_per_second", "total_flos")
_MOST_CHARTS = 60
_RATE_NAMES = ("learning_rate", "lr")
_NORM_NAMES = ("grad_norm", "gradient_norm")


def build_page(run: Run, rates: Rates) -> str:
    """The whole page as text."""
    home = files("paceline.cli.report")
    style, script = (home.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    title = escape(str(run.record.get("run_name") or run.folder.resolve().name))
    body = "".join([_header(run, title), _warnings(run), _tiles(run, rates), _charts(run, rates), *_tables(run)])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head>\n"
        f"<body><main>{body}</main><script>{script}</script></body></html>\n"
    )


def _header(run: Run, title: str) -> str:
    project = run.record.get("project")
    when = datetime.datetime.fromtimestamp(run.began).astimezone().strftime("%d %B %Y, %H:%M %Z")
    parts = []
    if project:
        parts = [f"project {escape(str(project))}"]
    parts += [f"began {when}", _ending(run), escape(str(run.folder))]
    return f'<h1>{title}</h1><p class="soft" style="margin:0">{" · ".join(parts)}</p>'


def _ending(run: Run) -> str:
    starts = run.record.get("starts")
    last = {}
    if isinstance(starts, list) and starts:
        last = starts[-1]
    if "ended" not in last:
        return "still running, or killed"
    if last.get("crashed"):
        return "ended with an error"
    return "finished"


def _warnings(run: Run) -> str:
    texts = []
    if run.broken:
        texts.append(f"{counted(run.broken, 'line')} of the log could not be read.")
    if not run.record:
        texts.append("There is no run.json, so the configuration and the environment are not known.")
    bad = {name: [p for p in points if not math.isfinite(p.value)] for name, points in run.series.items()}
    for name, points in bad.items():
        if points:
            count = counted(len(points), "value")
            are = "is not a finite number"
            if len(points) > 1:
                are = "are not finite numbers"
            texts.append(f"{escape(name)}: {count} {are}, the first at step {short(points[0].step)}.")
    return "".join(f'<p class="warn">{text}</p>' for text in texts)


def _tiles(run: Run, rates: Rates) -> str:
    steps = max(entry.step for entry in run.entries)
    tiles = [(short(steps), "last step"), (_duration(run.entries[-1].time - run.began), "from first to last entry")]
    tiles += _loss_tiles(run)
    for points, what in ((rates.samples, "samples/s"), (rates.tokens, "tokens/s")):
        median = _median(points)
        if median is not None:
            tiles.append((short(median), f"{what}, median"))
    memory = _last(rates.memory)
    if memory is not None:
        tiles.append((f"{memory:.3g} GiB", "peak memory, rank 0"))
    mfu = _median(rates.mfu)
    tiles.append(("unknown" if mfu is None else f"{mfu:.1f} %", "MFU, median"))
    if run.record.get("parameters"):
        tiles.append((short(run.record["parameters"]), "parameters"))
    if run.record.get("ranks"):
        tiles.append((str(run.record["ranks"]), "rank" if run.record["ranks"] == 1 else "ranks"))
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in tiles
    )
    return f'<div class="tiles">{shown}</div>'


def _loss_tiles(run: Run) -> Iterator[tuple[str, str]]:
    loss = _last(run.series.get("loss") or run.series.get("train_loss") or ())
    if loss is not None:
        yield short(loss), "last loss"
    for name, points in run.series.items():
        if "loss" in name and name.startswith(("eval", "val")):
            finite = [point.value for point in points if math.isfinite(point.value)]
            if finite:
                yield short(min(finite)), f"least {name}"


def _last(points: Sequence[Point]) -> float | None:
    return points[-1].value if points else None


def _median(points: Sequence[Point]) -> float | None:
    values = sorted(point.value for point in points)
    if values:
        return values[len(values) // 2]
    return None


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.3g} s"


def _charts(run: Run, rates: Rates) -> str:
    charts = [chart for chart in _all_charts(run, rates) if any(chart.lines.values())]
    left_out = len(charts) - _MOST_CHARTS
    more = f'<p class="note">{left_out} more series are in the log.</p>' if left_out > 0 else ""
    cards = "".join(_card(chart) for chart in charts[:_MOST_CHARTS])
    return (
        '<h2>Course</h2><input type="radio" name="axis" id="axis-step" checked>'
        '<input type="radio" name="axis" id="axis-time"><div class="switch"><label for="axis-step">steps</label>'
        f'<label for="axis-time">time</label></div><div class="charts">{cards}</div>{more}'
        f'<p class="note below">MFU, the share of the devices\' peak: {escape(rates.about_mfu)}.</p>'
    )


def _all_charts(run: Run, rates: Rates) -> Iterator[Chart]:
    left = {
        name: points
        for name, points in run.series.items()
        if name != "epoch" and not name.endswith(_NOT_SHOWN) and not _is_summary(run, name)
    }

    def take(names: Iterable[str]) -> dict[str, Sequence[Point]]:
        return {name: left.pop(name) for name in list(names) if name in left}

    yield Chart("Loss", take([name for name in left if name.endswith("loss")]), is_noisy=True)
    yield Chart("Learning rate", take(_RATE_NAMES))
    yield Chart("Gradient norm", take(_NORM_NAMES), is_noisy=True)
    yield Chart("Samples per second", {"samples/s": rates.samples}, is_noisy=True, from_zero=True)
    yield Chart("Tokens per second", {"tokens/s": rates.tokens}, is_noisy=True, from_zero=True)
    yield Chart("Peak memory", {"GiB": rates.memory}, unit="GiB", note="GiB, of rank 0", from_zero=True)
    yield Chart("MFU", {"MFU": rates.mfu}, note="percent of the devices' peak", is_noisy=True, from_zero=True)
    while left:
        plain = _plain(next(iter(left)))
        yield Chart(plain, take([name for name in left if _plain(name) == plain]), is_noisy=True)


def _is_summary(run: Run, name: str) -> bool:
    """Whether a series is what a Trainer says once at its end."""
    return name.startswith("train_") and len(run.series[name]) == 1 and "train_runtime" in run.series


def _plain(name: str) -> str:
    """A name without what says which data it is about, so that both curves share a plot."""
    for before in ("eval_", "train_", "test_", "val_", "eval/", "train/", "test/", "val/"):
        if name.startswith(before) and len(name) > len(before):
            return name[len(before) :]
    return name


def _card(chart: Chart) -> str:
    lines = {name: points for name, points in chart.lines.items() if points}
    chart = Chart(chart.title, lines, chart.unit, chart.note, chart.is_noisy, chart.from_zero)
    names = [f'<span><i class="c{at % 6}"></i>{escape(name)}</span>' for at, name in enumerate(lines)]
    legend = ""
    if len(names) > 1:
        legend = f'<div class="legend">{"".join(names)}</div>'
    note = ""
    if chart.note:
        note = f'<p class="note">{escape(chart.note)}</p>'
    both = draw(chart, by_time=False) + draw(chart, by_time=True)
    return f'<div class="card"><div class="head"><h3>{escape(chart.title)}</h3>{legend}</div>{note}{both}</div>'


def _tables(run: Run) -> Iterator[str]:
    record = run.record
    settings = dict(record.get("settings") or {})
    origins = settings.pop("origins", None) or {}
    if settings:
        yield "<h2>Settings of the script</h2>" + _split_table(_settings_rows(settings, origins), bool(origins))
    if record.get("config"):
        rows = [(key, one.get("value"), one.get("origin", "")) for key, one in record["config"].items()]
        yield "<h2>Configuration</h2>" + _split_table(rows, True)
    if record.get("description"):
        yield f"<h2>What was decided</h2><pre>{escape(str(record['description']))}</pre>"
    if record.get("environment"):
        yield "<h2>Environment</h2>" + _table(("what", "value"), _environment_rows(record))
    if len(record.get("starts") or ()) > 1:
        starts = [
            (str(at), _moment(one.get("began")), _moment(one.get("ended")))
            for at, one in enumerate(record["starts"], 1)
        ]
        yield "<h2>Starts</h2>" + _table(("start", "began", "ended"), starts)


def _settings_rows(settings: Mapping[str, Any], origins: Mapping[str, str]) -> list[tuple[str, Any, str]]:
    return [(name, value, origins.get(name, "default")) for name, value in flatten(settings).items()]


def _split_table(rows: Sequence[tuple[str, Any, str]], has_origins: bool) -> str:
    """A table of the values that were set, and a folded one of the defaults."""
    if not has_origins:
        return _table(("name", "value"), [row[:2] for row in rows])
    head = ("name", "value", "origin")
    set_rows, defaults = [r for r in rows if r[2] != "default"], [r for r in rows if r[2] == "default"]
    shown = '<p class="soft">Everything has its default.</p>'
    if set_rows:
        shown = _table(head, set_rows)
    if defaults:
        hidden = _table(head[:2], [row[:2] for row in defaults])
        shown += f"<details><summary>{len(defaults)} defaults</summary>{hidden}</details>"
    return shown


def _environment_rows(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    keys = ("paceline", "host", "ranks", "mixed_precision", "peak_flops")
    rows = [(key, record[key]) for key in keys if record.get(key) is not None]
    rows.append(("command", " ".join(map(str, record.get("command") or ()))))
    return rows + [
        (name, value) for name, value in flatten(record["environment"]).items() if value not in ("", [], None)
    ]


def _moment(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return ""
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(_text(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _text(value: Any) -> str:
    if value is None:
        return ""
    return str(value)
