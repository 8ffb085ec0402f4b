"""bitsandbytes' layers of 4 and 8 bits."""

from __future__ import annotations

from typing import Any

from torch import nn

from paceline.compat.accelerate.settings.errors import unsupported

__all__ = ["has_4bit_bnb_layers", "load_and_quantize_model"]


def has_4bit_bnb_layers(model: nn.Module) -> bool:
    """Whether a model has layers of 4 bits."""
    return any(type(module).__name__ == "Linear4bit" for module in model.modules())


@unsupported("Quantized loading is not supported through the switch", "Use transformers' own BitsAndBytesConfig")
def load_and_quantize_model(
    model: nn.Module,
    bnb_quantization_config: Any,
    weights_location: Any = None,
    device_map: Any = None,
    no_split_module_classes: Any = None,
    max_memory: Any = None,
    offload_folder: Any = None,
    offload_state_dict: bool = False,
) -> Any:
    """Load a model in 4 or 8 bits."""
