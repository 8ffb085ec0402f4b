"""The order of training samples, where it is neither as stored nor shuffled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["LengthGroupedSampler", "lengths_of"]

_STRETCH = 50


class LengthGroupedSampler(Sampler[int]):
    """Random batches of samples that are about as long: shuffled, cut into stretches, each sorted by length.

    The longest sample comes first, so that a batch that does not fit in memory shows at once.

    Args:
        lengths: Of every sample.
        batch_size: Samples of a global batch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int) -> None:
        self._lengths = torch.as_tensor(list(lengths))
        self._stretch = max(1, batch_size) * max(1, min(_STRETCH, len(lengths) // (batch_size * 4)))
        # The prepared loader sets its state from (seed, epoch) before every pass.
        self.generator = torch.Generator()

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self), generator=self.generator)
        parts = torch.split(order, self._stretch)
        sorted_ = [part[self._lengths[part].argsort(descending=True, stable=True)] for part in parts]
        longest = max(range(len(sorted_)), key=lambda index: int(self._lengths[sorted_[index][0]]))
        head = sorted_[longest]
        sorted_[0][0], head[0] = head[0].clone(), sorted_[0][0].clone()
        yield from torch.cat(sorted_).tolist()


def lengths_of(dataset: Any, column: str, input_name: str) -> list[int]:
    """How long each sample is: what a column says, else the length of the inputs.

    Raises:
        DataError: Samples say neither.
    """
    names = getattr(dataset, "column_names", None)
    if isinstance(names, list) and column in names:
        return list(dataset[column])
    first = dataset[0]
    if isinstance(first, dict) and column in first:
        return [int(dataset[index][column]) for index in range(len(dataset))]
    if isinstance(first, dict) and input_name in first:
        return [len(dataset[index][input_name]) for index in range(len(dataset))]
    raise DataError(
        "train_sampling_strategy='group_by_length' was asked for",
        f"Samples have neither {column!r} nor {input_name!r}",
        "Add a column of lengths and name it in length_column_name",
    )
