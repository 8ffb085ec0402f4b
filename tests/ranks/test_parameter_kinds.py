"""Parameters without a dimension and complex ones: trained as on one rank, or refused by their name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paceline.errors import PrepareError
from tests.support.engines import ZERO_STAGES, make, with_deepspeed
from tests.support.ranks import run_on_ranks

STEPS = 3


class Scaled(nn.Module):
    """A learned temperature, as in CLIP; a second scalar that rests."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.logit_scale = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) * self.logit_scale.exp() * self.frozen
        return out


class Rotated(nn.Module):
    """Complex weights, as in a layer that filters in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.filter = nn.Parameter(torch.randn(3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(torch.fft.irfft(torch.fft.rfft(x) * self.filter, 4))
        return out


class OnlyScalar(nn.Module):
    """Nothing but a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


MODELS: dict[str, type[nn.Module]] = {"scalar": Scaled, "complex": Rotated, "only a scalar": OnlyScalar}


def fresh(kind: str, rank: int = 0) -> nn.Module:
    # Other ranks draw other values; rank 0's must win.
    torch.manual_seed(rank)
    model = MODELS[kind]()
    if rank:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(rank)
    return model


def batches() -> Tensor:
    return torch.randn(STEPS, 8, 4, generator=torch.Generator().manual_seed(1))


def loss_of(out: Tensor) -> Tensor:
    return (out - 1).pow(2).mean()


def wanted(kind: str) -> dict[str, Tensor]:
    model = fresh(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in batches():
        loss: Any = loss_of(model(x))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def trained(kind: str, strategy: str, folder: str) -> dict[str, Tensor]:
    """The weights after the steps, the last of which is taken twice: from a training state too."""
    accelerator = make(strategy)
    model: Any = fresh(kind, accelerator.process_index)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

    def step(x: Tensor) -> None:
        accelerator.backward(loss_of(model(x[accelerator.process_index :: accelerator.num_processes])))
        accelerator.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        optimizer.zero_grad()

    *first, last = batches()
    for x in first:
        step(x)
    saved = accelerator.save_state(folder)
    step(last)
    accelerator.load_state(str(saved))
    step(last)
    found = accelerator.get_state_dict(model)
    accelerator.free_memory()
    return {name: value for name, value in found.items() if torch.is_tensor(value)}


def assert_alike(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(found) == set(right)
    for name, value in right.items():
        assert found[name].shape == value.shape, name
        assert torch.allclose(found[name], value, atol=1e-5), name


@pytest.mark.parametrize("strategy", ["ddp", *ZERO_STAGES])
@pytest.mark.parametrize("kind", ["scalar", "only a scalar"])
def test_a_parameter_without_a_dimension_is_trained(kind: str, strategy: str, tmp_path: Any) -> None:
    assert_alike(run_on_ranks(2, trained, kind, strategy, str(tmp_path))[0], wanted(kind))


@pytest.mark.parametrize("kind", list(MODELS))
def test_one_rank_trains_each(kind: str, tmp_path: Any) -> None:
    assert_alike(run_on_ranks(1, trained, kind, "single", str(tmp_path))[0], wanted(kind))


def test_complex_parameters_are_trained(tmp_path: Any) -> None:
    assert_alike(run_on_ranks(2, trained, "complex", "ddp", str(tmp_path))[0], wanted("complex"))


def refused(kind: str, strategy: str) -> str:
    accelerator = make(strategy)
    model = fresh(kind)
    with pytest.raises(PrepareError) as error:
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "strategy", "words"),
    [
        ("scalar", "fsdp", ("logit_scale, frozen of Scaled have no dimension", "nn.Parameter(torch.tensor([2.65]))")),
        ("only a scalar", "fsdp", ("scale of OnlyScalar has no dimension", "strategy='ddp'")),
        ("complex", "fsdp", ("filter of Rotated is complex", "torch.view_as_complex()")),
        *with_deepspeed(
            [
                ("complex", f"zero{stage}", ("filter of Rotated is complex", "torch.view_as_complex()"))
                for stage in range(4)
            ],
            every_stage=True,
        ),
    ],
)
def test_what_cannot_be_trained_is_named(kind: str, strategy: str, words: tuple[str, str]) -> None:
    for message in run_on_ranks(2, refused, kind, strategy):
        assert all(part in message for part in words)


def told_twice(kind: str) -> dict[str, Tensor]:
    accelerator = make("ddp")
    model: Any = fresh(kind, accelerator.process_index)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = batches()[0][accelerator.process_index :: 2]
    out = model(x)
    accelerator.backward(loss_of(out), retain_graph=True)
    accelerator.backward(out.tanh().mean())
    optimizer.step()
    return {name: p.detach() for name, p in accelerator.unwrap_model(model).named_parameters()}


@pytest.mark.parametrize("kind", ["scalar", "complex"])
def test_two_backwards_average_them_too(kind: str) -> None:
    model = fresh(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out = model(batches()[0])
    (loss_of(out) + out.tanh().mean()).backward()
    optimizer.step()
    right = {name: p.detach() for name, p in model.named_parameters()}
    for found in run_on_ranks(2, told_twice, kind):
        assert_alike(found, right)
