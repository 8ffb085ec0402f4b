"""Sampling of training samples by length."""

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

# Micro-batches in a chunk that is sorted by length; more would make the order less random.
_BATCHES_PER_CHUNK = 50
_SETTING = "train_sampling_strategy='group_by_length'"
_REMEDY = "Add a column of lengths"


class LengthGroupedSampler(Sampler[int]):
    """Random batches of samples of similar length: shuffled, split into chunks, each sorted by length.

    The longest sample comes first, so that a batch that does not fit into memory fails at once.

    Args:
        lengths: The length of each sample.
        batch_size: Samples of a global batch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int) -> None:
        self._lengths = torch.as_tensor(list(lengths))
        self._chunk = max(1, batch_size) * max(1, min(_BATCHES_PER_CHUNK, len(lengths) // (batch_size * 4)))
        # The prepared loader seeds it from (seed, epoch) before every epoch.
        self.generator = torch.Generator()

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self), generator=self.generator)
        shuffled = torch.split(order, self._chunk)
        chunks = [chunk[self._lengths[chunk].argsort(descending=True, stable=True)] for chunk in shuffled]
        longest = max(chunks, key=lambda chunk: int(self._lengths[chunk[0]]))
        chunks[0][0], longest[0] = longest[0].clone(), chunks[0][0].clone()
        yield from torch.cat(chunks).tolist()


def lengths_of(dataset: Any, column: str, input_name: str, *, setting: str = _SETTING) -> list[int]:
    """The length of each sample: the value of a column, else the length of the inputs.

    Inputs of shape [1, L], which tokenizers return with `return_tensors`, have length L.

    Args:
        dataset: Map-style.
        column: The column, which need not exist.
        input_name: The column of the inputs.
        setting: What needs the lengths, for errors.

    Raises:
        DataError: Samples have neither, or the column does not contain numbers.
    """
    first = dataset[0]
    if _has_column(dataset, column):
        lengths = [_number(value, column, setting) for value in dataset[column]]
    elif isinstance(first, Mapping) and column in first:
        lengths = [_number(dataset[index][column], column, setting) for index in range(len(dataset))]
    elif isinstance(first, Mapping) and input_name in first:
        sizes = [_sizes(dataset[index][input_name], input_name, setting) for index in range(len(dataset))]
        # If some samples have size 1 in this dimension and others more, it is the length of all of them.
        dim = min(map(len, sizes)) - 1
        lengths = [size[dim] for size in sizes]
    else:
        raise DataError(
            setting,
            f"Samples have neither {column!r} nor {input_name!r}",
            f"{_REMEDY} and name it in length_column_name",
        )
    if setting == _SETTING:
        _warn_if_all_alike(lengths)
    return lengths


def _has_column(dataset: Any, column: str) -> bool:
    names = getattr(dataset, "column_names", None)
    return isinstance(names, list) and column in names


def _warn_if_all_alike(lengths: list[int]) -> None:
    if len(lengths) > 1 and len(set(lengths)) == 1:
        logger.warning(
            "%s has no effect: all %d samples have length %d. Leave it out or, if they were padded, add a column with "
            "the lengths before padding.", _SETTING, len(lengths), lengths[0],
        )  # fmt: skip


def _sizes(inputs: Any, name: str, setting: str) -> list[int]:
    """The sizes of the dimensions of one sample's inputs, up to the first that is not 1."""
    sizes: list[int] = []
    while hasattr(inputs, "__len__") and _has_dimensions(inputs):
        sizes.append(len(inputs))
        if sizes[-1] != 1:
            break
        inputs = inputs[0]
    if not sizes:
        raise DataError(f"{setting}, and {name} of a sample is {inputs!r:.60}", "It has no length", _REMEDY)
    return sizes


def _has_dimensions(value: Any) -> bool:
    return not isinstance(value, str | bytes) and getattr(value, "ndim", 1) > 0


def _number(value: Any, column: str, setting: str) -> int:
    """The length in a column, which may be wrapped in a list or a tensor."""
    while isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0]
    try:
        return int(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{setting}, and {column} of a sample is {value!r:.60}", "A length is one number", f"{_REMEDY}, one each"
        ) from error
