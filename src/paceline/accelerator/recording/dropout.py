"""Dropout that drops nothing: what it drops is drawn by each rank for itself, so that no two layouts agree on it."""

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


def watch_dropout(found: Callable[[], None], *, keep: bool) -> None:
    """Make torch's dropout functions hand back what they get, for the rest of this process.

    Args:
        found: Called when something is dropped, or would have been.
        keep: Only watch.
    """
    for name in _DROPOUTS:
        setattr(F, name, _dropout(getattr(F, name), found, keep))
    F.scaled_dot_product_attention = _attention(F.scaled_dot_product_attention, found, keep)


def _dropout(function: Callable[..., Any], found: Callable[[], None], keep: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def drop(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:  # noqa: A002
        if training and p > 0:
            found()
        return function(input, p, training, inplace) if keep else input

    return drop


def _attention(function: Callable[..., Any], found: Callable[[], None], keep: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def attend(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *rest: Any, **named: Any
    ) -> Any:
        if dropout_p > 0:
            found()
        return function(query, key, value, attn_mask, dropout_p if keep else 0.0, *rest, **named)

    return attend
