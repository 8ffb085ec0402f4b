"""How long samples are, for batches of samples that are about as long."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch

from paceline.errors import DataError
from paceline.trainer.batches.sampling import LengthGroupedSampler, lengths_of

LENGTHS = [3, 1, 7, 2]


class WithColumns(list[Any]):
    """Rows whose columns can be asked for by name, as data sets of `datasets` allow."""

    column_names = ["input_ids", "length"]

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: list(range(n)),
        lambda n: torch.arange(n),
        lambda n: torch.arange(n)[None],
        lambda n: torch.arange(n)[None, None],
        lambda n: [list(range(n))],
        lambda n: [torch.arange(n)],
        lambda n: np.arange(n),
        lambda n: np.arange(n)[None],
        lambda n: torch.zeros(n, 80),
    ],
)
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_inputs_say_how_long_they_are(make: Any, kind: Any) -> None:
    assert lengths_of([kind(input_ids=make(n)) for n in LENGTHS], "length", "input_ids") == LENGTHS


@pytest.mark.parametrize("make", [int, float, torch.tensor, np.int64, lambda n: [n], lambda n: torch.tensor([[n]])])
@pytest.mark.parametrize("kind", [list, WithColumns])
def test_a_column_says_how_long_they_are(make: Any, kind: Any) -> None:
    rows = kind({"input_ids": [0], "length": make(n)} for n in LENGTHS)
    assert lengths_of(rows, "length", "input_ids") == LENGTHS


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"length": [3, 4]}, r"length of a sample is \[3, 4\]"),
        ({"length": None}, "length of a sample is None"),
        ({"input_ids": torch.tensor(3)}, r"input_ids of a sample is tensor\(3\). It has no length"),
        ({"x": 1}, "Samples have neither 'length' nor 'input_ids'"),
        ((1, 2), "Samples have neither 'length' nor 'input_ids'"),
    ],
)
def test_what_tells_no_length_is_named(sample: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        lengths_of([sample, sample], "length", "input_ids")


def test_samples_that_are_all_as_long_are_said(caplog: pytest.LogCaptureFixture) -> None:
    assert lengths_of([{"input_ids": [1, 2]}] * 3, "length", "input_ids") == [2, 2, 2]
    assert "all 3 samples have length 2" in caplog.text


def test_inputs_with_a_leading_dimension_are_grouped() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (256,), generator=generator).tolist()
    found = lengths_of([{"input_ids": torch.zeros(1, n)} for n in lengths], "length", "input_ids")
    order = list(LengthGroupedSampler(found, 8))
    assert sorted(order) == list(range(256))
    spread = [max(part) - min(part) for part in (_of(lengths, order[i : i + 8]) for i in range(8, 256, 8))]
    assert sum(spread) / len(spread) < 30, "about 78 in random batches"


def _of(lengths: list[int], order: list[int]) -> list[int]:
    return [lengths[index] for index in order]
