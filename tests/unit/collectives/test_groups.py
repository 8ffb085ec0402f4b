"""The cases that hold in every group, over make-believe ranks and a group of one (real ones: tests/ranks)."""

from __future__ import annotations

import pytest

from paceline.collectives import SoloGroup, run_fake_ranks
from tests.unit.collectives.cases import CASES


@pytest.mark.parametrize("name", CASES)
def test_in_a_group_of_one(name: str) -> None:
    CASES[name](SoloGroup())


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_over_fake_ranks(name: str, size: int) -> None:
    run_fake_ranks(size, CASES[name], timeout=10.0)
