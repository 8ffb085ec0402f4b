"""Activation checkpointing: keep a block's input, compute its inside again in the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

# What torch's wrapper puts into the names of its block's parameters.
_CHECKPOINT_PREFIX = "_checkpoint_wrapped_module."


def checkpoint_blocks(model: nn.Module, names: Iterable[str], *, offload: bool = False) -> None:
    """Checkpoint each named block in place; must come before the blocks are sharded.

    Names in a state dict stay as they were; those of `named_parameters` go through `plain_name`.

    Args:
        model: Whose blocks.
        names: Where the blocks stand in the model.
        offload: Keep each block's input in host memory.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

    for name in names:
        block = checkpoint_wrapper(model.get_submodule(name))
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, child, offload_wrapper(block) if offload else block)


def plain_name(name: str) -> str:
    """A parameter's name without the wrapper that checkpointing puts around its block."""
    return name.replace(_CHECKPOINT_PREFIX, "")
