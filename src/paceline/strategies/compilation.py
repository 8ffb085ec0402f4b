"""torch.compile for a whole model or for its repeated blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.config import FullyShardedDataParallelPlugin
from paceline.strategies.blocks import find_units

if TYPE_CHECKING:
    from torch import nn

    from paceline.config import TorchDynamoPlugin


def compile_model(model: nn.Module, settings: TorchDynamoPlugin) -> None:
    """Compile `model` in place, or only its repeated blocks if regional compilation is enabled.

    The module, its class and its parameter names stay the same.
    """
    if settings.backend == "no" or settings.disable:
        return
    for module in _modules_to_compile(model, settings):
        module.compile(
            backend=settings.backend,
            # torch accepts either a mode or options, not both.
            mode=settings.mode if settings.mode != "default" and not settings.options else None,
            fullgraph=settings.fullgraph,
            dynamic=settings.dynamic,
            options=settings.options or None,
        )


def _modules_to_compile(model: nn.Module, settings: TorchDynamoPlugin) -> list[nn.Module]:
    if not settings.use_regional_compilation:
        return [model]
    blocks = find_units(model, FullyShardedDataParallelPlugin()).names
    return [model.get_submodule(name) for name in blocks] or [model]
