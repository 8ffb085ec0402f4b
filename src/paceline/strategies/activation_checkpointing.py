"""Activation checkpointing: a block keeps only its input and is recomputed in the backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

# torch's wrapper adds this to the names of its block's parameters.
_CHECKPOINT_PREFIX = "_checkpoint_wrapped_module."


def checkpoint_blocks(
    model: nn.Module, names: Iterable[str], *, offload: bool = False, keeps_products: bool = False
) -> None:
    """Checkpoint the activations of each named block in place, before the blocks are sharded.

    Names in the state dict stay the same; `plain_name` restores those of `named_parameters`.

    Args:
        model: Contains the blocks.
        names: The blocks' names in the model.
        offload: Whether to keep each block's input in host memory.
        keeps_products: Whether to keep the results of matrix products and attention, too.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

    from paceline.nn.recomputation import keep_products

    more: dict[str, Any] = {"context_fn": keep_products()} if keeps_products else {}
    for name in names:
        block = checkpoint_wrapper(model.get_submodule(name), **more)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, offload_wrapper(block) if offload else block)


def plain_name(name: str) -> str:
    """A parameter's name without the wrapper that checkpointing puts around its block."""
    return name.replace(_CHECKPOINT_PREFIX, "")
