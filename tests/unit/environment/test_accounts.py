"""What a rank leaves for its launcher, read back as the launcher reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.environment.accounts import Accounts
from paceline.launch.failures import read_account

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_an_account_and_a_remark_are_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rank_0.json"
    accounts = Accounts.read({"TORCHELASTIC_ERROR_FILE": str(path), "PACELINE_CONFIG": "{}"})
    accounts.remark("nobody failed")
    assert read_account(path) is None, "a remark alone is no failure"
    accounts.leave("hang", "rank 1 has not come", "rank 1 has not come\n  to it", rank=0, code=76, secondary=False)
    accounts.remark("first")
    accounts.remark("and last")
    found = read_account(path)
    assert found is not None
    assert (found.kind, found.code, found.headline) == ("hang", 76, "rank 1 has not come")
    assert (found.traceback, found.remark) == ("rank 1 has not come\n  to it", "and last")
    assert capsys.readouterr().err == "", "the launcher prints it"


def test_without_a_launcher_of_ours_it_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for env in ({}, {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}):
        accounts = Accounts.read(env)
        accounts.leave("hang", "head", "the verdict", rank=1, code=76, secondary=True)
        assert capsys.readouterr().err == "", "another rank prints it"
        accounts.leave("hang", "head", "the verdict", rank=0, code=76, secondary=False)
        assert capsys.readouterr().err == "\nthe verdict\n"
