"""`load_state` on folders of other libraries, under every strategy, and what it says of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from paceline.checkpoint.foreign import open_foreign
from paceline.checkpoint.foreign.writers import WRITERS
from paceline.errors import CheckpointError, StateError
from tests.data.foreign.make import Counter, Net, groups_of, loss_of
from tests.support.engines import with_deepspeed
from tests.support.ranks import run_on_ranks
from tests.support.state import Whole, take_state
from tests.support.training import DDP, FSDP, SINGLE, ZERO, Layout, build

RECORDED = Path(__file__).parents[1] / "data" / "foreign"
FOLDERS = ["accelerate", "accelerate_fsdp", "deepspeed_3"]


class Run:
    """A run that could have saved the recorded folders."""

    def __init__(self, layout: Layout, *, custom: bool = False, wrong: str = "") -> None:
        self.accelerator = build(layout, "cpu")
        model: Any = Net()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        if wrong == "more weights":
            model.extra = torch.nn.Linear(2, 2).requires_grad_(False)
        groups = groups_of(model)
        if wrong == "one group":
            groups = [{"params": [p for group in groups for p in group["params"]]}]
        optimizer: Any = torch.optim.AdamW(groups, lr=0.5)
        scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        loader: Any = DataLoader(TensorDataset(torch.zeros(8)), batch_size=2)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler, loader
        )
        self.counter = Counter()
        if custom:
            self.accelerator.register_for_checkpointing(self.counter)


def load(layout: Layout, folder: str) -> tuple[Whole, float, list[float], int]:
    run = Run(layout, custom=folder == "accelerate")
    run.accelerator.load_state(RECORDED / folder)
    state = take_state(run.accelerator)
    draws = torch.rand(2).tolist()
    return state, run.scheduler.get_last_lr()[0], draws, run.counter.seen


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("layout", [SINGLE, DDP, FSDP, *with_deepspeed([ZERO[2], ZERO[3]])], ids=str)
def test_weights_moments_and_counts_arrive_bit_by_bit(layout: Layout, folder: str) -> None:
    for state, rate, _, _ in run_on_ranks(layout.ranks, load, layout, folder):
        compare(state, load_file(RECORDED / folder / "expected.safetensors"))
        assert rate == pytest.approx(1e-2 / 4)


@pytest.mark.parametrize("layout", [SINGLE, FSDP], ids=str)
def test_what_was_converted_to_paceline_is_loaded(layout: Layout, tmp_path: Path) -> None:
    WRITERS["paceline"](open_foreign(RECORDED / "deepspeed_3"), tmp_path / "ours", lambda _: None)
    for state, rate, _, _ in run_on_ranks(layout.ranks, load, layout, str(tmp_path / "ours")):
        compare(state, load_file(RECORDED / "deepspeed_3" / "expected.safetensors"))
        assert rate == pytest.approx(1e-2 / 4)


def compare(state: Whole, expected: dict[str, Tensor]) -> None:
    for full, value in expected.items():
        family, _, name = full.partition("/")
        if family == "model":
            loaded = state.weights.get("tokens.weight" if name == "head.weight" else name)
        else:
            owner, _, slot = name.rpartition("/")
            loaded = state.slots[owner][slot]
        assert loaded is not None, full
        assert torch.equal(loaded, value), full
    assert {float(slots["step"]) for slots in state.slots.values()} == {3.0}


def test_generators_and_custom_objects_of_accelerate_arrive() -> None:
    ((_, _, draws, seen),) = run_on_ranks(1, load, SINGLE, "accelerate")
    torch.manual_seed(40)
    assert draws == torch.rand(2).tolist()
    assert seen == 12


def go_on(plainly: bool) -> list[float]:
    """Two more steps from the recorded folder, by hand or by `load_state`."""
    if not plainly:
        run = Run(SINGLE, custom=True)
        run.accelerator.load_state(RECORDED / "accelerate")
        model, optimizer, scheduler = run.model, run.optimizer, run.scheduler
    else:
        model = Net()
        model.load_state_dict(load_file(RECORDED / "accelerate" / "model.safetensors"), strict=False)
        optimizer = torch.optim.AdamW(groups_of(model), lr=0.5)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        optimizer.load_state_dict(torch.load(RECORDED / "accelerate" / "optimizer.bin", weights_only=True))
        scheduler.load_state_dict(torch.load(RECORDED / "accelerate" / "scheduler.bin", weights_only=True))
    losses = []
    for step in (3, 4):
        loss = loss_of(model, step)
        if plainly:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            run.accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_training_goes_on_bit_equal() -> None:
    assert run_on_ranks(1, go_on, False) == run_on_ranks(1, go_on, True)


def fail(wrong: str) -> str:
    run = Run(SINGLE, custom=wrong != "no counter", wrong=wrong)
    try:
        run.accelerator.load_state(RECORDED / "accelerate")
    except (CheckpointError, StateError) as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("more weights", "CheckpointError: .*extra.weight"),
        ("one group", "StateError: .*groups"),
        ("no counter", "StateError: .*1 custom object, and this run has 0"),
    ],
)
def test_what_does_not_fit_is_an_error(wrong: str, says: str) -> None:
    import re

    (report,) = run_on_ranks(1, fail, wrong)
    assert re.match(says, report), report


def listen(folder: str) -> list[str]:
    run = Run(SINGLE, custom=folder == "accelerate_ddp")
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear = Ear()
    logger = logging.getLogger("paceline.accelerator.training_state.manager")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(ear)
    try:
        run.accelerator.load_state(RECORDED / folder)
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)
    return heard


def test_each_thing_taken_or_left_gets_a_line() -> None:
    (lines,) = run_on_ranks(1, listen, "accelerate_ddp")
    report = "\n".join(lines)
    for words in (
        "loaded: 11 weights",
        "loaded: optimizer 0, at step 3",
        "loaded: scheduler 0 at 6 after 3 optimizer steps",
        "loaded: custom object 0",
        "loaded: random generators of rank 0",
        "skipped: loader positions",
    ):
        assert words in report, report
