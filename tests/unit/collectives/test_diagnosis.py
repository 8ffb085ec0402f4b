"""From where ranks stand to sentences, without ranks."""

from __future__ import annotations

import json
import sys

import pytest

from paceline.collectives.watchdog.diagnosis import RankStatus, diagnose
from paceline.collectives.watchdog.locations import CodeLocation, all_stacks, here, location_in_traceback
from paceline.collectives.watchdog.recorder import Operation, read_operation


def operation(number: int, name: str = "all_reduce", what: str = "float32 (4,)", *, done: bool = False) -> Operation:
    return Operation(group="gloo/0", number=number, name=name, what=what, done=done)


def standing(rank: int, line: int, *operations: Operation, call: str = "", collective: bool = False) -> RankStatus:
    place = CodeLocation(where=f"train.py:{line}", function="main", code="…", call=call, is_collective=collective)
    return RankStatus(rank=rank, location=place, operations=operations)


def test_the_rank_that_has_not_come_is_named_with_its_line() -> None:
    waiting = [standing(rank, 20, operation(41), call="backward") for rank in (0, 1, 3)]
    asleep = standing(2, 88, operation(40, done=True))
    head, *lines, advice = diagnose([*waiting, asleep], 4, seconds=60).splitlines()
    assert head == (
        "rank 2 has not entered backward (all_reduce #41 of float32 (4,)), in which ranks 0-1, 3 have waited for 60 s"
    )
    assert lines == [
        "  ranks 0-1, 3: train.py:20 in main: …  [all_reduce #41 of float32 (4,)]",
        "  rank 2: train.py:88 in main: …",
    ]
    assert "raise timeout" in advice


def test_a_method_that_only_some_ranks_call() -> None:
    saving = standing(0, 40, operation(6, done=True), call="save_state", collective=True)
    others = [standing(rank, 44, operation(7), call="backward") for rank in (1, 2)]
    text = diagnose([saving, *others], 3, seconds=60)
    assert text.startswith("save_state is not called by every rank: rank 0 is in it, and ranks 1-2 are in backward (")
    assert "Every rank must call save_state" in text


def test_a_method_that_only_some_ranks_call_and_that_exchanges_something_at_once() -> None:
    gathering = standing(0, 40, operation(7, "all_gather"), call="gather", collective=True)
    other = standing(1, 44, operation(7), call="backward")
    head, *_, advice = diagnose([gathering, other], 2, seconds=60).splitlines()
    assert head == (
        "gather is not called by every rank: rank 0 in gather (all_gather #7 of float32 (4,)), rank 1 in backward "
        "(all_reduce #7 of float32 (4,))"
    )
    assert advice.startswith("Every rank must call gather: look for a branch"), "no rank is late: no word of timeout"
    assert "timeout" not in advice


def test_different_calls_and_different_shapes() -> None:
    one = standing(0, 3, operation(5, "all_gather"), call="gather", collective=True)
    other = standing(1, 4, operation(5, "barrier", ""), call="wait_for_everyone", collective=True)
    text = diagnose([one, other], 2, seconds=9)
    assert text.startswith(
        "the ranks are in different calls: rank 0 in gather (all_gather #5 of float32 (4,)), rank 1 in"
    )
    assert "Every rank must call gather and wait_for_everyone: look for a branch" in text
    unlike = [standing(rank, 3, operation(5, what=f"float32 ({rank},)"), call="gather") for rank in (0, 1)]
    assert "with the same shapes and dtypes" in diagnose(unlike, 2, seconds=9)
    past = [standing(rank, 3, operation(4, what=f"float32 ({rank + 4},)", done=True), operation(5)) for rank in (0, 1)]
    text = diagnose(past, 2, seconds=9)
    assert text.startswith(
        "the ranks were in different calls: rank 0 in all_reduce #4 of float32 (4,), rank 1 in all_reduce #4 of "
        "float32 (5,)"
    )
    same = [standing(rank, 3, operation(5)) for rank in (0, 1)]
    assert "all ranks have been in all_reduce #5" in diagnose(same, 2, seconds=9)


def test_ranks_that_ended_or_do_not_answer() -> None:
    waiting = standing(0, 3, operation(5))
    assert diagnose([waiting, RankStatus(rank=1, fate="has ended")], 2, seconds=9).startswith(
        "rank 1 has ended without entering all_reduce #5 of float32 (4,), in which rank 0 has waited for 9 s"
    )
    silent = diagnose([waiting], 2, seconds=9)
    assert silent.startswith("rank 1 does not respond; rank 0 has waited for 9 s in all_reduce #5")
    assert "  rank 1: no response" in silent
    gone = [RankStatus(rank=rank, fate="has ended") for rank in (1, 2)] + [
        RankStatus(rank=3, fate="failed (ValueError)")
    ]
    assert diagnose([waiting, *gone], 4, seconds=9).startswith(
        "ranks 1-2 have ended and rank 3 failed (ValueError) with"
    )
    raised = RankStatus(rank=0, fate="failed (CollectiveError)", operations=(operation(5, done=True),), raised=True)
    assert "in which rank 0 was\n" in diagnose([raised, RankStatus(rank=1, fate="has ended")], 2, seconds=0)
    nothing = RankStatus(rank=0, fate="failed (CollectiveError)", raised=True)
    assert diagnose([nothing, standing(1, 4)], 2, seconds=0).startswith("rank 0 failed (CollectiveError) while others")


def test_a_group_that_not_all_ranks_are_in() -> None:
    part = Operation(group="gloo/7", number=2, name="all_reduce", what="", done=False)
    inside = standing(0, 3, part)
    late = standing(1, 9, Operation(group="gloo/7", number=1, name="all_reduce", what="", done=True))
    outside = standing(2, 50)
    head = diagnose([inside, late, outside], 3, seconds=9).splitlines()[0]
    assert head == "rank 1 has not entered all_reduce #2, in which rank 0 has waited for 9 s"


def test_a_standing_travels_as_json() -> None:
    one = standing(1, 4, operation(5), call="gather", collective=True)
    assert RankStatus.from_data(json.loads(json.dumps(one.to_data()))) == one
    gone = RankStatus(rank=1, fate="has ended")
    assert RankStatus.from_data(json.loads(json.dumps(gone.to_data()))) == gone


def test_where_a_thread_is() -> None:
    place = here()
    assert place is not None
    assert place.where.partition(":")[0] == __file__
    assert place.function == "test_where_a_thread_is"
    assert place.call == "here"
    assert "test_where_a_thread_is" in all_stacks()
    with pytest.raises(json.JSONDecodeError) as failure:
        json.loads("{")
    trace = failure.value.__traceback__
    found = location_in_traceback(trace)
    assert found is not None
    assert (found.function, found.call) == ("test_where_a_thread_is", "loads")
    assert location_in_traceback(None) is None
    assert sys.exc_info() == (None, None, None)


def test_what_the_recorder_notes_isread_operation() -> None:
    entry = {
        "collective_seq_id": 5, "input_dtypes": ["Float", "Byte"], "input_sizes": [[3, 2], [7]], "retired": False,
        "process_group": ["0", "default_pg"], "profiling_name": "nccl:_all_gather_base", "state": "started",
    }  # fmt: skip
    assert read_operation(entry) == Operation(
        group="nccl/0", number=5, name="all_gather_base", what="float32 (3, 2), 7 bytes", done=False
    )
