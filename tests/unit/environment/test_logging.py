from __future__ import annotations

import logging
import sys
import uuid
from typing import TYPE_CHECKING

import pytest

from paceline.environment.logging import get_logger
from paceline.errors import UsageError
from tests.support.ranks import run_on_ranks

if TYPE_CHECKING:
    from pathlib import Path

RANK_1 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


@pytest.fixture
def name() -> str:
    return f"test.{uuid.uuid4().hex}"


def test_only_the_main_process_writes(name: str, caplog: pytest.LogCaptureFixture) -> None:
    get_logger(name, env=RANK_1).warning("once")
    assert caplog.messages == []
    get_logger(name, env={}).warning("once, %s", "with an argument")
    assert caplog.messages == ["once, with an argument"]


def test_every_rank_writes_with_its_rank(name: str, caplog: pytest.LogCaptureFixture) -> None:
    get_logger(name, env=RANK_1).error("from %d%%", 5, main_process_only=False)
    assert caplog.messages == ["[rank 1] from 5%"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="logging counts its own frames there")
def test_the_place_in_the_record_is_the_callers(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger(name, env={})
    logger.warning("a")
    logger.warning_once("b")
    logger.log(logging.ERROR, "c")
    assert {record.funcName for record in caplog.records} == {"test_the_place_in_the_record_is_the_callers"}, [
        r.funcName for r in caplog.records
    ]


def test_warning_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger(name, env={})
    for number in (1, 1, 2):
        logger.warning_once("about %d", number)
    assert caplog.messages == ["about 1", "about 2"]


def test_the_level_is_this_loggers_alone(name: str) -> None:
    before = logging.getLogger().level, list(logging.getLogger().handlers)
    assert get_logger(name, "DEBUG", env={}).isEnabledFor(logging.DEBUG)
    assert get_logger(f"{name}.b", env={"PACELINE_LOG_LEVEL": "info"}).logger.level == logging.INFO
    assert get_logger(f"{name}.c", "ERROR", env={"PACELINE_LOG_LEVEL": "info"}).logger.level == logging.ERROR
    assert get_logger(f"{name}.d", env={}).logger.level == logging.NOTSET
    assert (logging.getLogger().level, list(logging.getLogger().handlers)) == before


def test_the_variable_sets_the_level_of_the_whole_package(monkeypatch: pytest.MonkeyPatch) -> None:
    package = logging.getLogger("paceline")
    monkeypatch.setattr(package, "handlers", [])
    package.setLevel(logging.NOTSET)
    try:
        get_logger("paceline.some_module", env={"PACELINE_LOG_LEVEL": "error"})
        assert package.level == logging.getLogger("paceline.plain_logger").getEffectiveLevel() == logging.ERROR
        package.setLevel(logging.INFO)  # what a program sets stays
        get_logger("paceline.other_module", env={"PACELINE_LOG_LEVEL": "error"})
        assert package.level == logging.INFO
    finally:
        package.setLevel(logging.NOTSET)


def test_an_unknown_level(name: str) -> None:
    with pytest.raises(UsageError, match=r"level is 'LOUD' in PACELINE_LOG_LEVEL.*DEBUG, INFO"):
        get_logger(name, env={"PACELINE_LOG_LEVEL": "LOUD"})


def test_an_asked_level_shows_without_any_set_up(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    logger = get_logger(name, "INFO", env={})
    logger.info("seen")
    root.addHandler(logging.NullHandler())
    logger.info("now the program's own handlers decide")
    assert capsys.readouterr().err == "seen\n"


def test_contradicting_variables_do_not_stop_a_message(name: str, caplog: pytest.LogCaptureFixture) -> None:
    get_logger(name, env={"RANK": "1"}).warning("said")
    assert caplog.messages == ["said"]


def _write_in_order(file: str) -> None:
    import os
    import time

    logger = get_logger("test.in_order", env=os.environ)
    handler = logging.FileHandler(file)
    logger.logger.addHandler(handler)
    logger.logger.propagate = False
    if os.environ["RANK"] == "0":
        time.sleep(0.3)
    logger.warning("here", main_process_only=False, in_order=True)
    logger.warning("again", main_process_only=False, in_order=True)
    logger.logger.removeHandler(handler)
    handler.close()


def test_ranks_write_in_order(tmp_path: Path) -> None:
    file = tmp_path / "log"
    run_on_ranks(2, _write_in_order, str(file))
    assert file.read_text().splitlines() == [
        "[rank 0] here",
        "[rank 1] here",
        "[rank 0] again",
        "[rank 1] again",
    ]


def test_warning_once_takes_what_logging_takes(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger(name, env={})
    for step in (1, 1, 2):
        logger.warning_once("at step %(step)d", {"step": step})
    assert caplog.messages == ["at step 1", "at step 2"]
