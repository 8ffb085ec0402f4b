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


def with_deepspeed(values: list[Any], *, every_stage: bool = False) -> list[Any]:
    """Parameters of a test that are skipped, visibly, where DeepSpeed is not installed.

    Stage 0 shares its code with DDP and stage 1 with stage 2: these run under `make test-slow`, unless `every_stage`.
    """
    return [_with_deepspeed(value, every_stage) for value in values]


def slowly(values: list[Any]) -> list[Any]:
    """Parameters of a test that run under `make test-slow` only: others cover the same code in a shorter time."""
    return [_slowly(value) for value in values]


def _slowly(value: Any) -> Any:
    if hasattr(value, "marks"):
        return pytest.param(*value.values, marks=[*value.marks, pytest.mark.slow], id=value.id)
    several = value if isinstance(value, tuple) else (value,)
    return pytest.param(*several, marks=pytest.mark.slow, id="-".join(map(str, several)))


def _with_deepspeed(value: Any, every_stage: bool) -> Any:
    several = value if isinstance(value, tuple) else (value,)
    name = "-".join(map(str, several))
    rare = name.startswith(("zero0", "zero1")) and not every_stage
    return pytest.param(*several, marks=[needs_deepspeed, pytest.mark.slow] if rare else [needs_deepspeed], id=name)


ZERO_STAGES = with_deepspeed([f"zero{stage}" for stage in range(4)])


def make(strategy: str, **arguments: Any) -> Accelerator:
    """An Accelerator, on the CPU if nothing else is said, under a strategy or a stage of ZeRO: `zero0` to `zero3`."""
    if strategy.startswith("zero"):
        plugin = arguments.pop("deepspeed_plugin", {})
        arguments["deepspeed_plugin"] = DeepSpeedPlugin(zero_stage=int(strategy[4:]), **plugin)
        strategy = "deepspeed"
    return Accelerator(strategy=strategy, **{"cpu": True, **arguments})


def whole_gradients(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Every gradient by its name in the user's own module, whole on every rank."""
    strategy: Any = accelerator.strategy
    return {name: _whole(strategy, parameter) for name, parameter in strategy.named_parameters(model)}


def _whole(strategy: Any, parameter: nn.Parameter) -> Tensor:
    from torch.distributed.tensor import DTensor

    from paceline.checkpoint.format.shards import TensorShard
    from tests.support.state import gather

    for zero in getattr(strategy, "engines", ()):
        slice_of = zero.partitions.slice_of(parameter)
        if slice_of is not None:
            shard = zero.partitions.gradient(parameter)
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            return gather(TensorShard(shape, slice_of.start, slice_of.flat.new_zeros(0) if shard is None else shard))
    gradient = parameter.grad
    assert gradient is not None
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
