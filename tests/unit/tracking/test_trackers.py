"""The trackers of a run: what is chosen, what is written, and what happens when something is wrong."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from paceline import Accelerator, ProjectConfiguration
from paceline.cli.report.reading import read_run
from paceline.errors import ConfigError, MissingExtraError, TrackingError
from paceline.tracking import TRACKERS, GeneralTracker
from paceline.tracking.log_values import copy_to_host
from paceline.tracking.registry import TrackerEntry
from tests.support.ranks import run_on_ranks


class Memory(GeneralTracker):
    """A script's own tracker."""

    name = "memory"
    requires_logging_directory = False

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[Any] = []
        self.fails = fails

    @property
    def tracker(self) -> list[Any]:
        return self.calls

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls.append((step, values, kwargs))
        if self.fails:
            raise OSError("no space left")

    def finish(self) -> None:
        self.calls.append("finish")


class Everywhere(Memory):
    """One that every rank talks to."""

    name = "everywhere"
    main_process_only = False


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_values_with_names_of_the_record_are_kept_beside_it(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=str(tmp_path))
    accelerator.init_trackers("p")
    accelerator.log({"loss": 0.5, "time": 2.5, "step": 70, "peak_memory_bytes": {"a": 1}}, step=3)
    accelerator.log({"loss": 0.25, "time": "late", "logged/time": 4.5, "step": "warmup"}, step=4)
    accelerator.log({"loss": 0.125, "step": torch.tensor(9)})
    accelerator.log({"step": float("nan")})
    accelerator.end_training()
    first, second, third, last = lines(tmp_path)
    assert [first["step"], second["step"], third["step"], last["step"]] == [3, 4, 9, None]
    assert 1.6e9 < first["time"] <= second["time"] <= third["time"]
    assert (first["logged/time"], first["logged/step"], first["logged/peak_memory_bytes"]) == (2.5, 70, {"a": 1})
    assert first["peak_memory_bytes"] > 1
    assert (second["logged/logged/time"], second["logged/time"], second["logged/step"]) == ("late", 4.5, "warmup")
    assert "logged/step" not in third
    assert last["logged/step"] == "NaN"
    run = read_run(tmp_path)
    assert [(point.step, point.value) for point in run.series["loss"]] == [(3, 0.5), (4, 0.25), (9, 0.125)]
    assert [(point.step, point.value) for point in run.series["logged/time"]] == [(3, 2.5), (4, 4.5)]


def test_a_tracker_of_the_script_is_told_everything() -> None:
    own = Memory()
    accelerator = Accelerator(cpu=True, log_with=own)
    accelerator.init_trackers("p", config={"lr": 1})
    loss = torch.tensor(0.5)
    accelerator.log(
        {"loss": loss, "half": torch.tensor([1.5], dtype=torch.bfloat16)}, step=3, log_kwargs={"memory": {"x": 1}}
    )
    loss.zero_()  # what was logged does not change
    assert accelerator.get_tracker("memory", unwrap=True) is own.calls
    accelerator.end_training()
    accelerator.end_training()
    assert own.calls == ["start", {"lr": 1}, (3, {"loss": 0.5, "half": 1.5}, {"x": 1}), "finish"]
    accelerator.log({"loss": 1.0})  # after the end nobody listens


def test_every_run_with_a_folder_leaves_a_record(tmp_path: Path) -> None:
    settings = ProjectConfiguration(project_dir=str(tmp_path / "run"), logging_dir=str(tmp_path / "logs"))
    accelerator = Accelerator(cpu=True, project_config=settings)
    model = torch.nn.Linear(2, 3)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    accelerator.init_trackers("p", {"lr": 0.1, "path": Path("/x")}, run_name="n")
    accelerator.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    accelerator.log({"loss": float("nan"), "many": np.arange(2), "nested": {"a": 1}}, step=1)
    accelerator.log({"loss": float("inf")})
    accelerator.end_training()
    first, second = lines(tmp_path / "logs")
    assert first["loss"] == "NaN"
    assert (first["step"], first["many"], first["nested"], first["optimizer_steps"]) == (1, [0, 1], {"a": 1}, 1)
    assert first["peak_memory_bytes"] > 1e6
    assert (second["step"], second["loss"]) == (None, "Infinity")
    record = json.loads((tmp_path / "logs" / "run.json").read_text(encoding="utf-8"))
    assert record["settings"] == {"lr": 0.1, "path": "/x"}
    assert record["config"]["use_cpu"] == {"value": True, "origin": "Accelerator(cpu=…)", "kind": "argument"}
    assert record["parameters"] == 9
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert record["starts"][0]["crashed"] is False
    assert "strategy" in record["description"]


def test_a_second_run_in_the_same_folder_goes_on(tmp_path: Path) -> None:
    for _ in range(2):
        accelerator = Accelerator(cpu=True, log_with="jsonl", project_dir=tmp_path)
        accelerator.init_trackers("p")
        accelerator.log({"loss": 1.0}, step=1)
        accelerator.end_training()
    assert len(lines(tmp_path)) == 2
    assert len(json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["starts"]) == 2


def test_nobody_asked_and_nothing_is_written(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.log({"loss": 1.0})
    accelerator.init_trackers("p")
    accelerator.log({"loss": 1.0})
    assert accelerator.trackers == ()
    with pytest.raises(TrackingError, match="The trackers of this run are none"):
        accelerator.get_tracker("wandb")
    accelerator.end_training()


class NoTracker:
    name = "half"

    def log(self, values: Any) -> None: ...


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("tensorbord", "'tensorbord' is unknown; did you mean tensorboard?"),
        (["jsonl"], "jsonl needs a folder; it writes its files there; pass project_dir"),
        (
            NoTracker(),
            "a NoTracker is not a tracker: it lacks requires_logging_directory, tracker, store_init_configuration",
        ),
        (["aim", "x"], "2 problems"),
    ],
    ids=["a name that is unknown", "a folder that is missing", "an object that is no tracker", "two at once"],
)
def test_what_is_no_tracker_is_an_error(asked: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Accelerator(cpu=True, log_with=asked)
    assert words in str(caught.value)


def test_a_missing_package_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", TrackerEntry("wandb", "wandb_that_is_not_there", "wandb"))
    with pytest.raises(MissingExtraError, match=r"pip install 'paceline\[wandb\]'"):
        Accelerator(cpu=True, log_with="wandb")
    # A folder of that name, which the package itself leaves behind, is no package.
    (tmp_path / "wandb_that_is_not_there").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError):
        Accelerator(cpu=True, log_with="wandb")


def test_all_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in set(TRACKERS) - {"jsonl"}:
        monkeypatch.setitem(TRACKERS, name, TrackerEntry(name, "not_there_at_all", name))
    assert Accelerator(cpu=True, log_with="all", project_dir=tmp_path).log_with == ("jsonl",)
    assert Accelerator(cpu=True, log_with="all").log_with == ()


def test_logging_before_the_trackers_are_open_is_an_error() -> None:
    accelerator = Accelerator(cpu=True, log_with=Memory())
    with pytest.raises(TrackingError, match="init_trackers"):
        accelerator.log({"loss": 1.0})
    with pytest.raises(TrackingError, match="before init_trackers"):
        accelerator.get_tracker("memory")
    with pytest.raises(ConfigError, match="did you mean memory"):
        accelerator.init_trackers("p", init_kwargs={"memori": {}})
    accelerator.init_trackers("p", init_kwargs={"wandb": {"mode": "offline"}})  # known, and not used today
    accelerator.end_training()


def test_what_is_logged_too_late_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator(cpu=True, log_with=Memory())
    accelerator.init_trackers("p")
    accelerator.end_training()
    for step in range(3):
        accelerator.log({"loss": 1.0}, step=step)
    assert caplog.text.count("after the trackers were closed: loss") == 1


def test_settings_of_what_is_no_tracker(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    accelerator.init_trackers("p")
    with pytest.raises(ConfigError, match="did you mean wandb"):
        accelerator.log({"loss": 1.0}, log_kwargs={"wandbb": {"commit": False}})
    accelerator.end_training()


def test_a_tracker_that_fails_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    broken, fine = Memory(fails=True), Everywhere()
    accelerator = Accelerator(cpu=True, log_with=[broken, fine])
    accelerator.init_trackers("p")
    with caplog.at_level(logging.WARNING, logger="paceline"):
        accelerator.log({"loss": 1.0}, step=1)
        accelerator.log({"loss": 2.0}, step=2)
    assert caplog.text.count("The tracker memory failed (OSError: no space left)") == 1
    accelerator.end_training()
    assert [call for call in broken.calls if isinstance(call, tuple)] == [(1, {"loss": 1.0}, {})]
    assert len(fine.calls) == 4


def test_a_tracker_that_failed_is_tried_again_in_the_next_run() -> None:
    """What has failed is known by its id, which a new tracker may get."""
    tracker = Memory(fails=True)
    accelerator = Accelerator(cpu=True, log_with=tracker)
    for fails in (True, False):
        tracker.fails = fails
        accelerator.init_trackers("p")
        accelerator.log({"loss": 1.0}, step=1)
        accelerator.log({"loss": 2.0}, step=2)
        accelerator.end_training()
    assert [call[0] for call in tracker.calls if isinstance(call, tuple)] == [1, 1, 2]


class OnDevice:
    """Stands for a tensor on a GPU, and notes how it is copied."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.copies: list[bool] = []

    def detach(self) -> OnDevice:
        return self

    def to(self, device: str, non_blocking: bool = False) -> torch.Tensor:
        assert device == "cpu"
        self.copies.append(non_blocking)
        return torch.tensor(2.0)


def test_only_copies_that_the_event_covers_are_left_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    event = mock.Mock()
    monkeypatch.setattr(torch, "Event", event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: device)
    first, other, again = OnDevice(1), OnDevice(0), OnDevice(1)
    values, copied = copy_to_host({"first": first, "other": other, "inside": {"again": again}})
    assert (first.copies, other.copies, again.copies) == ([True], [False], [True])
    assert values["other"] == 2.0
    event.assert_called_once_with(device=first.device)
    copied.record.assert_called_once_with(first.device)


def spoken_to(folder: str) -> tuple[list[Any], list[Any], bool, bool]:
    main, every = Memory(), Everywhere()
    accelerator = Accelerator(cpu=True, log_with=[main, every], project_dir=folder)
    accelerator.init_trackers("p")
    accelerator.log({"loss": 1.0}, step=1)
    blank = accelerator.get_tracker("memory", unwrap=True)
    blank.append("direct") if accelerator.is_main_process else blank.some.thing(1)
    accelerator.end_training()
    return main.calls, every.calls, accelerator.is_main_process, bool(blank)


def test_only_the_main_process_speaks_unless_a_tracker_wants_all(tmp_path: Path) -> None:
    (main, every, _, _), (other_main, other_every, _, blank) = run_on_ranks(2, spoken_to, str(tmp_path))
    assert main == ["start", (1, {"loss": 1.0}, {}), "direct", "finish"]
    assert other_main == []
    assert not blank
    assert every == other_every == ["start", (1, {"loss": 1.0}, {}), "finish"]
    assert len(lines(tmp_path)) == 1


CRASHING = """
import atexit
from pathlib import Path
from paceline import Accelerator
from paceline.tracking import GeneralTracker

ends = Path({folder!r}, "ends")

class Package(GeneralTracker):
    '''Ends its run at exit by itself, from when it is imported.'''
    name = "package"
    requires_logging_directory = False
    tracker = None
    def start(self):
        atexit.register(lambda: ends.write_text(ends.read_text() + "package"))
    def store_init_configuration(self, values): pass
    def log(self, values, step=None, **more): pass
    def finish(self):
        ends.write_text("crashed " if self.crashed else "finished ")

accelerator = Accelerator(cpu=True, project_dir={folder!r}, log_with=["jsonl", Package()])
accelerator.init_trackers("p")
accelerator.log({{"loss": 1.0}}, step=1)
raise RuntimeError("as asked")
"""


@pytest.mark.parametrize("launched", [False, True])
def test_a_crash_closes_the_trackers(launched: bool, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CRASHING.format(folder=str(tmp_path)), encoding="utf-8")
    how = ["-m", "paceline", "launch", "--cpu", "--num_processes", "1"] if launched else []
    done = subprocess.run([sys.executable, *how, str(script)], capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 1
    (start,) = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["starts"]
    assert start["crashed"] is True
    assert len(lines(tmp_path)) == 1
    assert (tmp_path / "ends").read_text(encoding="utf-8") == "crashed package", "before a package ends its run itself"


def test_tensorboard_goes_on_after_a_value_that_is_no_curve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("p")
    odd: list[Any] = [
        {"f1": 0.5, "best": "second", "unknown": None, "by_class": {"cat": 0.25}, "counts": torch.tensor([1, 2])},
        torch.empty(0),
        np.array(["a", "b"]),
        np.array([1, None], dtype=object),
        torch.tensor([1j, 2.0]),
    ]
    for step, value in enumerate(odd):
        accelerator.log({"eval": value}, step=step)
    accelerator.log({"loss": 0.75}, step=9)
    accelerator.end_training()
    assert "failed" not in caplog.text
    events = EventAccumulator(str(tmp_path / "p")).Reload()
    assert [event.value for event in events.Scalars("loss")] == [0.75]
    assert [event.value for event in EventAccumulator(str(tmp_path / "p" / "eval_f1")).Reload().Scalars("eval")] == [
        0.5
    ]
    by_class = EventAccumulator(str(tmp_path / "p" / "eval_by_class_cat")).Reload().Scalars("eval/by_class")
    assert [event.value for event in by_class] == [0.25]
    assert events.Tags()["histograms"] == ["eval/counts"]
    assert [tag for tag in events.Tags()["tensors"] if "best" in tag] == ["eval/best/text_summary"]


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.tensor([1 + 2j]).conj().imag, -2.0),
        (torch.tensor([1 + 2j, 0]).conj(), ["(1-2j)", "-0j"]),
        (torch.eye(2).to_sparse(), [[1.0, 0.0], [0.0, 1.0]]),
    ],
)
def test_tensors_that_numpy_cannot_view_are_logged(tensor: torch.Tensor, expected: Any, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    accelerator.init_trackers("p")
    accelerator.log({"value": tensor}, step=1)
    accelerator.end_training()
    assert lines(tmp_path)[0]["value"] == expected
