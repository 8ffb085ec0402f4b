"""Rows of batches that were read: how many there are, and completing a batch to more."""

from __future__ import annotations

from typing import Any

import torch

from paceline.collectives.nested import maybe_children, rebuild, tensors

__all__ = ["complete", "num_rows"]


def num_rows(batch: Any) -> int:
    """Return how many samples a batch holds.

    That is dimension 0 of the first tensor that has one, else the length of a list or tuple, else 1.
    """
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() else 1
    for tensor in tensors(batch):
        if tensor.dim():
            return tensor.shape[0]
    return len(batch) if isinstance(batch, list | tuple) else 1


def complete(batch: Any, rows: int, wanted: int) -> Any:
    """Repeat a batch's own `rows` samples, from its first, until there are `wanted`.

    Its own samples always fit together: other batches may be padded to other lengths. Tensors are completed
    along dimension 0, lists and tuples of `rows` plain values too; everything else stays as it is.
    """
    if isinstance(batch, torch.Tensor):
        if not batch.dim() or batch.shape[0] != rows:
            return batch
        return batch[torch.arange(wanted, device=batch.device) % rows]
    children = maybe_children(batch)
    if children is None:
        return batch
    values = [value for _, value in children]
    if type(batch) in (list, tuple) and len(values) == rows and all(map(_is_plain, values)):
        return type(batch)(values[index % rows] for index in range(wanted))
    return rebuild(batch, [complete(value, rows, wanted) for value in values])


def _is_plain(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) and maybe_children(value) is None
