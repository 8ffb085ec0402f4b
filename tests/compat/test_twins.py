"""Functions, states and plugins give what Accelerate gives for the same calls, on one rank and on two."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.compat.twin_cases import RECORDED, TWIN, outcomes
from tests.support.ranks import run_on_ranks

# Where the twin differs, and why. Accelerate's own answer is in the record.
DIFFERENT = {
    "gather[int16]": "gloo has no int16: numbers are sent as bytes",
    "broadcast[int16]": "gloo has no int16: numbers are sent as bytes",
    "reduce_default[int16]": "the mean of integers is float32",
    "reduce_default[bool]": "the mean of bool is float32",
    "reduce_integers[2]": "'none' exchanges nothing, as it is documented; Accelerate sums",
    "gather_object[4]": "a dict is one object; Accelerate returns its keys",
    "gather_object[5]": "a text is one object; Accelerate returns its letters",
    "synchronize_unknown[0]": "a device that is not there is a ValueError, no assertion",
    "split_between_processes[5]": "an empty list can be padded: there is nothing to repeat",
    "split_between_processes[10]": "the error about columns of different lengths is a CollectiveError",
    "split_between_processes[11]": "the error about columns of different lengths is a CollectiveError",
    "state_values": "the device of a rank on the CPU is cpu, not cpu:0",
}
# What those are that differ on one rank too.
DIFFERENT_ALONE = {"synchronize_unknown[0]"}


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[str, Any]]:
    return run_on_ranks(2, outcomes, TWIN)


@pytest.mark.parametrize("size", [1, 2])
def test_results_are_accelerates(size: int, on_two_ranks: list[dict[str, Any]]) -> None:
    record: dict[str, list[Any]] = json.loads((RECORDED / f"twin_{size}.json").read_text(encoding="utf-8"))
    answers = [outcomes(TWIN)] if size == 1 else on_two_ranks
    by_case = {name: json.loads(json.dumps([answer[name] for answer in answers])) for name in answers[0]}
    assert list(by_case) == list(record)
    different = {name for name in record if by_case[name] != record[name]}
    expected = DIFFERENT_ALONE if size == 1 else set(DIFFERENT)
    assert {name: (record[name], by_case[name]) for name in different - expected} == {}
    assert different == expected


def test_differences_are_what_they_are_said_to_be(on_two_ranks: list[dict[str, Any]]) -> None:
    first, second = on_two_ranks
    assert second["gather[int16]"]["values"] == [0, 1, 2, 10, 11, 12]
    assert first["broadcast[int16]"]["values"] == [10, 11, 12]
    assert first["reduce_default[int16]"]["values"] == [5.0, 6.0, 7.0]
    assert first["reduce_integers[2]"]["values"] == [0, 1, 2]
    assert first["gather_object[4]"] == [{"k": 1, "l": 2}] * 2
    assert first["split_between_processes[5]"] == []
