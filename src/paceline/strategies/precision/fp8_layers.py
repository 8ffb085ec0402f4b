"""Recognises layers and weights that were converted to fp8, and converts them back; needs no torchao."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ORIGINAL", "has_layers", "plain_local", "restore_layers"]

# Where a converted layer's own class, and the names of the attributes that were added, are kept.
ORIGINAL = "_paceline_before_fp8"


def restore_layers(model: nn.Module) -> None:
    """Give layers that were converted before their own class back."""
    for layer in model.modules():
        kept = vars(layer).pop(ORIGINAL, None)
        if kept is not None:
            cls, added = kept
            layer.__class__ = cls
            for name in added:
                vars(layer).pop(name, None)


def has_layers(model: nn.Module) -> bool:
    """Whether layers of the model multiply in fp8."""
    return any(ORIGINAL in vars(layer) for layer in model.modules())


def plain_local(tensor: Tensor) -> Tensor:
    """The tensor of master weights inside what FSDP2 gathers in fp8; any other tensor itself."""
    module = sys.modules.get("torchao.float8.fsdp_utils")
    if module is not None and isinstance(tensor, module.WeightWithDynamicFloat8CastTensor):
        wrapped: Any = tensor
        inner: Tensor = wrapped._tensor.detach()
        return inner
    return tensor
