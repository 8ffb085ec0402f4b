"""Trackers with Accelerate's constructors."""

from __future__ import annotations

import enum
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml

from paceline.compat.accelerate import tracking
from paceline.compat.accelerate.state import PartialState
from paceline.compat.accelerate.tracking import GeneralTracker, TensorBoardTracker, filter_trackers
from paceline.compat.accelerate.utils import LoggerType
from tests.support.ranks import run_on_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    PartialState._reset_state()
    PartialState(cpu=True)
    yield
    PartialState._reset_state()


class Kept(GeneralTracker):
    name = "kept"
    requires_logging_directory = False

    def __init__(self, project: str = "", **settings: Any) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.settings = settings

    @property
    def tracker(self) -> list[Any]:
        return self.calls

    @tracking.on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls.append((values, step))


def test_tensorboard_writes_where_accelerate_does(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker("project", tmp_path, flush_secs=1)
    tracker.start()
    tracker.store_init_configuration({"lr": 0.1, "name": "x", "deep": True})
    tracker.log({"loss": torch.tensor(0.5), "note": "text", "both": {"a": 1, "b": 2}}, step=3)
    tracker.log_images({"image": torch.zeros(2, 3, 4, 4).numpy()}, step=3)
    assert tracker.tracker.log_dir == str(tmp_path / "project")
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "project")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]
    assert events.Tags()["images"]
    (written,) = (tmp_path / "project").glob("*/hparams.yml")
    assert yaml.safe_load(written.read_text()) == {"lr": 0.1, "name": "x", "deep": True}


class Schedule(str, enum.Enum):
    LINEAR = "linear"


def test_settings_of_every_type_are_written(tmp_path: Path) -> None:
    tracker = TensorBoardTracker("project", tmp_path)
    tracker.start()
    values = {
        "lr": np.float64(0.5),
        "steps": np.int64(3),
        "schedule": Schedule.LINEAR,
        "folder": tmp_path,
        "betas": (0.5, torch.tensor(0.25)),
        "dtype": torch.float32,
        "none": None,
        "deep": {"kind": Schedule.LINEAR, "weights": np.ones(2)},
    }
    tracker.store_init_configuration(values)
    tracker.finish()
    (written,) = (tmp_path / "project").glob("*/hparams.yml")
    assert yaml.safe_load(written.read_text()) == {
        "lr": 0.5,
        "steps": 3,
        "schedule": "linear",
        "folder": str(tmp_path),
        "betas": [0.5, 0.25],
        "dtype": "torch.float32",
        "none": None,
        "deep": {"kind": "linear", "weights": [1.0, 1.0]},
    }


def test_all_constructors_need_no_package() -> None:
    with_folder = [name for name, kind in tracking.LOGGER_TYPE_TO_CLASS.items() if kind.requires_logging_directory]
    assert sorted(with_folder) == ["aim", "tensorboard"]
    for name, kind in tracking.LOGGER_TYPE_TO_CLASS.items():
        arguments = ["project", "folder"] if name in with_folder else ["project"]
        assert kind(*arguments).name == name  # type: ignore[arg-type]


def test_mlflow_reads_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    monkeypatch.setenv("MLFLOW_TAGS", json.dumps({"a": 1}))
    monkeypatch.setenv("MLFLOW_NESTED_RUN", "true")
    tracker = tracking.MLflowTracker("experiment", run_id="7")
    assert (tracker.experiment_name, tracker.tags, tracker.nested_run, tracker.run_id) == ("other", {"a": 1}, True, "7")


def test_requested_trackers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = Kept()
    assert filter_trackers(None) == []
    assert filter_trackers(["tensorboard", "tensorboard", own], tmp_path) == [LoggerType.TENSORBOARD, own]
    assert LoggerType.TENSORBOARD in filter_trackers([own, "all"], tmp_path)
    assert filter_trackers("clearml") == []
    assert "clearml" in caplog.text
    with pytest.raises(ValueError, match="nothing"):
        filter_trackers("nothing")
    with pytest.raises(ValueError, match="requires a `logging_dir`"):
        filter_trackers("tensorboard")


def test_a_tracker_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", dict(tracking.LOGGER_TYPE_TO_CLASS))
    with pytest.raises(ValueError, match="kept"):
        filter_trackers("kept")
    tracking.register_tracker_class(Kept)
    assert filter_trackers("kept") == ["kept"]
    with pytest.warns(UserWarning, match="kept"):
        tracking.register_tracker_class(Kept)
    with pytest.raises(ValueError, match="GeneralTracker"):
        tracking.register_tracker_class(dict)  # type: ignore[arg-type]


def test_an_incomplete_tracker_names_what_it_lacks() -> None:
    class Nothing(GeneralTracker):
        name = "nothing"

    with pytest.raises(NotImplementedError, match="requires_logging_directory and no tracker"):
        Nothing()
    assert GeneralTracker(_blank=True).main_process_only


def _logged() -> list[Any]:
    PartialState._reset_state()
    PartialState(cpu=True)
    limited, free = Kept(), Kept()
    free.main_process_only = False
    for tracker in (limited, free):
        tracker.log({"a": 1}, step=2)
    PartialState._reset_state()
    return [limited.calls, free.calls]


def test_only_the_main_process_tracks_unless_the_tracker_says_otherwise() -> None:
    call = [({"a": 1}, 2)]
    assert run_on_ranks(2, _logged) == [[call, call], [[], call]]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_mlflow_leaves_out_settings_that_are_too_long_and_shows_its_run(program: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"file://{program / 'runs'}")
    tracker = tracking.MLflowTracker("experiment")
    tracker.start()
    settings = {"lr": 0.1, "long": "x" * (mlflow.utils.validation.MAX_PARAM_VAL_LENGTH + 1)}
    tracker.store_init_configuration(settings)
    tracker.log({"loss": 0.5, "note": "text"}, step=3, synchronous=True)
    identity = tracker.active_run.info.run_id
    tracker.finish()
    data = mlflow.get_run(identity).data
    assert (data.params, data.metrics) == ({"lr": "0.1"}, {"loss": 0.5})
    assert set(settings) == {"lr", "long"}


def test_dvclive_records_texts_too_and_shows_its_run(program: Path) -> None:
    pytest.importorskip("dvclive")
    tracker = tracking.DVCLiveTracker(dir=str(program / "live"), save_dvc_exp=False, dvcyaml=None)
    tracker.start()
    tracker.log({"loss": torch.tensor(0.5), "note": "text", "list": [1]}, step=3)
    live: Any = tracker.live
    tracker.finish()
    latest = json.loads((program / "live" / "metrics.json").read_text())
    assert latest == {"loss": 0.5, "note": "text", "step": 3}
    assert live is tracker.tracker


def test_clearml_records_single_images_and_tables_that_name_their_columns(program: Path) -> None:
    clearml = pytest.importorskip("clearml")
    from clearml.config import get_offline_dir

    clearml.Task.set_offline(True)
    tracker = tracking.ClearMLTracker("project")
    tracker.start()
    tracker.store_init_configuration({"lr": 0.1})
    tracker.log_images({"train_image": torch.eye(8).mul(255).byte().numpy()}, step=1)
    tracker.log_table("table", data=[["a", "b"], [1, 2]])
    folder = type(program)(get_offline_dir(task_id=tracker.tracker.id))
    tracker.finish()
    assert len(list((folder / "data").rglob("*.jpeg"))) == 1
    (table,) = [
        json.loads(each["plot_str"])
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        for each in json.loads(line)
        if "plot_str" in each
    ]
    assert table["data"][0]["header"]["values"] == ["a", "b"]
    assert "General" in json.loads((folder / "task.json").read_text())["configuration"]
