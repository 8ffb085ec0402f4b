"""Dropout that drops nothing: each rank draws its own masks, so that no two layouts would compute the same losses."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["watch_dropout"]

_DROPOUTS = (
    "alpha_dropout",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
)


def watch_dropout(on_dropout: Callable[[], None], *, keep: bool) -> None:
    """Make torch's dropout functions return their input, for the rest of this process.

    Args:
        on_dropout: Called when something is dropped, or would have been.
        keep: Let them drop.
    """
    for name in _DROPOUTS:
        setattr(F, name, _dropout(getattr(F, name), on_dropout, keep))
    F.scaled_dot_product_attention = _attention(F.scaled_dot_product_attention, on_dropout, keep)


def _dropout(function: Callable[..., Any], on_dropout: Callable[[], None], keep: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def drop(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:  # noqa: A002
        if training and p > 0:
            on_dropout()
        return function(input, p, training, inplace) if keep else input

    return drop


def _attention(function: Callable[..., Any], on_dropout: Callable[[], None], keep: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def attend(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *rest: Any, **named: Any
    ) -> Any:
        if dropout_p > 0:
            on_dropout()
        return function(query, key, value, attn_mask, dropout_p if keep else 0.0, *rest, **named)

    return attend
