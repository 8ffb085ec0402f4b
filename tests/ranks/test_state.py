"""A training state goes out of one layout and into another, bit by bit, and training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from paceline import Accelerator
from paceline.errors import StateError
from tests.support.engines import slowly, with_deepspeed
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks
from tests.support.state import Whole, assert_same_state, put_state, take_state
from tests.support.training import (
    DDP,
    FSDP,
    FSDP_FOUR,
    FSDP_OFFLOADED,
    HSDP,
    OFFLOAD,
    SINGLE,
    ZERO,
    ZERO_PARAMETERS_OFFLOADED,
    Layout,
    build,
    make_optimizer,
    with_small_scale,
)

if TYPE_CHECKING:
    from pathlib import Path

FSDP_CHECKPOINTED = Layout("fsdp2-checkpointed", 2, "fsdp", {"activation_checkpointing": True})
ZERO_1, ZERO_2, ZERO_3 = ZERO[1], ZERO[2], ZERO[3]
ZERO_2_OFFLOADED = Layout("zero2-offloaded", 2, "deepspeed", {"zero_stage": 2, **OFFLOAD})
ZERO_3_FOUR = Layout("zero3x4", 4, "deepspeed", {"zero_stage": 3})

PLAIN = [SINGLE, DDP, FSDP, FSDP_OFFLOADED, FSDP_CHECKPOINTED]
PLAIN_LARGE = [FSDP_FOUR, HSDP]
ENGINE = [*ZERO, ZERO_2_OFFLOADED, ZERO_PARAMETERS_OFFLOADED]
BEFORE, AFTER = 3, 3


def adagrad_of_two_groups(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Adagrad, which has a state before its first step."""
    first, *others = model.parameters()
    groups: list[dict[str, Any]] = [
        {"params": others},
        {"params": [first], "lr": 1e-3, "initial_accumulator_value": 0.5},
    ]
    return torch.optim.Adagrad(groups, lr=1e-2, initial_accumulator_value=0.1)


OPTIMIZERS: dict[str, Any] = {
    "adamw": make_optimizer,
    "amsgrad": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2),
    "adagrad": adagrad_of_two_groups,
    "plain": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2),
}


class Run:
    """One training that can be stopped between any two steps."""

    def __init__(
        self, layout: Layout, optimizer: str = "adamw", seed: int = 0, device: str = "cpu", precision: str = "no"
    ) -> None:
        if layout.strategy == "deepspeed" and precision == "fp16":
            layout = with_small_scale(layout)
        self.accelerator = build(layout, device, mixed_precision=precision)
        model = TinyTransformer(seed=seed)
        made = OPTIMIZERS[optimizer](model)
        self.model: Any
        self.model, self.optimizer = self.accelerator.prepare(model, made)

    def steps(self, first: int, count: int) -> list[float]:
        size, rank = self.accelerator.num_processes, self.accelerator.process_index
        losses = []
        for step in range(first, first + count):
            batch = make_tokens(8, seed=step).chunk(size)[rank].to(self.accelerator.device)
            loss = token_losses(self.model(batch), batch).mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(float(self.accelerator.reduce(loss.detach(), "mean")))
        return losses


def run_and_save(
    layout: Layout, optimizer: str = "adamw", device: str = "cpu", precision: str = "no"
) -> tuple[Whole, list[float]]:
    run = Run(layout, optimizer, device=device, precision=precision)
    run.steps(0, BEFORE)
    state = take_state(run.accelerator)
    return state, run.steps(BEFORE, AFTER)


def load_and_go_on(
    layout: Layout, state: Whole, optimizer: str = "adamw", device: str = "cpu"
) -> tuple[Whole, list[float]]:
    run = Run(layout, optimizer, seed=9, device=device)
    # A forward leaves whole copies of parameters behind in some layouts; they must not outlive the load.
    with torch.no_grad():
        run.model(make_tokens(2).to(run.accelerator.device))
    put_state(run.accelerator, state)
    return take_state(run.accelerator), run.steps(BEFORE, AFTER)


def load_after_a_step(layout: Layout, state: Whole) -> tuple[Whole, list[float]]:
    run = Run(layout, seed=9)
    run.steps(50, 2)
    put_state(run.accelerator, state)
    return take_state(run.accelerator), run.steps(BEFORE, AFTER)


@pytest.fixture(scope="module")
def saved() -> tuple[Whole, list[float]]:
    result: tuple[Whole, list[float]] = run_on_ranks(1, run_and_save, SINGLE)[0]
    return result


@pytest.mark.parametrize(
    "layout", [*PLAIN, *slowly(PLAIN_LARGE), *with_deepspeed(ENGINE), *slowly(with_deepspeed([ZERO_3_FOUR]))], ids=str
)
def test_a_state_moves_into_every_layout_and_out_again(saved: tuple[Whole, list[float]], layout: Layout) -> None:
    state, losses = saved
    for got, went_on in run_on_ranks(layout.ranks, load_and_go_on, layout, state):
        assert_same_state(got, state)
        assert went_on == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("layout", [DDP, FSDP, *slowly([HSDP]), *with_deepspeed([ZERO_1, ZERO_2, ZERO_3])], ids=str)
def test_the_same_layout_goes_on_to_the_bit(layout: Layout) -> None:
    results = run_on_ranks(layout.ranks, run_and_save, layout)
    state, losses = results[0]
    assert all(loss == losses for _, loss in results)
    for got, went_on in run_on_ranks(layout.ranks, load_after_a_step, layout, state):
        assert_same_state(got, state)
        assert went_on == losses


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (FSDP, DDP),
        *slowly([(HSDP, FSDP)]),
        *with_deepspeed([(ZERO_2, ZERO_3)]),
        *slowly(with_deepspeed([(ZERO_3, ZERO_1), (ZERO_2, FSDP_FOUR), (FSDP, ZERO_3_FOUR)])),
    ],
    ids=str,
)
def test_layouts_exchange_their_states(one: Layout, other: Layout) -> None:
    state, losses = run_on_ranks(one.ranks, run_and_save, one)[0]
    for got, went_on in run_on_ranks(other.ranks, load_and_go_on, other, state):
        assert_same_state(got, state)
        assert went_on == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("optimizer", ["amsgrad", "adagrad", *slowly(["momentum", "plain"])])
@pytest.mark.parametrize("layout", [DDP, FSDP, *with_deepspeed([ZERO_2]), *slowly(with_deepspeed([ZERO_3]))], ids=str)
def test_other_optimizers_move_as_well(layout: Layout, optimizer: str) -> None:
    state, losses = run_on_ranks(1, run_and_save, SINGLE, optimizer)[0]
    for got, went_on in run_on_ranks(layout.ranks, load_and_go_on, layout, state, optimizer):
        assert_same_state(got, state)
        assert went_on == pytest.approx(losses, abs=1e-5)


def test_factored_states_move_where_tensors_stay_whole() -> None:
    state, losses = run_on_ranks(1, run_and_save, SINGLE, "adafactor")[0]
    for got, went_on in run_on_ranks(2, load_and_go_on, DDP, state, "adafactor"):
        assert_same_state(got, state)
        assert went_on == pytest.approx(losses, abs=1e-5)
    with pytest.raises(AssertionError, match="Take one step before loading"):
        run_on_ranks(2, load_and_go_on, FSDP, state, "adafactor")


def lose_a_moment(layout: Layout, state: Whole) -> list[float]:
    for slots in state.slots.values():
        slots["exp_avg_sq"].zero_()
    return load_and_go_on(layout, state)[1]


@pytest.mark.parametrize("layout", [FSDP, *slowly([DDP, *with_deepspeed([ZERO_2, ZERO_3])])], ids=str)
def test_a_lost_moment_is_noticed(saved: tuple[Whole, list[float]], layout: Layout) -> None:
    went_on = run_on_ranks(layout.ranks, lose_a_moment, layout, saved[0])[0]
    assert went_on != pytest.approx(saved[1], abs=1e-5)


def other_groups(layout: Layout, state: Whole) -> str:
    run = Run(layout)
    state.groups[0]["params"] = state.groups[0]["params"][1:]
    with pytest.raises(StateError, match="only in this run: tokens") as caught:
        put_state(run.accelerator, state)
    return str(caught.value)


@pytest.mark.parametrize("layout", [DDP, *with_deepspeed([ZERO_2])], ids=str)
def test_other_groups_are_refused(saved: tuple[Whole, list[float]], layout: Layout) -> None:
    assert "groups of [" in run_on_ranks(layout.ranks, other_groups, layout, saved[0])[0]


def tied(layout: Layout) -> dict[str, str]:
    run = Run(layout)
    return run.accelerator.strategy.tied_names(run.model)


@pytest.mark.parametrize("layout", [SINGLE, FSDP_CHECKPOINTED, *with_deepspeed([ZERO_3])], ids=str)
def test_ties_are_named(layout: Layout) -> None:
    assert run_on_ranks(layout.ranks, tied, layout)[0] == {"head.weight": "tokens.weight"}


class Normalized(torch.nn.Module):
    """Batch norm counts on every rank, of its own samples."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(x))
        return result


def save_normalized(folder: str, strategy: str) -> None:
    accelerator = Accelerator(cpu=True, strategy=strategy)
    torch.manual_seed(1)
    module = Normalized()
    model: Any = module
    optimizer: Any = torch.optim.SGD(module.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(2):
        x = torch.arange(12.0).reshape(3, 4) * (accelerator.process_index + 1)
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    before = {name: buffer.clone() for name, buffer in accelerator.unwrap_model(model).named_buffers()}
    of_rank_0 = accelerator.gather_object([before])[0]
    accelerator.save_state(folder)
    accelerator.load_state(folder)
    for name, buffer in accelerator.unwrap_model(model).named_buffers():
        assert torch.equal(buffer, of_rank_0[name]), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_buffers_that_differ_between_ranks_are_all_saved_as_on_rank_0(strategy: str, tmp_path: Path) -> None:
    run_on_ranks(2, save_normalized, str(tmp_path / "state"), strategy)
