"""`paceline test` passes here, and its checks fail where something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from paceline import Accelerator
from paceline.cli.selftest.checks import check_collectives, check_load, check_save, check_sharding, check_training
from paceline.cli.selftest.outcome import run_check
from paceline.cli.selftest.training import prepare
from paceline.strategies import load_strategy
from tests.support.ranks import run_on_ranks

if TYPE_CHECKING:
    from pathlib import Path


def try_out(folder: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Run the command in a process of its own, since torch elastic leaves files open; code and what it says."""
    home = {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")}
    program = [sys.executable, "-m", "paceline", "test", "--cpu", "--num_processes", "2", "--json", *flags]
    done = subprocess.run(program, cwd=folder, env=home, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def names(told: dict[str, Any]) -> list[tuple[str, str]]:
    return [(check["section"], check["name"]) for check in told["checks"]]


@pytest.mark.slow
def test_this_installation(tmp_path: Path) -> None:
    code, told = try_out(tmp_path)
    assert code == 0, told
    assert told["passed"]
    assert {("", "collectives"), ("auto, no", "training"), ("fsdp, no", "sharding"), ("fsdp", "load")} <= set(
        names(told)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--mixed_precision", "bf16", "--use_fsdp", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"),
        ("--mixed_precision", "fp16"),
        ("--use_deepspeed", "--zero_stage", "3", "--gradient_accumulation_steps", "2"),
        ("--num_processes", "3"),
        ("--num_processes", "1"),
    ],
    ids=" ".join,
)
def test_other_configurations(flags: tuple[str, ...], tmp_path: Path) -> None:
    code, told = try_out(tmp_path, *flags)
    assert code == 0, [check for check in told["checks"] if not check["passed"]]


# Known-wrong ways to train must not pass


def ranks_that_do_not_exchange() -> list[str]:
    accelerator = Accelerator(cpu=True, strategy=load_strategy("single"))
    run = prepare(accelerator, accelerator.num_processes, 1)
    outcome = run_check("", "training", lambda: check_training(run, 1)[0])
    whole = run_check("", "sharding", lambda: check_sharding(run))
    return [f"{one.passed} {one.saw}" for one in (outcome, whole)]


def test_ranks_that_do_not_exchange_gradients_fail() -> None:
    for training, sharding in run_on_ranks(2, ranks_that_do_not_exchange):
        assert training.startswith("False losses")
        assert sharding.startswith("False the ranks hold [9089, 9089]")


class WrongSum(Accelerator):
    def reduce(self, tensor: Any, reduction: Any = "sum", scale: float = 1.0) -> Any:
        return super().reduce(tensor, reduction, scale) + 1


def exchanges_that_are_wrong() -> list[str]:
    outcome = run_check("", "collectives", lambda: check_collectives(WrongSum(cpu=True)))
    return [str(outcome.passed), outcome.saw]


def test_wrong_exchanges_fail() -> None:
    for passed, saw in run_on_ranks(2, exchanges_that_are_wrong):
        assert passed == "False"
        assert saw.startswith("sum over 2 ranks gave [4.0, 4.0, 4.0]")


def test_a_checkpoint_that_changed_fails(tmp_path: Path) -> None:
    run = prepare(Accelerator(cpu=True), 1, 1)
    check_save(run, tmp_path)
    assert "bit-equal" in check_load(Accelerator(cpu=True), tmp_path, 1, ())
    wanted = json.loads((tmp_path / "wanted.json").read_text())
    wanted["weights"]["0.weight"] += 1
    (tmp_path / "wanted.json").write_text(json.dumps(wanted))
    outcome = run_check("", "load", lambda: check_load(Accelerator(cpu=True), tmp_path, 1, ()))
    assert not outcome.passed
    assert "0.weight" in outcome.saw


def test_an_error_is_an_outcome() -> None:
    outcome = run_check("", "anything", lambda: str(torch.zeros(2)[3]))
    assert not outcome.passed
    assert outcome.saw.startswith("IndexError: ")
