"""What a test needs that not every machine has."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest

from paceline import Accelerator, DeepSpeedPlugin

if TYPE_CHECKING:
    from torch import Tensor, nn

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install 'paceline[deepspeed]'",
)


def with_deepspeed(values: list[Any]) -> list[Any]:
    """Parameters of a test that are skipped, visibly, where DeepSpeed is not installed."""
    return [_with_deepspeed(value) for value in values]


def _with_deepspeed(value: Any) -> Any:
    if isinstance(value, tuple):
        return pytest.param(*value, marks=needs_deepspeed, id="-".join(map(str, value)))
    return pytest.param(value, marks=needs_deepspeed, id=str(value))


ZERO_STAGES = with_deepspeed([f"zero{stage}" for stage in range(4)])


def make(strategy: str, **arguments: Any) -> Accelerator:
    """An Accelerator on the CPU under a strategy, or under a stage of ZeRO: `zero0` to `zero3`."""
    if strategy.startswith("zero"):
        plugin = arguments.pop("deepspeed_plugin", {})
        arguments["deepspeed_plugin"] = DeepSpeedPlugin(zero_stage=int(strategy[4:]), **plugin)
        strategy = "deepspeed"
    return Accelerator(cpu=True, strategy=strategy, **arguments)


def whole_gradients(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Every gradient by its name in the user's own module, whole on every rank."""
    strategy: Any = accelerator.strategy
    return {name: _whole(strategy, parameter) for name, parameter in strategy.named_parameters(model)}


def _whole(strategy: Any, parameter: nn.Parameter) -> Tensor:
    from torch.distributed.tensor import DTensor

    from paceline.checkpoint.parts import Part
    from tests.support.state import gather

    for bound in getattr(strategy, "_engines", ()):
        place = bound.partitions.place(parameter)
        if place is not None:
            run = bound.partitions.gradient(parameter)
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            return gather(Part(shape, place.start, place.flat.new_zeros(0) if run is None else run))
    gradient = parameter.grad
    assert gradient is not None
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
