"""The ladder from DDP to FSDP2 with everything, rung by rung at its exact threshold."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.config import FullyShardedDataParallelPlugin
from paceline.planner import Footprint, StrategyChoice, choose_strategy

RANKS = 4
# Of one copy: 400 of parameters, 1600 in all; a shard is 400.
MODEL = Footprint(parameters=400, gradients=400, optimizer=800)

KEPT: dict[str, Any] = {"reshard_after_forward": False}
CHECKPOINTED: dict[str, Any] = {"activation_checkpointing": True}
OFFLOADED: dict[str, Any] = {"cpu_offload": True, "activation_checkpointing": True}


def choose(free: int, footprint: Footprint = MODEL, ranks: int = RANKS) -> StrategyChoice:
    return choose_strategy(footprint, free=free, ranks=ranks, device="a device")


@pytest.mark.parametrize(
    ("free", "strategy", "settings"),
    [
        # 70 % of the free memory are for the state: 1600 fit from 2286 on.
        (10**9, "ddp", {}),
        (2286, "ddp", {}),
        (2285, "fsdp", KEPT),
        # A shard and all parameters, 800: from 1143 on.
        (1143, "fsdp", KEPT),
        (1142, "fsdp", {}),
        # A shard alone leaves half of the memory to activations: from 800 on.
        (800, "fsdp", {}),
        (799, "fsdp", CHECKPOINTED),
        # A shard alone fits into 70 %: from 572 on.
        (572, "fsdp", CHECKPOINTED),
        (571, "fsdp", OFFLOADED),
        (0, "fsdp", OFFLOADED),
    ],
)
def test_the_least_sharding_that_fits(free: int, strategy: str, settings: dict[str, Any]) -> None:
    got = choose(free)
    assert (got.strategy, got.settings) == (strategy, settings)


def test_settings_are_fields_of_the_plugin() -> None:
    for settings in (KEPT, CHECKPOINTED, OFFLOADED):
        plugin = FullyShardedDataParallelPlugin(**settings)
        assert all(getattr(plugin, name) == value for name, value in settings.items())


def test_what_is_placed_already_is_room_too() -> None:
    placed = Footprint(parameters=400, gradients=400, optimizer=800, placed=400)
    assert choose(1886, placed).strategy == "ddp"
    assert choose(1886).strategy == "fsdp"
    assert choose(1885, placed).strategy == "fsdp"


def test_one_process_needs_no_sharding() -> None:
    assert choose(0, ranks=1) == StrategyChoice(strategy="single", reason="single: there is one process")


def test_more_ranks_need_less_each() -> None:
    assert choose(600, ranks=4).settings == CHECKPOINTED
    assert choose(600, ranks=8).settings == {}
    assert choose(600, ranks=2).settings == OFFLOADED


def test_the_reason_holds_the_numbers() -> None:
    big = Footprint(parameters=4 * 2**30, gradients=4 * 2**30, optimizer=8 * 2**30)
    ddp = choose(80 * 2**30, big).reason
    assert ddp.startswith("ddp: ")
    assert "16.00 GiB" in ddp
    assert "56.00 GiB of the 80.00 GiB free for each rank on a device" in ddp
    fsdp = choose(10 * 2**30, big).reason
    assert fsdp.startswith("fsdp, ")
    assert "4.00 GiB sharded over 4 ranks" in fsdp
    assert "parameters in host memory" in choose(0, big).reason
    assert "take 1.56 KiB, 0.39 KiB per rank" in choose(5).reason
