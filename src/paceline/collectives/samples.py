"""Gathering what belongs to samples: one entry per real sample, whatever was padded to share them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.collectives.agreement import check_agreement
from paceline.collectives.nested import map_leaves, send_to_device, tensors
from paceline.collectives.packing import all_gather_many
from paceline.errors import CollectiveError, named_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.collectives.group import Group

__all__ = ["BatchCounts", "gather_samples"]


@dataclass(frozen=True)
class BatchCounts:
    """How many samples of the current batch each rank has.

    Attributes:
        rows: Per rank, the rows of its batch.
        real: Per rank, how many of those are samples; the rest, at the end, is padding.
        counted: Whether these are samples. If not, nobody knows how many samples a batch holds, since the loader
            collates by itself: the units are whole batches, 1 of `rows` everywhere, and 1 of `real` for a batch of
            the rank's own, 0 for one that only fills its place.
    """

    rows: tuple[int, ...]
    real: tuple[int, ...]
    counted: bool = True

    def __post_init__(self) -> None:
        fits = len(self.rows) == len(self.real) and all(
            0 <= real <= rows for rows, real in zip(self.rows, self.real, strict=True)
        )
        if not fits:
            raise CollectiveError(
                f"Batches with {self.rows} rows were said to hold {self.real} samples",
                "Each rank has from 0 to as many samples as rows",
                "Give one number per rank in both, the second no larger than the first",
            )


def gather_samples(
    group: Group,
    data: Any,
    counts: BatchCounts | None,
    use_gather_object: bool = False,
    *,
    debug: bool = False,
) -> Any:
    """Gather what was computed on the current batch, once per sample, in rank order.

    The structure stays; of its parts

    - a tensor with as many rows as this rank's batch, [rows, ...], holds one row per sample: the result has
      the rows of all real samples, the padding is gone. Ranks may have different numbers of rows. In a batch
      of one row a tensor of shape [1] counts as that. A NumPy array is treated alike.
    - any other tensor is a value of the rank: the tensors of all ranks, of equal shape, concatenated along
      dimension 0, nothing left out. One without dimensions becomes [size].
    - a list of anything but tensors, or the tuple of strings that torch's collate makes, is concatenated;
      if it has one entry per row, without the padding.
    - any other object becomes a list with one entry per rank.

    Collective: every rank must call it.

    Args:
        group: The ranks.
        data: Tensors and objects, nested.
        counts: Of the batch in use; None if there is none, then nothing is left out.
        use_gather_object: Pickle the tensors too, as their shapes may differ: lists are concatenated,
            and other tensors become lists with one entry per rank, without the rows of padding. They arrive
            in host memory.
        debug: Compare over the ranks first.

    Raises:
        CollectiveError: The counts are for another number of ranks, or a tensor that has not one row per
            sample differs in size; with `debug`, also when the ranks differ in anything else.
    """
    if counts is not None and len(counts.rows) != group.size:
        raise CollectiveError(
            f"Counts for {len(counts.rows)} ranks were given to a group of {group.size}",
            "Each rank needs its own",
            "Gather over the group that the loader shares its data out to",
        )
    gathering = _SampleGather(group, counts, pickle_tensors=use_gather_object)
    if debug:
        check_agreement(group, "gather_samples", gathering.comparable(data), gathering.free_dim)
    return gathering.run(data)


class _SampleGather:
    """One call of `gather_samples`: collects the parts, exchanges them, puts the results in their places."""

    def __init__(self, group: Group, counts: BatchCounts | None, *, pickle_tensors: bool) -> None:
        self.group = group
        self.counts = counts
        self.rows = None if counts is None else counts.rows[group.rank]
        self.pickle_tensors = pickle_tensors

    def run(self, data: Any) -> Any:
        parts: list[Any] = []
        map_leaves(parts.append, data, self._is_entries)
        travelling = [part for part in parts if self._travels_as_tensor(part)]
        objects = [part for part in parts if not self._travels_as_tensor(part)]
        tensors_back = iter(self._gather_tensors(travelling))
        objects_back = iter(self._gather_objects(objects))

        def place(part: Any) -> Any:
            return next(tensors_back if self._travels_as_tensor(part) else objects_back)

        return map_leaves(place, data, self._is_entries)

    def comparable(self, data: Any) -> Any:
        """Return the structure without what may differ between ranks: entries and pickled tensors."""
        may_differ = (list, tuple, torch.Tensor)
        return map_leaves(
            lambda part: None if isinstance(part, may_differ) and not self._travels_as_tensor(part) else part,
            data,
            self._is_entries,
        )

    def free_dim(self, tensor: torch.Tensor) -> int | None:
        """Return 0 for a tensor with a row per sample, whose number of rows may differ between ranks."""
        return 0 if tensor.dim() and tensor.shape[0] == self.rows else None

    def _travels_as_tensor(self, part: Any) -> bool:
        return isinstance(part, torch.Tensor) and not self.pickle_tensors

    def _is_entries(self, value: Any) -> bool:
        """Say whether a container is a list of entries, rather than structure."""
        if isinstance(value, list):
            return self.pickle_tensors or not any(map(_holds_tensors, value))
        collated = type(value) is tuple and len(value) == self.rows
        return collated and all(isinstance(entry, str | bytes) for entry in value)

    def _gather_objects(self, objects: list[Any]) -> Iterator[Any]:
        if not objects:
            return
        portable = objects if self.group.device.type == "cpu" else send_to_device(objects, "cpu")
        by_rank = self.group.all_gather_object(portable)
        for index, own in enumerate(objects):
            column = [values[index] for values in by_rank]
            per_sample = self._one_per_row(column)
            if per_sample and self.counts is not None:
                column = [value[:real] for value, real in zip(column, self.counts.real, strict=True)]
            if isinstance(own, list | tuple):
                yield type(own)(entry for entries in column for entry in entries)
            else:
                yield np.concatenate(column) if per_sample and isinstance(own, np.ndarray) else column

    def _one_per_row(self, column: list[Any]) -> bool:
        """Say whether every rank brought one entry per row of its batch."""
        return self.counts is not None and tuple(map(_num_entries, column)) == self.counts.rows

    def _gather_tensors(self, values: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Gather row by row what has a row per sample, and whole what has not."""
        if not values:
            return
        values = [value.detach() for value in values]
        per_sample = self._which_per_sample(values)
        sent = [self._to_send(v) if sampled else v for v, sampled in zip(values, per_sample, strict=True)]
        gathered = [value.unsqueeze(0) for value in sent] if self.group.size == 1 else all_gather_many(self.group, sent)
        for value, sampled in zip(gathered, per_sample, strict=True):
            yield self._real_rows(value) if sampled else _whole(value)

    def _which_per_sample(self, values: list[torch.Tensor]) -> list[bool]:
        """Say which tensors have one row per sample; every rank comes to the same answer."""
        if self.counts is None:
            return [False] * len(values)
        own = [value.shape[0] if value.dim() else -1 for value in values]
        if len(set(self.counts.rows)) == 1:
            return [size == self.rows for size in own]
        # Where the numbers of rows differ, a value of fixed size may look like rows on one rank only.
        sizes = self.group.all_gather(torch.tensor(own)).T.tolist()
        per_sample = [tuple(column) == self.counts.rows for column in sizes]
        for column, sampled in zip(sizes, per_sample, strict=True):
            if not sampled and len(set(column)) > 1:
                raise _neither(column, self.counts.rows)
        return per_sample

    def _to_send(self, value: torch.Tensor) -> torch.Tensor:
        """Cut or pad to the largest number of real samples, which is what all ranks send."""
        assert self.counts is not None
        most = max(self.counts.real)
        if value.shape[0] >= most:
            return value[:most]
        return torch.cat([value, value.new_zeros((most - value.shape[0], *value.shape[1:]))])

    def _real_rows(self, gathered: torch.Tensor) -> torch.Tensor:
        assert self.counts is not None
        if len(set(self.counts.real)) == 1:
            return gathered.contiguous().flatten(0, 1)
        return torch.cat([block[:real] for block, real in zip(gathered, self.counts.real, strict=True)])


def _holds_tensors(value: Any) -> bool:
    """Say whether a list entry makes the list structure: a tensor, or a sequence of tensors.

    A mapping does not: a list of those is how the targets of single samples come.
    """
    if isinstance(value, torch.Tensor):
        return True
    return isinstance(value, list | tuple) and next(tensors(value), None) is not None


def _num_entries(value: Any) -> int:
    """Count the rows or entries of what may have one per sample; -1 for anything else."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return int(value.shape[0]) if value.ndim else -1
    return len(value) if isinstance(value, list | tuple) else -1


def _whole(gathered: torch.Tensor) -> torch.Tensor:
    return gathered.contiguous().flatten(0, 1) if gathered.dim() > 1 else gathered.contiguous()


def _neither(sizes: list[int], rows: tuple[int, ...]) -> CollectiveError:
    odd = [rank for rank, size in enumerate(sizes) if size != rows[rank]]
    return CollectiveError(
        f"A tensor has {sizes} rows on the ranks, whose batches have {list(rows)} "
        f"({named_ranks(odd, 'differs', 'differ')})",
        "It is neither one row per sample nor a value of equal shape on every rank",
        "Gather tensors computed from the batch in use, or pad with pad_across_processes first",
    )
