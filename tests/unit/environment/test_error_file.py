"""What a rank leaves for its launcher, read back as the launcher reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.environment.error_file import ErrorFile
from paceline.launch.failures import read_failure_record

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_an_account_and_a_remark_are_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rank_0.json"
    error_file = ErrorFile.read({"TORCHELASTIC_ERROR_FILE": str(path), "PACELINE_CONFIG": "{}"})
    error_file.add_remark("nobody failed")
    assert read_failure_record(path) is None, "a remark alone is no failure"
    error_file.write("hang", "rank 1 has not come", "rank 1 has not come\n  to it", rank=0, code=76, secondary=False)
    error_file.add_remark("first")
    error_file.add_remark("and last")
    found = read_failure_record(path)
    assert found is not None
    assert (found.kind, found.code, found.headline) == ("hang", 76, "rank 1 has not come")
    assert (found.traceback, found.remark) == ("rank 1 has not come\n  to it", "and last")
    assert capsys.readouterr().err == "", "the launcher prints it"


def test_without_a_launcher_of_ours_it_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for env in ({}, {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}):
        error_file = ErrorFile.read(env)
        error_file.write("hang", "head", "the verdict", rank=1, code=76, secondary=True)
        assert capsys.readouterr().err == "", "another rank prints it"
        error_file.write("hang", "head", "the verdict", rank=0, code=76, secondary=False)
        assert capsys.readouterr().err == "\nthe verdict\n"
