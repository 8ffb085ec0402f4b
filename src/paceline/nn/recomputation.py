"""Selective activation checkpointing: keeps what is dear to compute, and recomputes the rest in the backward."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["keep_products"]

_NAMES = (
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


def keep_products() -> Callable[[], Any]:
    """Return a `context_fn` of `torch.utils.checkpoint` that keeps the results of matrix products and attention.

    Returns:
        To be passed with `use_reentrant=False`.
    """
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return partial(create_selective_checkpoint_contexts, _operations())


@lru_cache(maxsize=1)
def _operations() -> list[Any]:
    found = (getattr(torch.ops.aten, name, None) for name in _NAMES)
    return [operation.default for operation in found if operation is not None]
