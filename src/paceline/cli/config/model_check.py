"""Checks what a configuration says of a model against the model itself, built without memory for its weights."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import PrepareError, Problem, UsageError

if TYPE_CHECKING:
    from torch import nn

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
    from paceline.config import FullyShardedDataParallelPlugin
    from paceline.strategies.blocks import find_units

    plugin = resolved.config.fsdp_config or FullyShardedDataParallelPlugin()
    try:
        return [], str(find_units(_build(name), plugin))
    except PrepareError as error:
        where = resolved.origin(_SETTING).where
        return [Problem(where, _SETTING, error.saw, error.why, error.todo)], ""


def _build(name: str) -> nn.Module:
    """Build the model on the meta device."""
    import torch
    from torch import nn

    make = _transformers_model if Path(name).exists() else _own_model
    try:
        with torch.device("meta"):
            model = make(name)
    except UsageError:
        raise
    except Exception as error:
        hint = "Name a function without arguments that returns the model"
        raise UsageError(f"--model {name} failed: {type(error).__name__}: {error}", "", hint) from error
    if not isinstance(model, nn.Module):
        why = "It must be a torch.nn.Module, or a function without arguments that returns one"
        raise UsageError(f"--model {name} is a {type(model).__name__}", why, "Name the function that builds the model")
    return model


def _own_model(name: str) -> Any:
    module_name, separator, attribute = name.partition(":")
    if not separator:
        why = "It is neither module:function nor a file or folder"
        raise UsageError(f"--model {name} cannot be found", why, "Write, for example, my_package.models:build_model")
    sys.path.insert(0, str(Path.cwd()))
    found: Any = import_module(module_name)
    for part in attribute.split("."):
        found = getattr(found, part)
    if (callable(found) and not hasattr(found, "named_modules")) or isinstance(found, type):
        return found()
    return found


def _transformers_model(path: str) -> Any:
    from transformers import AutoConfig, AutoModel

    make: Any = AutoModel.from_config
    return make(AutoConfig.from_pretrained(path))
