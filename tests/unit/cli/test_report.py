"""`paceline report`: what it draws from the files of a run, and what it says where there is nothing to draw."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from paceline.cli.report import command
from paceline.cli.report.reading import Point, Run, read_run
from paceline.cli.report.series import Rates, rate, smooth, thin
from paceline.errors import TrackingError

RECORD = {"ranks": 2, "parameters": 1e9, "peak_flops": 1e15, "starts": [{"began": 1000.0}, {"began": 1100.0}]}


def write(folder: Path, lines: list[dict[str, Any]], record: dict[str, Any] | None = None, tail: str = "") -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def line(step: int, time: float, **values: Any) -> dict[str, Any]:
    return {"step": step, "time": time, "samples_seen": step * 4, "tokens_seen": step * 1000, **values}


class Tags(HTMLParser):
    """Checks that tags close, and collects them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(folder: Path, *more: str) -> tuple[str, Tags]:
    done = CliRunner().invoke(command, [str(folder), *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    text = (folder / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    # One file: nothing is fetched.
    assert not [found for found in tags.seen if {"src", "href"} & found[1].keys()]
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    return text, tags


def test_a_page_shows_curves_settings_and_environment(tmp_path: Path) -> None:
    lines = [
        line(at, 1000.0 + at, loss=5 / at, learning_rate=0.1, eval_loss=6 / at, accuracy=0.5) for at in range(1, 9)
    ]
    record = RECORD | {
        "run_name": "a <b>",
        "settings": {"lr": 0.1, "seed": 1, "origins": {"lr": "--lr"}},
        "config": {"debug": {"value": False, "origin": "default"}, "use_cpu": {"value": True, "origin": "x.yaml:3"}},
        "environment": {"versions": {"torch": "2.13"}},
    }
    text, tags = page_of(write(tmp_path, lines, record))
    charts = [found["aria-label"] for tag, found in tags.seen if tag == "svg"]
    assert charts[::2] == ["Loss", "Learning rate", "Samples per second", "Tokens per second", "MFU", "accuracy"]
    assert "a &lt;b&gt;" in text
    for said in ("--lr", "x.yaml:3", "versions/torch", "tokens/s, median", "still running"):
        assert said in text
    # 1000 tokens/s x 6 x 10^9 operations on 2 devices of 10^15
    assert "<b>0.3 %</b>" in text


def test_one_entry_and_values_that_are_no_numbers(tmp_path: Path) -> None:
    page_of(write(tmp_path, [line(1, 1.0, loss=1.0)]))
    text, _ = page_of(write(tmp_path, [line(1, 1.0, loss="NaN")], tail='{"step": 2, "lo'))
    assert "loss: 1 value is not a finite number, the first at step 1" in text
    assert "1 line of the log could not be read" in text
    assert "MFU, median" in text
    assert "unknown: " in text
    text, tags = page_of(write(tmp_path, [line(at, at, loss="NaN" if at in (3, 4) else 1.0) for at in range(1, 9)]))
    assert text.count('class="bad"') == 4
    assert [found for tag, found in tags.seen if tag == "path" and (found["d"] or "").count("M") == 2]


def test_many_entries_make_a_small_page(tmp_path: Path) -> None:
    write(tmp_path, [line(at, at * 0.1, loss=900.0 if at == 7777 else 1 + at % 7) for at in range(1, 20001)])
    text, _ = page_of(tmp_path)
    assert len(text) < 400_000
    assert "900.0" in text, "the spike is there"


def test_an_empty_folder_is_an_error_that_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"holds no metrics\.jsonl"):
        read_run(tmp_path)
    with pytest.raises(TrackingError, match="is not a folder"):
        read_run(tmp_path / "nothing")
    (tmp_path / "a" / "b").mkdir(parents=True)
    write(tmp_path / "a" / "b", [line(1, 1.0)])
    with pytest.raises(TrackingError, match=r"Name one of .*a/b"):
        read_run(tmp_path)
    write(tmp_path, [])
    with pytest.raises(TrackingError, match="holds no log entry"):
        read_run(tmp_path)


def test_what_a_resumed_run_repeats_is_there_once(tmp_path: Path) -> None:
    lines = [line(at, 1000.0 + at, loss=at) for at in range(1, 7)]
    lines += [line(at, 1100.0 + at, loss=at * 10) for at in range(4, 8)]
    run = read_run(write(tmp_path, lines, RECORD))
    assert [(p.step, p.value) for p in run.series["loss"]] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
        (5, 50),
        (6, 60),
        (7, 70),
    ]
    # What lay between the two starts is no training.
    assert [p.value for p in rate(run, "samples_seen")] == pytest.approx([4.0] * 6)


def trained(step: int, time: float, **values: Any) -> dict[str, Any]:
    return line(step, time, optimizer_steps=step, peak_memory_bytes=2**30 * (1 + step), **values)


def steps_of(points: list[Point]) -> list[float]:
    return [point.step for point in points]


def test_every_series_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    """The first start went on to step 6 and evaluated there; the second goes on from step 2, and is at step 5."""
    lines = [trained(at, 1000.0 + at, loss=at, grad_norm=1.0) for at in range(1, 7)]
    lines.insert(3, trained(3, 1003.1, eval_loss=3.0, eval_runtime=0.1))
    lines += [trained(6, 1006.1, eval_loss=6.0, eval_runtime=0.1)]
    lines += [trained(at, 1100.0 + at, loss=at * 10, grad_norm=1.0) for at in range(3, 6)]
    run = read_run(write(tmp_path, lines, RECORD))
    rates = Rates.of(run, peak=6e12)
    assert steps_of(run.series["loss"]) == steps_of(rates.memory) == [1, 2, 3, 4, 5]
    assert steps_of(rates.samples) == steps_of(rates.tokens) == steps_of(rates.mfu) == [2, 3, 4, 5]
    assert steps_of(run.series["eval_loss"]) == [3], "what the first start measured later is of another course"
    assert [p.value for p in run.series["loss"]] == [1, 2, 30, 40, 50]


def test_a_second_training_in_one_start_takes_the_place_of_the_first(tmp_path: Path) -> None:
    lines = [trained(at, 1000.0 + at, loss=1.0) for at in range(1, 7)]
    lines += [trained(at, 1010.0 + at, loss=2.0) for at in range(1, 4)]
    run = read_run(write(tmp_path, lines, {**RECORD, "starts": [{"began": 1000.0}]}))
    rates = Rates.of(run)
    assert [(p.step, p.value) for p in run.series["loss"]] == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert (steps_of(rates.memory), steps_of(rates.samples)) == ([1, 2, 3], [2, 3])
    assert all(point.value > 0 for point in rates.samples)


def test_a_start_that_only_evaluates_changes_no_curve(tmp_path: Path) -> None:
    lines = [trained(at, 1000.0 + at, loss=1.0, eval_loss=float(at)) for at in range(1, 7)]
    only = [trained(0, 1101.0, eval_loss=0.5)]
    run = read_run(write(tmp_path, lines + only, RECORD))
    assert steps_of(run.series["eval_loss"]) == steps_of(Rates.of(run).memory) == [1, 2, 3, 4, 5, 6]
    assert steps_of(read_run(write(tmp_path, only, RECORD)).series["eval_loss"]) == [0]


def test_a_run_that_takes_no_optimizer_step_has_all_its_entries(tmp_path: Path) -> None:
    lines = [{"step": at, "time": 1000.0 + at, "optimizer_steps": 0, "loss": 1 / at} for at in (1, 2, 3)]
    assert [point.step for point in read_run(write(tmp_path, lines, RECORD)).series["loss"]] == [1, 2, 3]


def test_rates_leave_evaluations_out(tmp_path: Path) -> None:
    lines = [line(1, 1.0, loss=1), line(2, 2.0, loss=1), {"step": 2, "time": 12.0, "eval_runtime": 10.0}, line(3, 13.0)]
    run = read_run(write(tmp_path, lines, RECORD))
    assert [p.value for p in rate(run, "samples_seen")] == pytest.approx([4.0, 4.0])
    assert [p.value for p in Rates.of(run, peak=6e12).mfu] == pytest.approx([50.0, 50.0])
    assert Rates.of(Run(tmp_path, run.entries, {})).about_mfu.startswith("unknown: the number of parameters")


def test_attention_counts_where_its_width_was_recorded(tmp_path: Path) -> None:
    lines = [line(1, 1.0, loss=1), line(2, 2.0, loss=1), line(3, 3.0, loss=1)]
    run = read_run(write(tmp_path, lines, RECORD))
    facts = run.entries[0].facts
    length = facts["tokens_seen"] / facts["samples_seen"]
    plain = Rates.of(run, peak=6e12)
    wide = Rates.of(Run(tmp_path, run.entries, {**RECORD, "attention_width": 1e6}), peak=6e12)
    added = 12 * 1e6 * length / (6 * RECORD["parameters"])  # type: ignore[operator]
    assert wide.mfu[0].value == pytest.approx(plain.mfu[0].value * (1 + added))
    assert f"attention over sequences of {length:.0f}" in wide.about_mfu
    assert Rates.of(run, peak=6e12, flops_per_token=1.0).about_mfu.startswith("1 operations a token (as requested)")


def test_thinning_keeps_extremes_and_smoothing_passes_over_gaps() -> None:
    points = [Point(at, at, 50.0 if at == 4321 else math.sin(at)) for at in range(10000)]
    thinned = thin(points)
    assert len(thinned) <= 800
    assert max(point.value for point in thinned) == 50.0
    assert thinned[0] == points[0]
    assert thinned[-1] == points[-1]
    calm = smooth([Point(at, at, math.nan if at == 5 else 2.0) for at in range(10)])
    assert [point.value for point in calm if point.step != 5] == pytest.approx([2.0] * 9)
    assert math.isnan(calm[5].value)
