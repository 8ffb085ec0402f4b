"""Strategies by name."""

from __future__ import annotations

import pytest

from paceline.errors import NotBuiltError, PrepareError
from paceline.strategies import DistributedType, Strategy, load_strategy, strategy_names


def test_every_name_loads_its_class() -> None:
    assert strategy_names() == ("single", "ddp", "fsdp")
    for name in strategy_names():
        cls = load_strategy(name)
        assert issubclass(cls, Strategy)
        assert cls.name == name


def test_strategies_do_not_inherit_from_each_other() -> None:
    assert all(load_strategy(name).__bases__ == (Strategy,) for name in strategy_names())


def test_names_that_load_nothing() -> None:
    with pytest.raises(NotBuiltError, match="strategy='fsdp'"):
        load_strategy("deepspeed")
    with pytest.raises(PrepareError, match="Choose auto, single, ddp, fsdp"):
        load_strategy("dpp")


def test_distributed_types_read_as_configuration_files_write_them() -> None:
    assert str(DistributedType.FSDP) == "FSDP"
    assert f"{DistributedType.NO}" == "NO"
    assert DistributedType("MULTI_CPU") is DistributedType.MULTI_CPU
    text: str = DistributedType.MULTI_GPU
    assert text == "MULTI_GPU"
