from __future__ import annotations

import importlib.metadata
import json
from typing import TYPE_CHECKING

import pytest
import torch

import paceline
from paceline.accelerator.environment_report import environment_report

if TYPE_CHECKING:
    from pathlib import Path


def test_report_as_text_and_json(tmp_path: Path) -> None:
    env = {
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path),
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "SECRET": "x",
    }
    report = environment_report(env)
    text = report.as_text()
    for expected in (
        paceline.__version__,
        torch.__version__,
        "numpy ",
        "rank 1 of 2 (local 1 of 2) by torchrun",
    ):
        assert expected in text
    data = json.loads(json.dumps(report.as_dict()))
    assert data["versions"]["torch"] == torch.__version__
    assert data["variables"] == {"HF_HOME": str(tmp_path), "LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}
    assert data["config_file"] == ""
    assert "SECRET" not in text


def test_what_a_bug_report_must_not_hold(tmp_path: Path) -> None:
    env = {
        "HOME": str(tmp_path),
        "SLURM_JWT": "abc123",
        "PACELINE_API_KEY": "abc123",
        "RAY_ADDRESS": "https://me:abc123@ray.example:6379",
        "NCCL_DEBUG": "INFO",
    }
    report = environment_report(env)
    text = report.as_text()
    assert "abc123" not in text + json.dumps(report.as_dict())
    assert report.variables["SLURM_JWT"] == "(set, not shown)"
    assert report.variables["RAY_ADDRESS"] == "https://…@ray.example:6379"
    assert report.variables["NCCL_DEBUG"] == "INFO"
    assert "gloo" in report.backends
    assert "disk here" in report.limits


def test_contradictions_are_shown_not_raised(tmp_path: Path) -> None:
    report = environment_report({"HOME": str(tmp_path), "HF_HOME": str(tmp_path), "RANK": "1"})
    assert "WORLD_SIZE and LOCAL_RANK are not" in report.as_text()


def test_the_working_directory_may_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    report = environment_report({"HOME": str(tmp_path)}, ask_programs=False)
    assert "GiB free" in report.limits["disk here"]


def test_problems_of_the_configuration_are_shown(tmp_path: Path) -> None:
    folder = tmp_path / "accelerate"
    folder.mkdir()
    file = folder / "default_config.yaml"
    file.write_text("mixed_precision: bf61\nno_such_key: 1\n")
    report = environment_report({"HOME": str(tmp_path), "HF_HOME": str(tmp_path)})
    assert report.config_file == str(file)
    assert len(report.config_problems) == 2
    assert "no_such_key" in report.as_text()


def test_a_package_without_metadata_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    report = environment_report({})
    assert report.versions["paceline"] == "not installed: runs from its source"
    assert not report.packages
