"""Checks what a configuration says of a model against the model itself, built without memory for its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.errors import PrepareError, Problem

if TYPE_CHECKING:
    from paceline.config import Resolved

__all__ = ["check_blocks"]

_SETTING = "fsdp_config.fsdp_transformer_layer_cls_to_wrap"


def check_blocks(resolved: Resolved, name: str) -> tuple[list[Problem], str]:
    """Find the blocks into which FSDP would cut a model.

    Args:
        resolved: The configuration.
        name: `module:function`, or the folder or file of a transformers configuration.

    Returns:
        What is wrong, and the blocks in words.

    Raises:
        UsageError: There is no such model, or it cannot be built.
    """
    from paceline.cli.model_source import build_model
    from paceline.config import FullyShardedDataParallelPlugin
    from paceline.strategies.blocks import find_units

    plugin = resolved.config.fsdp_config or FullyShardedDataParallelPlugin()
    try:
        return [], str(find_units(build_model(name, "--model"), plugin))
    except PrepareError as error:
        where = resolved.origin(_SETTING).where
        return [Problem(where, _SETTING, error.saw, error.why, error.todo)], ""
