"""Twelve plain scripts give the same numbers on Accelerate and through the switch."""

from __future__ import annotations

import pytest

from tests.compat.compare import TOLERANCE, numbers, verdict
from tests.compat.plain_scripts import RUNS

pytestmark = pytest.mark.compat
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_plain_scripts(ranks: int) -> None:
    expected = numbers("real", "plain_scripts", list(RUNS), ranks)
    found = numbers("switched", "plain_scripts", list(RUNS), ranks)
    verdicts = {run: verdict(expected, found, run) for run in RUNS}
    assert {run: where for run, (size, where) in verdicts.items() if size > TOLERANCE} == {}
