"""Activation checkpointing: a block keeps only its input and is recomputed in the backward; products may be kept."""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn

# torch's wrapper adds this to the names of its block's parameters.
_CHECKPOINT_PREFIX = "_checkpoint_wrapped_module."
# What is dear to compute: matrix products and attention.
_KEPT_OPERATIONS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_mm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_attention_math",
)


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

    more: dict[str, Any] = {"context_fn": keep_products()} if keeps_products else {}
    for name in names:
        block = checkpoint_wrapper(model.get_submodule(name), **more)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, offload_wrapper(block) if offload else block)


def plain_name(name: str) -> str:
    """A parameter's name without the wrapper that checkpointing puts around its block."""
    return name.replace(_CHECKPOINT_PREFIX, "")


def keep_products() -> Callable[[], Any]:
    """Return a `context_fn` of `torch.utils.checkpoint` that keeps the results of matrix products and attention.

    Returns:
        To be passed with `use_reentrant=False`.
    """
    return _contexts_that_keep_products


def _contexts_that_keep_products() -> tuple[Any, Any]:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    forward, recomputation = create_selective_checkpoint_contexts(_operations_to_keep())  # type: ignore[no-untyped-call]
    if functional.linear is torch._C._nn.linear:
        return forward, recomputation
    return _with_torchs_linear(forward), _with_torchs_linear(recomputation)


@contextmanager
def _with_torchs_linear(context: Any) -> Iterator[None]:
    """Use torch's own linear layer within a context.

    DeepSpeed's ZeRO-3 leaves its own function in its place for the rest of the process, whose gradients are wrong here.
    """
    replaced = functional.linear
    functional.linear = torch._C._nn.linear
    try:
        with context:
            yield
    finally:
        functional.linear = replaced


@lru_cache(maxsize=1)
def _operations_to_keep() -> list[Any]:
    found = (getattr(torch.ops.aten, name, None) for name in _KEPT_OPERATIONS)
    return [operation.default for operation in found if operation is not None]
