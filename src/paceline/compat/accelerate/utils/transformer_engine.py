"""Names of Transformer Engine, which paceline does not drive: torchao computes in 8-bit floats."""

from __future__ import annotations

from typing import Any

from torch import nn

from paceline.compat.accelerate.settings.errors import unsupported

__all__ = ["apply_fp8_autowrap", "contextual_fp8_autocast", "convert_model", "has_transformer_engine_layers"]

_WHY = "paceline does not drive Transformer Engine"
_TODO = "Pass mixed_precision='fp8', which torchao computes"


def has_transformer_engine_layers(model: nn.Module) -> bool:
    """Whether a model has layers of Transformer Engine."""
    return any(type(module).__module__.partition(".")[0] == "transformer_engine" for module in model.modules())


@unsupported(_WHY, _TODO)
def convert_model(
    model: nn.Module, to_transformer_engine: bool = True, _convert_linear: bool = True, _convert_ln: bool = True
) -> Any:
    """Replace a model's linear and normalization layers, or those of Transformer Engine by torch's."""


@unsupported(_WHY, _TODO)
def contextual_fp8_autocast(model_forward: Any, fp8_recipe: Any, use_during_eval: bool = False) -> Any:
    """Wrap a forward in Transformer Engine's autocast."""


@unsupported(_WHY, _TODO)
def apply_fp8_autowrap(model: nn.Module, fp8_recipe_handler: Any) -> Any:
    """Convert a model and wrap its forward."""
