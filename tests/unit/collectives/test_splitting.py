from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from paceline.collectives import BatchCounts, FakeGroup, SoloGroup, run_fake_ranks, split_between_processes
from paceline.errors import CollectiveError


def split(size: int, inputs: Any, apply_padding: bool = False, debug: bool = False) -> list[Any]:
    def work(group: FakeGroup) -> Any:
        with split_between_processes(group, inputs, apply_padding, debug=debug) as own:
            return own

    return run_fake_ranks(size, work)


class Rows:
    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: list[int]) -> Rows:
        return Rows([self.rows[i] for i in indices])


def test_the_first_ranks_get_one_more() -> None:
    assert split(3, list(range(8))) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert split(3, tuple("abcd")) == [("a", "b"), ("c",), ("d",)]
    assert split(2, range(3)) == [[0, 1], [2]]
    assert [own.tolist() for own in split(2, torch.arange(6).view(3, 2))] == [[[0, 1], [2, 3]], [[4, 5]]]
    assert [own.tolist() for own in split(2, np.arange(3))] == [[0, 1], [2]]
    assert [own.rows for own in split(2, Rows([5, 6, 7]))] == [[5, 6], [7]]


def test_fewer_inputs_than_ranks() -> None:
    assert split(3, ["a"]) == [["a"], [], []]
    assert split(3, ["a"], apply_padding=True) == [["a"]] * 3
    assert split(2, [], apply_padding=True) == [[], []]
    assert [own.shape for own in split(3, torch.ones(1, 2))] == [(1, 2), (0, 2), (0, 2)]


def test_padding_repeats_the_last() -> None:
    assert split(3, [0, 1, 2, 3], apply_padding=True) == [[0, 1], [2, 2], [3, 3]]
    assert split(2, (0, 1, 2), apply_padding=True) == [(0, 1), (2, 2)]
    assert [own.tolist() for own in split(2, torch.arange(3), apply_padding=True)] == [[0, 1], [2, 2]]
    assert [own.rows for own in split(2, Rows([5, 6, 7]), apply_padding=True)] == [[5, 6], [7, 7]]


def test_a_dict_is_split_by_column_and_left_alone() -> None:
    inputs: dict[str, Any] = {"text": ["a", "b", "c"], "x": torch.arange(3), "in": {"y": (1, 2, 3)}}
    first, second = split(2, inputs)
    assert first["text"] == ["a", "b"]
    assert second["x"].tolist() == [2]
    assert second["in"] == {"y": (3,)}
    assert inputs["text"] == ["a", "b", "c"]
    assert len(inputs["x"]) == 3


def test_columns_of_different_lengths() -> None:
    with pytest.raises(CollectiveError, match=r"'a': 2, 'b': 3"):
        split(2, {"a": [1, 2], "b": [1, 2, 3]})
    with pytest.raises(CollectiveError, match="got a str"):
        split(2, "text")
    with pytest.raises(CollectiveError, match="got a Tensor"):
        split(2, torch.tensor(1))


def test_one_rank_gets_the_inputs_themselves() -> None:
    inputs = [1, 2, 3]
    with split_between_processes(SoloGroup(), inputs) as own:
        assert own is inputs


def test_debug_compares_the_totals() -> None:
    def work(group: FakeGroup) -> None:
        with split_between_processes(group, [0] * (3 + group.rank), debug=True):
            raise AssertionError("unreachable")

    with pytest.raises(CollectiveError, match=r"\[3, 4\] inputs"):
        run_fake_ranks(2, work)
    assert split(2, [1, 2], debug=True) == [[1], [2]]


def test_counts_must_make_sense() -> None:
    with pytest.raises(CollectiveError, match="from 0 to as many"):
        BatchCounts(rows=(2, 2), real=(2, 3))
    with pytest.raises(CollectiveError, match=r"got rows=\(2,\) and real=\(2, 2\)"):
        BatchCounts(rows=(2,), real=(2, 2))


class Table:
    """As those of pandas, Polars and Arrow: `select` takes columns."""

    columns = ("a", "b")

    def __len__(self) -> int:
        return 4

    def select(self, columns: list[int]) -> list[str]:
        return [self.columns[column] for column in columns]


def test_a_table_is_not_split_by_its_columns() -> None:
    with pytest.raises(CollectiveError, match=r"got a Table.* split range\(len\(table\)\) and take those rows"):
        split(2, Table())
