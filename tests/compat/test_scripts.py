"""Twelve plain scripts give the same numbers on Accelerate and through the switch."""

from __future__ import annotations

import pytest

from tests.compat.compare import TOLERANCE, numbers, verdict
from tests.compat.plain_scripts import RUNS, SHORT

pytestmark = pytest.mark.compat
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@pytest.mark.parametrize(
    ("runs", "ranks"),
    [
        pytest.param(SHORT, 1, id="short"),
        pytest.param(list(RUNS), 1, marks=pytest.mark.slow, id="all-1"),
        pytest.param(list(RUNS), 2, marks=pytest.mark.slow, id="all-2"),
    ],
)
@pytest.mark.timeout(1800)
def test_plain_scripts(runs: list[str], ranks: int) -> None:
    expected = numbers("real", "plain_scripts", runs, ranks)
    found = numbers("switched", "plain_scripts", runs, ranks)
    verdicts = {run: verdict(expected, found, run) for run in runs}
    assert {run: where for run, (size, where) in verdicts.items() if size > TOLERANCE} == {}
