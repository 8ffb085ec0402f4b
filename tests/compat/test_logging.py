"""`get_logger` under Accelerate's module names."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from paceline.compat.accelerate.logging import get_logger
from paceline.compat.accelerate.state import PartialState
from tests.support.ranks import run_on_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    root = logging.getLogger().level
    PartialState._reset_state()
    PartialState(cpu=True)
    yield
    PartialState._reset_state()
    logging.getLogger().setLevel(root)


def test_a_message_names_the_rank_and_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger("twin.plain")
    with caplog.at_level("INFO", logger="twin.plain"):
        logger.info("loaded %d samples", 3)
        logger.warning("ready", main_process_only=False)
        logger.log(logging.INFO, "in turn", in_order=True)
        logger.debug("not shown")
    assert [record.getMessage() for record in caplog.records] == [
        "[RANK 0] loaded 3 samples",
        "[RANK 0] ready",
        "[RANK 0] in turn",
    ]
    assert {record.filename for record in caplog.records} == {"test_logging.py"}


def test_a_warning_appears_once_for_each_text(caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger("twin.once")
    for word in ("a", "b", "a"):
        get_logger("twin.once").warning_once("once %s", word)
        logger.warning_once("once %s", word)
    assert [record.getMessage() for record in caplog.records] == ["[RANK 0] once a", "[RANK 0] once b"]
    assert caplog.records[0].filename == "test_logging.py"


def test_without_a_state_there_is_no_rank() -> None:
    PartialState._reset_state()
    with pytest.raises(RuntimeError, match="PartialState"):
        get_logger("twin.early").info("too early")


def test_the_level_is_that_of_all_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_logger("twin.level", log_level="debug").isEnabledFor(logging.DEBUG)
    assert logging.getLogger().level == logging.DEBUG
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "error")
    assert get_logger("twin.variable").logger.level == logging.ERROR


def _messages() -> list[str]:
    PartialState._reset_state()
    PartialState(cpu=True)
    seen: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    logger = get_logger("twin.ranks")
    logger.logger.addHandler(Keep())
    # One rank suppresses the messages, and still takes part.
    logger.logger.setLevel("INFO" if PartialState().is_main_process else "ERROR")
    logger.info("main")
    logger.info("all", main_process_only=False)
    logger.error("each", main_process_only=False)
    logger.info("in turn", in_order=True)
    PartialState._reset_state()
    return seen


def test_ranks_log_what_they_are_told() -> None:
    first, second = run_on_ranks(2, _messages)
    assert first == ["[RANK 0] main", "[RANK 0] all", "[RANK 0] each", "[RANK 0] in turn"]
    assert second == ["[RANK 1] each"]
