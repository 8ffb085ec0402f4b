from __future__ import annotations

import os
from pathlib import Path

import pytest

from paceline.accelerator.environment_report import environment_report
from paceline.config import TorchDynamoPlugin
from paceline.strategies.compile_cache import cache_folder, describe_cache, open_cache, size_of

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def test_the_setting_comes_before_torchs_variable_and_that_before_the_users_cache(tmp_path: Path) -> None:
    plain, named = TorchDynamoPlugin(), TorchDynamoPlugin(cache_dir=str(tmp_path / "own"))
    assert cache_folder(named, {VARIABLE: "/elsewhere"}) == tmp_path / "own"
    assert cache_folder(plain, {VARIABLE: "/elsewhere"}) == Path("/elsewhere")
    assert cache_folder(plain, {"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "paceline" / "compiled"
    assert cache_folder(plain, {}) == Path.home() / ".cache" / "paceline" / "compiled"


def fill(folder: Path, size: int) -> None:
    (folder / "fxgraph" / "ab").mkdir(parents=True)
    (folder / "fxgraph" / "ab" / "code").write_bytes(b"x" * size)
    (folder / "single").write_bytes(b"y")


def test_a_folder_that_is_too_large_is_emptied_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    folder = tmp_path / "cache"
    settings = TorchDynamoPlugin(cache_dir=str(folder), cache_limit_gb=1e-6)
    fill(folder, 900)
    open_cache(settings, may_empty=True)
    assert os.environ[VARIABLE] == str(folder)
    assert size_of(folder) == 901, "within the limit"
    (folder / "more").write_bytes(b"z" * 200)
    open_cache(settings, may_empty=False)
    assert size_of(folder) == 1101
    open_cache(settings, may_empty=True)
    assert list(folder.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_folder_that_torchs_variable_names_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "theirs", 5000)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "theirs"))
    open_cache(TorchDynamoPlugin(cache_limit_gb=1e-6), may_empty=True)
    assert size_of(tmp_path / "theirs") == 5001


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    (tmp_path / "file").write_text("", encoding="utf-8")
    open_cache(TorchDynamoPlugin(cache_dir=str(tmp_path / "file" / "below")), may_empty=True)
    assert VARIABLE not in os.environ


def test_the_environment_report_says_where_and_how_large(tmp_path: Path) -> None:
    fill(tmp_path / "paceline" / "compiled", 20_000_000)
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    line = describe_cache(TorchDynamoPlugin(), env)
    assert line.startswith(f"{tmp_path}/paceline/compiled (0.02 GB, emptied above 20 GB; to clear it")
    assert line in environment_report(env, ask_programs=False).as_text()
    assert "never emptied" in describe_cache(TorchDynamoPlugin(), {VARIABLE: str(tmp_path)})
    given = {**env, "PACELINE_DYNAMO_CACHE_DIR": str(tmp_path), "PACELINE_DYNAMO_CACHE_LIMIT_GB": "3"}
    assert f"{tmp_path} (0.02 GB, emptied above 3 GB" in environment_report(given, ask_programs=False).compile_cache
