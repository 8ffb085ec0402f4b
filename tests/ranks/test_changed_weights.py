"""Weights that a script changes between steps: trained on from there as on one rank, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paceline.errors import CollectiveError, SteppingError
from tests.support.engines import make, with_deepspeed
from tests.support.models import tanh_batches, tanh_model
from tests.support.ranks import run_on_ranks

STEPS = 4


def halve(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


def clip_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.1, 0.1)


def load(model: nn.Module) -> None:
    model.load_state_dict(tanh_model(7).state_dict())


CHANGES = {"written": halve, "clipped": clip_data, "loaded": load}


def wanted(change: str, before: int) -> dict[str, Tensor]:
    model = tanh_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for number, batch in enumerate(tanh_batches(STEPS)):
        if number == before:
            CHANGES[change](model)
        model(batch).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def trained(strategy: str, change: str, before: int, rank: int | None, precision: str = "no") -> dict[str, Tensor]:
    accelerator = make(strategy, mixed_precision=precision)
    model: Any = tanh_model(accelerator.process_index)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    for number, batch in enumerate(tanh_batches(STEPS)):
        if number == before and rank is None:
            CHANGES[change](accelerator.unwrap_model(model))
        elif number == before:
            with accelerator.gather_parameters(model, modifier_rank=rank):
                if accelerator.process_index == rank:
                    CHANGES[change](accelerator.unwrap_model(model))
        accelerator.backward(model(batch[accelerator.process_index :: 2]).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    return accelerator.get_state_dict(model)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("strategy", ["ddp", *with_deepspeed(["zero1", "zero2", "zero3"])])
def test_all_ranks_train_on_from_what_one_changed(strategy: str, change: str, rank: int) -> None:
    found = run_on_ranks(2, trained, strategy, change, 2, rank)[0]
    torch.testing.assert_close(found, wanted(change, 2), rtol=1e-4, atol=1e-5)


def not_there() -> str:
    accelerator = make("ddp")
    model = accelerator.prepare(tanh_model())
    with pytest.raises(CollectiveError) as caught:
        accelerator.gather_parameters(model, modifier_rank=2)
    return str(caught.value)


def test_a_rank_that_does_not_exist_changes_nothing() -> None:
    assert all("rank 2" in text for text in run_on_ranks(2, not_there))


def refused(strategy: str, change: str, before: int, precision: str) -> str:
    try:
        trained(strategy, change, before, None, precision)
    except SteppingError as error:
        return str(error)
    return ""


# Before the first forward of stage 3 there is nothing to change: parameters are empty.
@pytest.mark.parametrize(
    ("strategy", "change", "before"),
    with_deepspeed(
        [(f"zero{stage}", change, before) for stage in (1, 2, 3) for change in CHANGES for before in (1, 3)]
        + [("zero2", "loaded", 0), ("zero2", "clipped", 0)]
    ),
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_change_that_the_next_step_would_undo_is_refused(
    strategy: str, precision: str, change: str, before: int
) -> None:
    for said in run_on_ranks(2, refused, strategy, change, before, precision):
        assert "0.weight" in said or "2.weight" in said
        assert "gather_parameters(model, modifier_rank=0)" in said


def saved_before_a_step(strategy: str) -> None:
    accelerator = make(strategy)
    model: Any = tanh_model()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    halve(accelerator.unwrap_model(model))
    with pytest.raises(SteppingError, match=r"0\.weight"):
        accelerator.get_state_dict(model)


@pytest.mark.parametrize("strategy", with_deepspeed(["zero2", "zero3"]))
def test_weights_that_would_be_saved_without_a_change_are_refused(strategy: str) -> None:
    run_on_ranks(2, saved_before_a_step, strategy)


def diverged(strategy: str) -> bool:
    accelerator = make(strategy)
    model: Any = tanh_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=float("nan")))
    for batch in tanh_batches(STEPS):
        accelerator.backward(model(batch).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    return all(bool(value.isnan().all()) for value in accelerator.get_state_dict(model).values())


@pytest.mark.parametrize("strategy", with_deepspeed(["zero2", "zero3"]))
def test_weights_that_are_no_numbers_were_not_changed_by_the_script(strategy: str) -> None:
    assert all(run_on_ranks(2, diverged, strategy))


def one_of_them(strategy: str) -> dict[str, Tensor]:
    accelerator = make(strategy, mixed_precision="bf16")
    model: Any = tanh_model()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    inner: Any = accelerator.unwrap_model(model)
    bias = inner[0].bias
    with accelerator.gather_parameters(model, modifier_rank=0):
        if accelerator.is_main_process:
            bias.data[3] = 0.25
    return accelerator.get_state_dict(model)


@pytest.mark.parametrize("strategy", with_deepspeed(["zero2", "zero3"]))
def test_what_was_not_changed_keeps_its_fp32_bits(strategy: str) -> None:
    right = tanh_model().state_dict()
    right["0.bias"][3] = 0.25
    found = run_on_ranks(2, one_of_them, strategy)[0]
    assert all(torch.equal(found[name], value) for name, value in right.items())


def reloaded(strategy: str, folder: str, states: bool) -> dict[str, Tensor]:
    """DeepSpeed's own checkpoint of the second step is loaded after the fourth, as transformers' Trainer does."""
    accelerator = make(strategy)
    model: Any = tanh_model(accelerator.process_index)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def train(first: int, last: int) -> None:
        for batch in tanh_batches(STEPS)[first:last]:
            accelerator.backward(model(batch[accelerator.process_index :: 2]).pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()

    train(0, 2)
    model.save_checkpoint(folder)
    train(2, 4)
    model.load_checkpoint(folder, load_optimizer_states=states)
    train(2, 4)
    return accelerator.get_state_dict(model)


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("strategy", with_deepspeed(["zero1", "zero2", "zero3"]))
def test_a_checkpoint_of_deepspeeds_own_is_loaded(strategy: str, states: bool, tmp_path: Path) -> None:
    model = tanh_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in tanh_batches(STEPS):
        model(batch).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = run_on_ranks(2, reloaded, strategy, str(tmp_path), states)[0]
    torch.testing.assert_close(found, model.state_dict(), rtol=1e-4, atol=1e-5)


def trained_with_a_weight_of_its_own_group(strategy: str) -> dict[str, Tensor]:
    accelerator = make(strategy)
    model: Any = tanh_model()
    first, *others = model.parameters()
    optimizer: Any = torch.optim.AdamW([{"params": [first], "lr": 0.001}, {"params": others}], lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    size, rank = accelerator.num_processes, accelerator.process_index
    for batch in tanh_batches(STEPS):
        accelerator.backward(model(batch[rank::size]).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    return accelerator.get_state_dict(model)


@pytest.mark.parametrize("strategy", with_deepspeed(["zero1", "zero2", "zero3"]))
def test_a_weight_that_the_engine_writes_in_place_was_not_changed_by_the_script(strategy: str) -> None:
    one = run_on_ranks(1, trained_with_a_weight_of_its_own_group, "single")[0]
    found = run_on_ranks(2, trained_with_a_weight_of_its_own_group, strategy)[0]
    torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5)
