"""Strategies by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from paceline.errors import PrepareError
from paceline.strategies import DistributedType, Strategy, load_strategy, strategy_names
from tests.support.engines import with_deepspeed

NAMES = ["single", "ddp", "fsdp", *with_deepspeed(["deepspeed"])]


def test_the_names() -> None:
    assert strategy_names() == ("single", "ddp", "fsdp", "deepspeed")


@pytest.mark.parametrize("name", NAMES)
def test_every_name_loads_its_class(name: str) -> None:
    cls = load_strategy(name)
    assert issubclass(cls, Strategy)
    assert cls.name == name


@pytest.mark.parametrize("name", NAMES)
def test_strategies_do_not_inherit_from_each_other(name: str) -> None:
    others = {f"paceline.strategies.{other}" for other in strategy_names() if other != name}
    assert not others & {cls.__module__ for cls in load_strategy(name).__mro__}


def test_names_that_load_nothing() -> None:
    with pytest.raises(PrepareError, match="Choose auto, single, ddp, fsdp"):
        load_strategy("dpp")


def test_distributed_types_read_as_configuration_files_write_them() -> None:
    assert str(DistributedType.FSDP) == "FSDP"
    assert f"{DistributedType.NO}" == "NO"
    assert DistributedType("MULTI_CPU") is DistributedType.MULTI_CPU
    text: str = DistributedType.MULTI_GPU
    assert text == "MULTI_GPU"


WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deepspeed":
            raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")

sys.meta_path.insert(0, Blocked())
from paceline import Accelerator, DeepSpeedPlugin
Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin())
"""


def test_without_deepspeed_the_error_gives_the_command() -> None:
    ended = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "MissingExtraError: strategy='deepspeed' needs the package 'deepspeed'" in ended.stderr
    assert "pip install 'paceline[deepspeed]'" in ended.stderr
