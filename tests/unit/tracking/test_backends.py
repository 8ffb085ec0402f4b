"""Each tracker's own package, without its service: what was logged is what it reads back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paceline.tracking.registry import TRACKERS

SCRIPT = Path(__file__).with_name("backend_script.py")


def backends() -> list[Any]:
    """Every tracker with a package, skipped with a reason where that is not installed."""
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                not entry.is_installed,
                reason=f"{entry.package} is not installed: pip install 'paceline[{entry.extra}]'",
            ),
        )
        for name, entry in TRACKERS.items()
        if entry.package
    ]


def run(name: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Log to a tracker in a process of its own: packages leave threads and variables behind."""
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(SCRIPT), name, str(folder), *more]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=800, check=False)


@pytest.mark.parametrize("name", backends())
def test_what_was_logged_is_read_back(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{") and "}" in line))
    if name == "swanlab":  # its file has no reader of its own
        assert found["names"] == ["loss", "learning_rate"]
        return
    assert found["loss"] == [[1, 0.5], [2, 0.25]]
    assert found["config"]
    if name in ("wandb", "mlflow", "aim", "dvclive", "trackio"):
        assert "learning_rate" in found["config"]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.filterwarnings("ignore")  # of the packages that read it back
@pytest.mark.parametrize("name", [one for one in backends() if one.values[0] in ("tensorboard", "mlflow", "wandb")])
def test_a_crash_loses_nothing(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path, "crash")
    assert done.returncode == 1
    assert "RuntimeError: as asked" in done.stderr
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["starts"][-1]["crashed"] is True
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "project" / "first"))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == [1, 2]
    if name == "mlflow":
        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        (experiment,) = client.search_experiments(filter_string="name = 'project'")
        (ended,) = client.search_runs([experiment.experiment_id])
        assert ended.info.status == "FAILED"


NAMES_OF_DVCLIVE = """
import sys
from pathlib import Path
from paceline import Accelerator
accelerator = Accelerator(cpu=True, log_with="dvclive", project_dir=sys.argv[1])
accelerator.init_trackers("p", init_kwargs={"dvclive": {"save_dvc_exp": False}})
for step in (3, 4):
    accelerator.log({"step": 10 * step, "part": {"step": 0.5}, "time": 2.5}, step=step)
accelerator.end_training()
"""


def test_dvclive_keeps_the_step_of_a_value_named_step(tmp_path: Path) -> None:
    pytest.importorskip("dvclive", reason="pip install 'paceline[dvclive]'")
    command = [sys.executable, "-W", "ignore", "-c", NAMES_OF_DVCLIVE, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.stem: path.read_text().split() for path in (tmp_path / "dvclive").rglob("*.tsv")}
    assert found["time"] == ["step", "time", "3", "2.5", "4", "2.5"]
    files = {
        str(path.relative_to(tmp_path / "dvclive")): path.read_text() for path in tmp_path.rglob("logged_step.tsv")
    }
    assert sorted(text.split() for text in files.values()) == [
        ["step", "logged_step", "3", "0.5", "4", "0.5"],
        ["step", "logged_step", "3", "30", "4", "40"],
    ]
