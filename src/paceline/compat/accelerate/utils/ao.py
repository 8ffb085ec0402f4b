"""torchao's 8-bit floats."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from paceline.errors import MissingExtraError

__all__ = ["convert_model_to_fp8_ao", "filter_first_and_last_linear_layers", "has_ao_layers"]


def has_ao_layers(model: nn.Module) -> bool:
    """Whether torchao has converted layers of a model."""
    return any(type(module).__name__ == "Float8Linear" for module in model.modules())


def filter_first_and_last_linear_layers(module: nn.Module, fqn: str) -> bool:
    """Whether a layer may be converted: not the first and not the last linear one of the model."""
    linear = [name for name, each in module.named_modules() if isinstance(each, nn.Linear)]
    return bool(linear) and fqn not in (linear[0], linear[-1])


def convert_model_to_fp8_ao(
    model: nn.Module, config: Any = None, module_filter_func: Callable[..., bool] | None = None
) -> None:
    """Convert the linear layers of a model, in place, but for the first and the last one.

    Args:
        model: The model; its parameters stay the same objects.
        config: A `Float8LinearConfig` of torchao; None is its default.
        module_filter_func: Called with a layer and its name; decides instead which layers are converted.

    Raises:
        MissingExtraError: torchao is not installed.
    """
    try:
        convert = import_module("torchao.float8").convert_to_float8_training
    except ImportError as error:
        raise MissingExtraError("torchao", "torchao", "mixed_precision='fp8'") from error
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept = {linear[0], linear[-1]} if linear else set()

    def is_converted(module: nn.Module, name: str) -> bool:
        # Products in 8 bits work on multiples of 16.
        sizes = (getattr(module, "in_features", 0), getattr(module, "out_features", 0))
        return isinstance(module, nn.Linear) and name not in kept and not any(size % 16 for size in sizes)

    convert(model, module_filter_fn=module_filter_func or is_converted, config=config)
