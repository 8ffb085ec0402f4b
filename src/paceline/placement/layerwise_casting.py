"""Weights stored in a small dtype, and computed with in a larger one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from paceline.placement.hooks import ModelHook, add_hook_to_module, not_compiled

__all__ = ["CASTABLE_LAYERS", "LayerwiseCastingHook", "attach_layerwise_casting_hooks"]

CASTABLE_LAYERS: Final = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
"""The layers whose weights are cast: large products. Norms and embeddings keep their dtype."""


class LayerwiseCastingHook(ModelHook):
    """Casts a layer's weights for its forward, and back.

    Args:
        storage_dtype: The dtype between forwards.
        compute_dtype: The dtype for a forward.
        non_blocking: Return before the casts have ended.
    """

    def __init__(self, storage_dtype: torch.dtype, compute_dtype: torch.dtype, non_blocking: bool) -> None:
        self.storage_dtype = storage_dtype
        self.compute_dtype = compute_dtype
        self.non_blocking = non_blocking

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Cast the weights for storage."""
        return module.to(dtype=self.storage_dtype, non_blocking=self.non_blocking)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Leave the weights in the dtype of the computation, so that the layer runs without the hook."""
        return module.to(dtype=self.compute_dtype, non_blocking=self.non_blocking)

    @not_compiled
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cast the weights for the forward."""
        module.to(dtype=self.compute_dtype, non_blocking=self.non_blocking)
        return args, kwargs

    @not_compiled
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Cast the weights back."""
        module.to(dtype=self.storage_dtype, non_blocking=self.non_blocking)
        return output


def attach_layerwise_casting_hooks(
    module: nn.Module,
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skip_modules_pattern: str | Sequence[str] | None = None,
    skip_modules_classes: tuple[type[nn.Module], ...] | None = None,
    non_blocking: bool = False,
) -> None:
    """Store the weights of a model's linear and convolution layers in one dtype, and compute in another.

    Args:
        module: The model.
        storage_dtype: The dtype between forwards, such as `torch.float8_e4m3fn`.
        compute_dtype: The dtype for a forward.
        skip_modules_pattern: Regular expressions of names: modules that match, and those inside them, are left as they
            are.
        skip_modules_classes: Classes of modules that are left as they are.
        non_blocking: Return before the casts have ended.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from paceline.placement import attach_layerwise_casting_hooks
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> attach_layerwise_casting_hooks(model, torch.float8_e4m3fn, torch.bfloat16)
        >>> model[0].weight.dtype, model[1].weight.dtype
        (torch.float8_e4m3fn, torch.float32)
    """
    patterns = [skip_modules_pattern] if isinstance(skip_modules_pattern, str) else skip_modules_pattern or ()
    _attach(
        module, "", LayerwiseCastingHook(storage_dtype, compute_dtype, non_blocking), patterns, skip_modules_classes
    )


def _attach(
    module: nn.Module,
    name: str,
    hook: LayerwiseCastingHook,
    patterns: Sequence[str],
    classes: tuple[type[nn.Module], ...] | None,
) -> None:
    if isinstance(module, classes or ()) or any(re.search(pattern, name) for pattern in patterns):
        return
    if isinstance(module, CASTABLE_LAYERS):
        add_hook_to_module(module, hook, append=True)
        return
    for child_name, child in module.named_children():
        _attach(child, f"{name}.{child_name}" if name else child_name, hook, patterns, classes)
