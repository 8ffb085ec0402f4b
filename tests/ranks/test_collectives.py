"""The cases that hold in every group, over real ranks and gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from paceline.collectives import TorchGroup, gather, reduce
from paceline.errors import CollectiveError
from tests.support.ranks import run_on_ranks
from tests.unit.collectives.cases import CASES, same


def run_case(name: str) -> None:
    CASES[name](TorchGroup())


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_over_gloo(name: str, size: int) -> None:
    run_on_ranks(size, run_case, name)


def exchange_in_a_subgroup() -> str:
    members = [0, 2]
    process_group = dist.new_group(members)
    if dist.get_rank() not in members:
        with pytest.raises(CollectiveError, match="Rank 1 created a TorchGroup"):
            TorchGroup(process_group=process_group)
        return "outside"
    group = TorchGroup(process_group=process_group)
    assert group.size == 2
    assert group.rank == members.index(dist.get_rank())
    same(gather(group, torch.tensor(dist.get_rank())), torch.tensor(members))
    same(reduce(group, torch.tensor(dist.get_rank()), "sum"), torch.tensor(2))
    # The source is a rank of the group, not of the world.
    assert group.broadcast_object(dist.get_rank(), 1) == 2
    same(group.broadcast(torch.tensor(dist.get_rank()), 1), torch.tensor(2))
    group.barrier()
    return "inside"


def test_a_subgroup_has_its_own_ranks() -> None:
    assert run_on_ranks(3, exchange_in_a_subgroup) == ["inside", "outside", "inside"]


def test_without_a_process_group() -> None:
    with pytest.raises(CollectiveError, match="No process group is initialized"):
        TorchGroup()
