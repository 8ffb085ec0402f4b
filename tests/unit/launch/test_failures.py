from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from paceline.launch import failures
from paceline.launch.failures import (
    FailureRecord,
    RankExit,
    exit_code,
    first_failure,
    read_failure_record,
    read_fatal_location,
    report,
)


def record(headline: str, time: float, *, secondary: bool = False, kind: str = "exception") -> FailureRecord:
    return FailureRecord(
        kind, 1, headline, f"Traceback (most recent call last):\n{headline}\n", "train.py:8", time, secondary
    )


def test_what_caused_the_others_comes_first_then_the_earliest() -> None:
    lost = RankExit(0, 10, 1, 1.0, record=record("RuntimeError: Connection closed by peer", 1.0, secondary=True))
    late = RankExit(1, 11, 1, 3.0, record=record("ValueError: b", 3.0))
    early = RankExit(2, 12, 1, 9.0, record=record("ValueError: a", 2.0))
    stopped = RankExit(3, 13, -15, 0.0, stopped=True)
    assert first_failure([lost, late, early, stopped]) is early
    assert first_failure([lost, stopped]) is lost


def test_report_folds_the_others_into_one_line_and_ends_with_the_cause() -> None:
    ends = [
        RankExit(0, 10, -15, 0.0, stopped=True),
        RankExit(1, 11, 1, 2.0, record=record("KeyError: 'x'", 2.0)),
        *(RankExit(rank, 10 + rank, -15, 0.0, stopped=True) for rank in (2, 3, 4)),
        RankExit(
            5,
            15,
            1,
            3.0,
            record=record("RuntimeError: [/a/b.cc:5] Connection reset by peer [::1]:5. This may", 3.0, secondary=True),
        ),
        RankExit(6, 16, 0, 1.0),
    ]
    first, second, *rest = report(ends).splitlines()
    assert first.startswith(
        "ranks 0, 2-4: stopped by the launcher; "
        "rank 5: lost the connection to rank 1 (RuntimeError: Connection reset by peer [::1]:5); "
    )
    assert "rank 6: had finished" in first
    assert len(first) < 300
    assert second.startswith("rank 1 on ")
    assert second.endswith("(pid 11) raised KeyError at train.py:8")
    assert rest == ["", "Traceback (most recent call last):", "KeyError: 'x'"]


def test_the_summary_of_a_rank_ends_with_a_sentence() -> None:
    def summary(headline: str) -> str:
        lost = RankExit(1, 11, 1, 3.0, record=record(headline, 3.0, secondary=True))
        return report([RankExit(0, 10, 1, 2.0, record=record("KeyError: 'x'", 2.0)), lost]).splitlines()[0]

    first = "a.CollectiveError: Rank 1 of 2 failed in barrier: " + "Connection closed by peer, " * 4 + "so it ended"
    assert len(first) > 120
    assert summary(f"{first}. Another rank has exited.") == f"rank 1: lost the connection to rank 0 ({first})"
    assert summary("RuntimeError: " + "word " * 100) == "rank 1: lost the connection to rank 0 (RuntimeError)"


def test_where_no_rank_failed_by_itself_none_is_blamed() -> None:
    lost = [RankExit(rank, 10, 1, 1.0, record=record("RuntimeError: gone", 1.0, secondary=True)) for rank in (0, 1)]
    ends = [*lost, RankExit(2, 12, 0, 0.5)]
    assert (
        report(ends).splitlines()[0]
        == "rank 1: lost the connection to another rank (RuntimeError: gone); rank 2: had finished"
    )


def test_reasons_and_codes() -> None:
    killed = RankExit(1, 11, -9, 2.0, hint="out of host memory?", log="logs/rank_1.err")
    assert "was killed by SIGKILL (out of host memory?); its output is in logs/rank_1.err" in report([killed])
    assert exit_code(killed) == 137
    assert "was killed by SIGSEGV" in report([RankExit(0, 1, -11, 0.0)])
    left = RankExit(0, 1, 3, 0.0, record=record("SystemExit: 3", 0.0, kind="exit"))
    assert "train.py:8 (sys.exit)" in report([left])
    assert "Traceback" not in report([left])
    assert exit_code(left) == 3
    worded = RankExit(0, 1, 1, 0.0, record=record("SystemExit: no data in /data", 0.0, kind="exit"))
    assert "exited with code 1 at train.py:8 (sys.exit: no data in /data)" in report([worded])
    assert "exited with code 4 without a Python error" in report([RankExit(0, 1, 4, 0.0)])
    caught_while_failing = RankExit(0, 1, -15, 0.0, record=record("KeyError: 1", 0.0))
    assert exit_code(caught_while_failing) == 1


def test_accounts_of_torch_elastic_are_read_too(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    assert read_failure_record(file) is None
    file.write_text("{")
    assert read_failure_record(file) is None
    extra = {"py_callstack": "Traceback…\nValueError: v", "timestamp": "12"}
    file.write_text(json.dumps({"message": {"message": "ValueError: v", "extraInfo": extra}}))
    found = read_failure_record(file)
    assert found is not None
    assert (found.headline, found.time, found.secondary) == ("ValueError: v", 12.0, False)


def test_what_a_rank_found_out_comes_last() -> None:
    lost = replace(record("CollectiveError: lost", 1.0, secondary=True), remark="rank 1 has ended without entering it")
    text = report([RankExit(0, 10, 1, 1.0, record=lost), RankExit(1, 11, 0, 0.5)])
    assert text.splitlines()[0] == "rank 1: had finished"
    assert text.endswith("\n\nrank 1 has ended without entering it\n")
    aborted = RankExit(1, 11, -6, 2.0, where="train.py:8")
    text = report([RankExit(0, 10, 1, 1.0, record=lost), aborted])
    assert "rank 1 on " in text
    assert "was killed by SIGABRT at train.py:8\n\nrank 1 has ended without entering it\n" in text
    killed = RankExit(1, 11, -9, 2.0)
    assert "has ended without" not in report([RankExit(0, 10, 1, 1.0, record=lost), killed]), "it died: that says all"


def test_a_hang_is_told_once_with_all_that_was_found() -> None:
    told = record("rank 1 has not entered gather", 2.0, kind="hang")
    told = replace(told, code=76, traceback="rank 1 has not entered gather\n  rank 1: train.py:8")
    ends = [
        RankExit(0, 10, 76, 2.0, record=told),
        RankExit(1, 11, 76, 1.0, record=replace(told, secondary=True, time=1.0)),
    ]
    first, second, *rest = report(ends).splitlines()
    assert first == "rank 1: stopped too"
    assert second.endswith("found ranks waiting for others that do not arrive, and all were stopped")
    assert rest == ["", "rank 1 has not entered gather", "  rank 1: train.py:8"]
    assert exit_code(ends[0]) == 76


def test_the_line_at_which_a_signal_ended_a_rank(tmp_path: Path) -> None:
    file = tmp_path / "rank_0.json.fault"
    assert read_fatal_location(file) == ""
    library = Path(os.__file__).with_name("threading.py")
    other = f'Thread 0x01 (most recent call first):\n  File "{library}", line 5 in wait\n'
    current = (
        f'  File "{library}", line 7 in read\n  File "/home/me/train.py", line 8 in load\n  File "/x.py", line 9 in m\n'
    )
    file.write_text(
        f"Fatal Python error: Segmentation fault\n\nCurrent thread 0x02 (most recent call first):\n{current}\n{other}"
    )
    assert read_fatal_location(file) == "/home/me/train.py:8"
    file.write_text(f"Fatal Python error: Aborted\n\n{other}\nThread 0x02 (most recent call first):\n{current}")
    assert read_fatal_location(file) == "/home/me/train.py:8", (
        "a thread that Python does not know: the main thread's line"
    )


def test_the_call_in_which_a_signal_ended_a_rank(tmp_path: Path) -> None:
    package = Path(failures.__file__).parents[1]
    file = tmp_path / "rank_0.json.fault"
    file.write_text(
        "Fatal Python error: Aborted\n\nThread 0x02 (most recent call first):\n"
        f'  File "{package / "collectives" / "group.py"}", line 5 in barrier\n'
        f'  File "{package / "accelerator" / "communication.py"}", line 7 in wait_for_everyone\n'
        '  File "/home/me/train.py", line 8 in main\n'
    )
    assert read_fatal_location(file) == "/home/me/train.py:8, in wait_for_everyone"
