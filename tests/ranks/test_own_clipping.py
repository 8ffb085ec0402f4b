"""Scripts that clip with torch's own functions: clipped as on one rank, or refused where nothing would be clipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from paceline.accelerator.policies import Policies, use_policies
from paceline.config import Leniency
from paceline.errors import PrepareError, SteppingError
from tests.support.engines import make, with_deepspeed
from tests.support.models import tanh_batches, tanh_model
from tests.support.ranks import run_on_ranks
from tests.support.warned import warnings_of

# The names that this module has imported itself, and those that it looks up.
CLIPS: dict[str, Any] = {
    "norm": lambda model, _: nn.utils.clip_grad_norm_(model.parameters(), 0.01),
    "imported norm": lambda model, _: clip_grad_norm_(parameters=model.parameters(), max_norm=0.01),
    "imported value": lambda model, _: clip_grad_value_(model.parameters(), 0.001),
    "one": lambda model, _: nn.utils.clip_grad_norm_(next(model.parameters()), 0.01),
    "groups": lambda _, optimizer: clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.01),
}


def wanted(kind: str) -> dict[str, Tensor]:
    model = tanh_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in tanh_batches(3):
        loss: Any = model(batch).pow(2).mean()
        loss.backward()
        CLIPS[kind](model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def trained(strategy: str, kind: str) -> dict[str, Tensor] | str:
    accelerator = make(strategy)
    model: Any = tanh_model(accelerator.process_index)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    try:
        for batch in tanh_batches(3):
            accelerator.backward(model(batch[accelerator.process_index :: 2]).pow(2).mean())
            CLIPS[kind](model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
    except SteppingError as error:
        return str(error)
    return accelerator.get_state_dict(model)


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_are_clipped_as_on_one_rank(strategy: str, kind: str) -> None:
    torch.testing.assert_close(run_on_ranks(2, trained, strategy, kind)[0], wanted(kind), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("strategy", with_deepspeed(["zero1", "zero2", "zero3"]))
def test_clipping_of_gradients_that_zero_keeps_is_refused(strategy: str, kind: str) -> None:
    for said in run_on_ranks(2, trained, strategy, kind):
        assert isinstance(said, str)
        assert f"Call accelerator.clip_grad_{'value' if 'value' in kind else 'norm'}_(model.parameters(), ...)" in said


def tolerated(strategy: str) -> list[str]:
    with use_policies(Policies(leniency=Leniency(clip_inside_window=True))):
        accelerator = make(strategy)
    model: Any = tanh_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with warnings_of() as said:
        for batch in tanh_batches(3):
            accelerator.backward(model(batch).pow(2).mean())
            clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
    return [text for text in said if "nothing would be clipped" in text]


@pytest.mark.parametrize("strategy", with_deepspeed(["zero2"]))
def test_programs_of_another_library_are_told_once(strategy: str) -> None:
    # Rank 0 speaks for all.
    assert [len(said) for said in run_on_ranks(2, tolerated, strategy)] == [1, 0]


def beside(strategy: str) -> float:
    """Clip a model that no engine has, while there is one."""
    accelerator = make(strategy)
    model: Any = tanh_model()
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    other = nn.Linear(6, 1)
    loss: Any = other(tanh_batches(3)[0]).sum()
    loss.backward()
    clip_grad_norm_(other.parameters(), 0.5)
    return float(nn.utils.get_total_norm([p.grad for p in other.parameters() if p.grad is not None]))


@pytest.mark.parametrize("strategy", with_deepspeed(["zero2"]))
def test_another_model_is_clipped_as_ever(strategy: str) -> None:
    assert run_on_ranks(2, beside, strategy) == pytest.approx([0.5, 0.5], rel=1e-3)


def copied(strategy: str) -> str:
    accelerator = make(strategy)
    model: Any = tanh_model()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(PrepareError) as caught:
        torch.optim.swa_utils.AveragedModel(model)
    return str(caught.value)


@pytest.mark.parametrize("strategy", with_deepspeed(["zero2", "zero3"]))
def test_an_engine_is_not_copied(strategy: str) -> None:
    assert all("AveragedModel calls it, too" in said for said in run_on_ranks(2, copied, strategy))
