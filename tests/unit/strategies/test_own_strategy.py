"""A strategy that a user derives from `Strategy`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import override

from paceline import Accelerator
from paceline.strategies import (
    Describable,
    DistributedType,
    GradientAccess,
    OptimizerAccess,
    Strategy,
    TrainingStateAccess,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch.optim import Optimizer

    from paceline.strategies import RunContext


class Wrapped(nn.Module):
    """A wrapper such as an engine has."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.module(x)
        return result


class OwnStrategy(Strategy):
    """Wraps every model, and notes the calls."""

    name = "own"

    def __init__(self, context: RunContext) -> None:
        super().__init__(context)
        self.calls: list[str] = []

    @property
    @override
    def distributed_type(self) -> DistributedType:
        return DistributedType.NO

    @override
    def prepare(
        self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer], *, place: Sequence[bool]
    ) -> list[nn.Module]:
        self.calls.append(f"prepare {len(models)} {len(optimizers)}")
        return super().prepare(models, optimizers, place=place)

    @override
    def prepare_model(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        self.place_whole(model, place=place)
        return Wrapped(model)

    @override
    def unwrap(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, Wrapped) else model

    @override
    def backward(self, loss: torch.Tensor, scale: torch.Tensor | None = None, **kwargs: Any) -> None:
        self.calls.append("backward")
        super().backward(loss, scale, **kwargs)


def test_a_derived_class_trains_saves_and_loads(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, strategy=OwnStrategy)
    model = nn.Linear(3, 1)
    before = model.weight.detach().clone()
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    strategy = accelerator.strategy
    assert isinstance(strategy, OwnStrategy)
    with accelerator.accumulate(prepared):
        accelerator.backward(prepared(torch.ones(4, 3)).sum())
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert strategy.calls == ["prepare 1 1", "backward"]
    trained = model.weight.detach().clone()
    assert not torch.equal(before, trained)
    accelerator.save_state(str(tmp_path / "state"))
    with torch.no_grad():
        model.weight.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(model.weight, trained)
    assert set(accelerator.get_state_dict(prepared)) == {"weight", "bias"}


def test_every_strategy_has_the_narrow_views() -> None:
    for view in (TrainingStateAccess, GradientAccess, OptimizerAccess, Describable):
        assert issubclass(Strategy, view)
