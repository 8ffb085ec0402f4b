"""torchao's 8-bit floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from paceline.compat.accelerate.settings.errors import unsupported

__all__ = ["convert_model_to_fp8_ao", "filter_first_and_last_linear_layers", "has_ao_layers"]


def has_ao_layers(model: nn.Module) -> bool:
    """Whether torchao has converted layers of a model."""
    return any(type(module).__name__ == "Float8Linear" for module in model.modules())


def filter_first_and_last_linear_layers(module: nn.Module, fqn: str) -> bool:
    """Whether a layer may be converted: not the first and not the last linear one of the model."""
    linear = [name for name, each in module.named_modules() if isinstance(each, nn.Linear)]
    return bool(linear) and fqn not in (linear[0], linear[-1])


@unsupported("paceline does not compute in 8-bit floats yet", "Use mixed_precision='bf16'")
def convert_model_to_fp8_ao(
    model: nn.Module, config: Any = None, module_filter_func: Callable[..., bool] | None = None
) -> Any:
    """Convert the linear layers of a model."""
