"""Big models: the same device maps, files, devices and outputs on Accelerate and through the switch."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.compat.accelerate.utils import get_max_memory
from tests.compat.compare import TOLERANCE, numbers, verdict
from tests.compat.placement_runs import CRASH, RUNS

pytestmark = [pytest.mark.compat, pytest.mark.timeout(900)]
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")


SLOW = ("lora on an offloaded model", "saving an offloaded model", "models of other kinds")


def _differences(runs: list[str]) -> dict[str, str]:
    expected = numbers("real", "placement_runs", runs)
    found = numbers("switched", "placement_runs", runs)
    _leave_out_crashes(expected[0].get("device maps"), found[0].get("device maps"))
    verdicts = {run: verdict(expected, found, run) for run in runs}
    return {run: where for run, (size, where) in verdicts.items() if size > TOLERANCE}


def _leave_out_crashes(expected: Any, found: Any) -> None:
    """Where Accelerate has no answer because of a fault of its own, any answer is as good."""
    if isinstance(expected, list) and isinstance(found, list):
        crashes = [index for index, answer in enumerate(expected) if answer[0] == CRASH]
        assert len(crashes) < len(expected) / 4
        for index in crashes:
            assert found[index][0] != CRASH
            found[index] = expected[index]


def test_sizes_in_words_become_numbers_where_the_caller_has_them() -> None:
    """transformers compares the dict that it got from `from_pretrained(max_memory=)` with the answer."""
    given: dict[int | str, float | str] = {"cpu": "60KB"}
    assert get_max_memory(given) == given == {"cpu": 60_000}


@pytest.mark.slow
def test_maps_files_and_outputs_are_accelerates() -> None:
    assert _differences([run for run in RUNS if run not in SLOW]) == {}


@pytest.mark.slow
def test_saving_and_adapters_are_accelerates() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    assert _differences(list(SLOW)) == {}
