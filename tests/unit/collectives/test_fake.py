from __future__ import annotations

import threading
import time

import pytest
import torch

from paceline.collectives import FakeGroup, run_fake_ranks
from paceline.errors import CollectiveError


def test_results_come_by_rank() -> None:
    assert run_fake_ranks(3, lambda group: (group.rank, group.size)) == [(0, 3), (1, 3), (2, 3)]


def test_a_rank_that_returned_is_named_at_once() -> None:
    def work(group: FakeGroup) -> None:
        if group.rank != 1:
            group.all_gather(torch.ones(1))

    began = time.monotonic()
    message = r"Rank 1 did not reach the all_gather that ranks? .* in: rank 1 has ended \(it returned\)"
    with pytest.raises(CollectiveError, match=message):
        run_fake_ranks(3, work, timeout=30.0)
    assert time.monotonic() - began < 10


def test_ranks_that_stay_away_are_named_after_the_timeout() -> None:
    stay = threading.Event()

    def work(group: FakeGroup) -> None:
        group.barrier()
        if group.rank < 2:
            stay.wait(30.0)
        else:
            try:
                group.all_reduce(torch.ones(1))
            finally:
                stay.set()

    message = (
        r"Ranks 0-1 did not reach the all_reduce\(sum\) that rank 2 is in: "
        r"rank 0 made 1 exchanges and no further one in 1 s; rank 1"
    )
    with pytest.raises(CollectiveError, match=message):
        run_fake_ranks(3, work, timeout=1.0)


def test_different_operations_are_named() -> None:
    def work(group: FakeGroup) -> None:
        if group.rank == 2:
            group.broadcast(torch.ones(1))
        else:
            group.all_gather(torch.ones(1))

    with pytest.raises(CollectiveError, match=r"(?s)different operations.*rank 2 is in broadcast\(source=0\)"):
        run_fake_ranks(3, work)


def test_the_first_failure_comes_out() -> None:
    def work(group: FakeGroup) -> None:
        if group.rank == 1:
            raise ZeroDivisionError("on rank 1")
        group.barrier()

    with pytest.raises(ZeroDivisionError, match="on rank 1"):
        run_fake_ranks(3, work)


def test_different_shapes_are_named() -> None:
    def work(group: FakeGroup) -> None:
        group.all_gather(torch.ones(3 if group.rank == 1 else 2))

    with pytest.raises(CollectiveError, match=r"ranks 0, 2: \(2,\) .*, rank 1: \(3,\)"):
        run_fake_ranks(3, work)


def test_a_tensor_may_change_once_the_exchange_is_over() -> None:
    def work(group: FakeGroup) -> torch.Tensor:
        mine = torch.tensor([group.rank])
        pending = group.start_all_gather(mine)
        mine.fill_(9)
        return pending.wait()

    for result in run_fake_ranks(2, work):
        assert result.tolist() == [[0], [1]]
