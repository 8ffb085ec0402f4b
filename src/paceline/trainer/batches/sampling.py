"""The order of training samples, where it is neither as stored nor shuffled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from paceline.environment.logging import get_logger
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LengthGroupedSampler", "lengths_of"]

logger = get_logger(__name__)

_STRETCH = 50
_ASKED = "train_sampling_strategy='group_by_length' was asked for"
_REMEDY = "Add a column of lengths"


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

    Inputs of shape [1, L], as tokenizers return them with `return_tensors`, are L long.

    Raises:
        DataError: Samples say neither, or the column holds no numbers.
    """
    names = getattr(dataset, "column_names", None)
    first = dataset[0]
    if isinstance(names, list) and column in names:
        lengths = [_number(value, column) for value in dataset[column]]
    elif isinstance(first, Mapping) and column in first:
        lengths = [_number(dataset[index][column], column) for index in range(len(dataset))]
    elif isinstance(first, Mapping) and input_name in first:
        sizes = [_sizes(dataset[index][input_name], input_name) for index in range(len(dataset))]
        # A sample of size 1 among longer ones is a short one.
        axis = min(map(len, sizes)) - 1
        lengths = [size[axis] for size in sizes]
    else:
        raise DataError(
            _ASKED,
            f"Samples have neither {column!r} nor {input_name!r}",
            f"{_REMEDY} and name it in length_column_name",
        )
    if len(lengths) > 1 and len(set(lengths)) == 1:
        logger.warning(
            "%s, and all %d samples are %d long, so that it groups nothing. Leave it out, or, if they were padded, add "
            "a column of the lengths before that", _ASKED, len(lengths), lengths[0],
        )  # fmt: skip
    return lengths


def _sizes(inputs: Any, name: str) -> list[int]:
    """The size of each dimension of one sample's inputs, up to the first that is larger than 1."""
    found: list[int] = []
    while hasattr(inputs, "__len__") and _has_dimensions(inputs):
        found.append(len(inputs))
        if found[-1] != 1:
            break
        inputs = inputs[0]
    if not found:
        raise DataError(f"{_ASKED}, and {name} of a sample is {inputs!r:.60}", "It has no length", _REMEDY)
    return found


def _has_dimensions(value: Any) -> bool:
    return not isinstance(value, str | bytes) and getattr(value, "ndim", 1) > 0


def _number(value: Any, column: str) -> int:
    """What a column says of one sample; [7] and a tensor of one number are that number."""
    while isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0]
    try:
        return int(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{_ASKED}, and {column} of a sample is {value!r:.60}", "A length is one number", f"{_REMEDY}, one each"
        ) from error
