"""torch.compile, block by block where a model repeats itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.config import FullyShardedDataParallelPlugin
from paceline.strategies.blocks import find_units

if TYPE_CHECKING:
    from torch import nn

    from paceline.config import TorchDynamoPlugin


def compile_model(model: nn.Module, settings: TorchDynamoPlugin) -> None:
    """Compile `model` in place, or only its repeated blocks when regional compilation is asked for.

    In place means that the module, its class and its parameter names stay what they were.
    """
    if settings.backend == "no" or settings.disable:
        return
    for part in _parts(model, settings):
        part.compile(
            backend=settings.backend,
            # torch takes either a mode or options, never both.
            mode=settings.mode if settings.mode != "default" and not settings.options else None,
            fullgraph=settings.fullgraph,
            dynamic=settings.dynamic,
            options=settings.options or None,
        )


def _parts(model: nn.Module, settings: TorchDynamoPlugin) -> list[nn.Module]:
    if not settings.use_regional_compilation:
        return [model]
    blocks = find_units(model, FullyShardedDataParallelPlugin()).names
    return [model.get_submodule(name) for name in blocks] or [model]
