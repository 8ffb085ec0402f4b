"""Gathers per-sample results from all ranks and drops what belongs to padding."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.collectives.agreement import check_agreement
from paceline.collectives.coalescing import all_gather_coalesced, check_dense
from paceline.collectives.nested import (
    common_order,
    in_own_order,
    leaves,
    map_leaves,
    maybe_children,
    path_text,
    send_to_device,
)
from paceline.collectives.per_sample import (
    SampleEvidence,
    is_ambiguous,
    is_entry_list,
    is_uniform_tensor_tuple,
    maybe_per_sample,
)
from paceline.errors import CollectiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from paceline.collectives.group import Group
    from paceline.collectives.nested import Path

__all__ = ["BatchCounts", "gather_samples"]


@dataclass(frozen=True)
class BatchCounts:
    """How many samples of the current batch each rank has.

    Attributes:
        rows: Per rank, the samples in its batch.
        real: Per rank, how many of those are its own; the rest, at the end, is padding.
        counted: Whether samples were counted, before they were collated. The batches of a loader that makes them itself
            are counted whole: `rows` is 1 for a rank that has a batch, and `real` is 0 where that batch is padding.
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
                f"BatchCounts got rows={self.rows} and real={self.real}",
                "Each rank can have from 0 to as many samples of its own as its batch has rows",
                "Pass one number per rank in both, the second no larger than the first",
            )


def gather_samples(
    group: Group,
    data: Any,
    counts: BatchCounts | None,
    use_gather_object: bool = False,
    *,
    pad_index: float | None = None,
    debug: bool = False,
) -> Any:
    """Gather what was computed on the current batch, once per sample, in rank order.

    The number of samples in each rank's batch decides what is left out. A rank whose batch has no padding contributes
    everything, whatever its shape; a rank whose batch is all padding contributes nothing. Only a partly padded batch
    has to be cut, and only what has one row per sample on every rank (dimension 0 as long as the batch) can be.
    Anything else in such a batch raises an error that names it. A tensor that has that length by coincidence (an
    `edge_index` [2, E] in a batch of two) looks like rows: leave it out, or set `fill_batches = False` on the prepared
    loader, so that no batch is ever partly padded.

    The structure stays the same. Of its parts

    - a tensor or NumPy array is concatenated along dimension 0, [n of all ranks, ...]; n may differ.
    - a tensor without dimensions is a value of the rank: the result has one from each contributing rank.
    - a list of anything but tensors, and the tuple of strings that torch's collate makes, is concatenated. A list of
      mappings, the usual form of targets for single samples, is one of these.
    - a list of tensors (or of tuples of tensors) that are equal in all but size is one entry per sample if it has as
      many entries as the batch has samples, and a structure if every tensor has one row per sample. If both hold, or
      neither, it is an error on several ranks. A tuple of mappings with the same keys is one entry per sample under the
      same condition; any other tuple is a structure.
    - any other object becomes a list with one entry per contributing rank.

    Collective: every rank must call it.

    Args:
        group: The ranks.
        data: Tensors and objects, nested.
        counts: Samples per rank in the current batch. None leaves nothing out.
        use_gather_object: Pickle tensors too, so that they may differ in any dimension: lists are concatenated, and
            other tensors become lists with one entry per rank, without the padded rows, in host memory.
        pad_index: The value that pads dimension 1 of tensors to the widest rank, for sequences of different lengths.
        debug: Compare the structure over the ranks first.

    Returns:
        The same structure, with the samples of all ranks.

    Raises:
        CollectiveError: The counts are for another number of ranks, a padded part cannot be cut, or tensors differ in
            more than dimension 0; with `debug`, also when the ranks differ in anything else.
    """
    if counts is not None and len(counts.rows) != group.size:
        raise CollectiveError(
            f"Counts for {len(counts.rows)} ranks were given to a group of {group.size}",
            "Each rank needs its own count",
            "Gather over the group that the loader was prepared for",
        )
    gathering = _SampleGather(group, counts, pickle_tensors=use_gather_object, pad_index=pad_index)
    if debug:
        check_agreement(group, "gather_samples", gathering.comparable(data), lambda tensor: 0 if tensor.dim() else None)
    return gathering.run(data)


@dataclass(frozen=True, slots=True)
class _TensorShape:
    """What the ranks must know of each other's tensors, as three integers; -1 for a missing dimension.

    Everything but the first two dimensions must be equal, which a checksum verifies.
    """

    rows: int
    width: int
    checksum: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _TensorShape:
        checksum = zlib.crc32(repr((tensor.dim(), tuple(tensor.shape[2:]), tensor.dtype)).encode())
        rows, width = (*tensor.shape[:2], -1, -1)[:2]
        return cls(rows, width, checksum)


@dataclass(frozen=True, slots=True)
class _Contribution:
    """The rows of a tensor that this rank sends, and how many rows each rank sends."""

    tensor: torch.Tensor
    rows_by_rank: list[int]


class _SampleGather:
    """One call of `gather_samples`."""

    def __init__(
        self, group: Group, counts: BatchCounts | None, *, pickle_tensors: bool, pad_index: float | None
    ) -> None:
        self.group = group
        self.counts = counts
        self.pickle_tensors = pickle_tensors
        self.pad_index = pad_index
        # A rank whose batch is all padding contributes nothing.
        self._contributors = [rank for rank in range(group.size) if _contributes(counts, rank)]
        # Sequences of tensors, by `id`: one entry per sample, or a structure of tensors.
        self._entry_lists: set[int] = set()
        self._structures: set[int] = set()

    def run(self, data: Any) -> Any:
        self._classify_sequences(data)
        found = list(leaves(data, self._is_part))
        order = common_order([path for path, _ in found])
        replacements = iter(in_own_order(self._join(data, [found[index] for index in order]), order))
        return map_leaves(lambda _: next(replacements), data, self._is_part)

    def _join(self, data: Any, parts: list[tuple[Path, Any]]) -> list[Any]:
        """Exchange the parts of `data`, which are in the same order on all ranks, and join each of them."""
        tensors = [(path, part.detach()) for path, part in parts if self._is_sent_as_tensor(part)]
        objects = [(path, part) for path, part in parts if not self._is_sent_as_tensor(part)]
        shapes, objects_by_rank = self._exchange(
            [_TensorShape.of(tensor) for _, tensor in tensors], [part for _, part in objects]
        )
        # Every rank raises the same errors here, before any of them waits for a tensor.
        self._check_tuples(data, [path for path, _ in tensors], shapes)
        contributions = [
            self._contribution(path, tensor, by_rank) for (path, tensor), by_rank in zip(tensors, shapes, strict=True)
        ]
        joined_objects = iter(
            [self._join_objects(path, values) for (path, _), values in zip(objects, objects_by_rank, strict=True)]
        )
        joined_tensors = iter(self._gather_tensors(contributions))
        return [next(joined_tensors if self._is_sent_as_tensor(part) else joined_objects) for _, part in parts]

    def comparable(self, data: Any) -> Any:
        """Return the structure without what may differ between ranks: entries, pickled tensors, padded lengths."""

        def comparable_part(part: Any) -> Any:
            if not isinstance(part, torch.Tensor):
                if isinstance(part, list | tuple | np.ndarray):
                    return None
                return part
            if self.pickle_tensors:
                return None
            if self.pad_index is None or part.dim() < 2:
                return part
            return part.narrow(1, 0, 0)

        return map_leaves(comparable_part, data, self._is_part_or_ambiguous)

    # Which containers are lists of entries, and which are structure

    def _is_sent_as_tensor(self, part: Any) -> bool:
        return isinstance(part, torch.Tensor) and not self.pickle_tensors

    def _is_part(self, value: Any) -> bool:
        """Say whether a container is a list of entries, rather than structure."""
        if not isinstance(value, list | tuple):
            return False
        if self.pickle_tensors and isinstance(value, list):
            return True
        return id(value) in self._entry_lists or is_entry_list(value)

    def _is_ambiguous(self, value: Any) -> bool:
        """Say whether only all ranks together can tell what a sequence is."""
        if not isinstance(value, list | tuple) or self.counts is None or id(value) in self._structures:
            return False
        return not self._is_part(value) and is_ambiguous(value)

    def _is_part_or_ambiguous(self, value: Any) -> bool:
        return self._is_part(value) or self._is_ambiguous(value)

    def _classify_sequences(self, data: Any) -> None:
        """Find out which sequences of tensors hold one entry per sample, and which are structure."""
        if self.counts is None:
            return
        samples = self.counts.rows[self.group.rank]
        while True:
            candidates = leaves(data, self._is_part_or_ambiguous)
            ambiguous = [(path, value) for path, value in candidates if self._is_ambiguous(value)]
            if not ambiguous:
                return
            ambiguous = [ambiguous[index] for index in common_order([path for path, _ in ambiguous])]
            local = [SampleEvidence.of(value, samples) for _, value in ambiguous]
            by_rank = self.group.all_gather_object(local)
            for (path, value), evidence in zip(ambiguous, zip(*by_rank, strict=True), strict=True):
                is_entries = self._has_entry_per_sample(path, value, evidence)
                (self._entry_lists if is_entries else self._structures).add(id(value))
            # What turned out to be structure may contain further sequences.

    def _has_entry_per_sample(self, path: Path, value: Any, evidence: Sequence[SampleEvidence]) -> bool:
        assert self.counts is not None
        counts, contributors = self.counts, self._contributors
        if self.group.size == 1:
            # An ambiguous sequence is returned unchanged.
            return evidence[0].per_sample and not evidence[0].per_row and counts.counted
        # Batches that are all padding may have another size.
        evidence = [evidence[rank] for rank in contributors]
        per_sample = None
        if counts.counted:
            per_sample = maybe_per_sample(evidence, type(value))
        if per_sample is not None:
            return per_sample
        if len(contributors) == 1 and counts.real[contributors[0]] == counts.rows[contributors[0]]:
            # A single rank contributes, and it contributes everything: either reading gives the same result.
            return True
        if counts.counted:
            raise _ambiguous_sequence(path_text(path), type(value), either=evidence[0].per_sample)
        raise _uncounted_batch(path_text(path), type(value))

    def _check_tuples(self, data: Any, paths: list[Path], shapes: list[list[_TensorShape]]) -> None:
        """Reject tuples whose tensors belong to single samples: they would be taken for structure."""
        if self.group.size == 1 or self.counts is None or not self.counts.counted:
            return
        rows_at = {
            path: [by_rank[rank].rows for rank in self._contributors]
            for path, by_rank in zip(paths, shapes, strict=True)
        }
        batch_sizes = tuple(self.counts.rows[rank] for rank in self._contributors)
        _check_tuples(data, self._is_part, rows_at, batch_sizes)

    # How many rows or entries each rank contributes

    def _rows_without_padding(self, path: Path, what: str, sizes: Sequence[int]) -> list[int]:
        """Return how much each rank contributes of something that has `sizes` rows or entries on the ranks.

        Raises:
            CollectiveError: A partly padded batch has to be cut, and this does not have one row per sample.
        """
        if self.counts is None:
            return list(sizes)
        counts = self.counts
        partly_padded = [rank for rank, real in enumerate(counts.real) if 0 < real < counts.rows[rank]]
        if partly_padded and tuple(sizes) != counts.rows:
            raise _cannot_be_cut(path_text(path), what, sizes, counts, partly_padded[0])
        return [
            size if real == rows else real for size, rows, real in zip(sizes, counts.rows, counts.real, strict=True)
        ]

    # The exchange

    def _exchange(
        self, shapes: list[_TensorShape], objects: list[Any]
    ) -> tuple[list[list[_TensorShape]], list[list[Any]]]:
        """Return, for each tensor and each object, the shapes and the objects of all ranks."""
        if objects:
            # In one message, as objects are pickled in any case.
            portable = objects
            if self.group.device.type != "cpu":
                portable = send_to_device(objects, "cpu")
            by_rank = self.group.all_gather_object((shapes, portable))
            shapes_by_rank = [rank_shapes for rank_shapes, _ in by_rank]
            objects_by_rank = [rank_objects for _, rank_objects in by_rank]
            return _transposed(shapes_by_rank, shapes), _transposed(objects_by_rank, objects)
        if self.group.size == 1 or not shapes:
            return [[shape] for shape in shapes], []
        # In host memory: reading the result back from a device would synchronize with it.
        numbers = torch.tensor([(shape.rows, shape.width, shape.checksum) for shape in shapes])
        table = self.group.all_gather(numbers).tolist()
        return [[_TensorShape(*rank_row[index]) for rank_row in table] for index in range(len(shapes))], []

    def _join_objects(self, path: Path, values: list[Any]) -> Any:
        """Join the objects of all ranks that stand at one place of the structure."""
        if not all(map(_can_be_concatenated, values)):
            return [values[rank] for rank in self._contributors]
        first = values[0]
        rows = self._rows_without_padding(path, type(first).__name__, [len(value) for value in values])
        values = [values[rank][: rows[rank]] for rank in self._contributors]
        if isinstance(first, list | tuple):
            return type(first)(entry for entries in values for entry in entries)
        return self._join_arrays(path, first, values)

    def _join_arrays(self, path: Path, first: Any, values: list[Any]) -> Any:
        differ = len({value.shape[1:] for value in values}) > 1
        if not isinstance(first, np.ndarray) or (self.pickle_tensors and differ):
            return values
        if differ:
            raise _shapes_differ(path_text(path), [tuple(value.shape) for value in values], can_be_padded=False)
        if values:
            return np.concatenate(values)
        return first[:0]

    def _contribution(self, path: Path, tensor: torch.Tensor, shapes: list[_TensorShape]) -> _Contribution:
        """Return what this rank sends of a tensor.

        Raises:
            CollectiveError: The tensors of the ranks cannot be joined.
        """
        rank = self.group.rank
        if self.group.size > 1:
            check_dense(tensor)
        if len({shape.checksum for shape in shapes}) > 1:
            full_shapes = self.group.all_gather_object((tuple(tensor.shape), str(tensor.dtype)))
            raise _shapes_differ(path_text(path), full_shapes, can_be_padded=False)
        if not tensor.dim():
            rows = [int(other in self._contributors) for other in range(self.group.size)]
            return _Contribution(tensor.reshape(1)[: rows[rank]], rows)
        rows = self._rows_without_padding(path, f"tensor {list(tensor.shape)}", [shape.rows for shape in shapes])
        kept = tensor if rows[rank] == tensor.shape[0] else tensor[: rows[rank]]
        if tensor.dim() > 1:
            kept = self._with_common_width(path, tensor, kept, shapes, rows)
        return _Contribution(kept, rows)

    def _with_common_width(
        self, path: Path, tensor: torch.Tensor, kept: torch.Tensor, shapes: list[_TensorShape], rows: list[int]
    ) -> torch.Tensor:
        """Pad dimension 1 to the widest of the contributing ranks."""
        widths = [shape.width for shape, count in zip(shapes, rows, strict=True) if count]
        if len(set(widths)) > 1 and self.pad_index is None:
            full_shapes = [(shape.rows, shape.width, *tensor.shape[2:]) for shape in shapes]
            raise _shapes_differ(path_text(path), full_shapes, can_be_padded=True)
        width = max(widths, default=tensor.shape[1])
        if width < tensor.shape[1]:
            # Only this rank's padding is wider than every sample.
            kept = kept[:, :width]
        return _extended(kept, 1, width, 0 if self.pad_index is None else self.pad_index)

    def _gather_tensors(self, contributions: list[_Contribution]) -> Iterator[torch.Tensor]:
        if not contributions:
            return
        if self.group.size == 1:
            yield from (contribution.tensor for contribution in contributions)
            return
        sent = [_extended(contribution.tensor, 0, max(contribution.rows_by_rank), 0) for contribution in contributions]
        for contribution, blocks in zip(contributions, all_gather_coalesced(self.group, sent), strict=True):
            rows = contribution.rows_by_rank
            if len(set(rows)) == 1:
                # Contiguous, so that a small result does not keep the whole receive buffer alive.
                yield blocks.contiguous().flatten(0, 1)
            else:
                yield torch.cat([block[:count] for block, count in zip(blocks, rows, strict=True)])


def _contributes(counts: BatchCounts | None, rank: int) -> bool:
    return counts is None or counts.real[rank] > 0 or counts.rows[rank] == 0


def _can_be_concatenated(value: Any) -> bool:
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.ndim > 0
    return isinstance(value, list | tuple)


def _extended(tensor: torch.Tensor, dim: int, size: int, fill: float) -> torch.Tensor:
    """Pad a tensor to `size` along a dimension."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, fill)], dim)


def _transposed(by_rank: list[list[Any]], local: list[Any]) -> list[list[Any]]:
    """Turn one list per rank into one list per part; `local` is this rank's list."""
    if any(len(values) != len(local) for values in by_rank):
        raise CollectiveError(
            f"The ranks gather {[len(values) for values in by_rank]} tensors and objects",
            "They are matched one by one, so every rank needs the same number",
            "Pass the same structure on every rank; if a list has one entry per sample, make its entries dictionaries",
        )
    return [list(column) for column in zip(*by_rank, strict=True)]


def _check_tuples(
    data: Any,
    is_part: Callable[[Any], bool],
    rows_at: dict[Path, list[int]],
    batch_sizes: tuple[int, ...],
    path: Path = (),
) -> None:
    """Reject a tuple of tensors that belong to single samples: it would be taken for structure.

    Args:
        data: The nested batch.
        is_part: Says of a container whether it is a list of entries.
        rows_at: The rows of each tensor on the contributing ranks, by path.
        batch_sizes: Samples in the batches of those ranks.
        path: Where `data` stands.
    """
    children = None
    if not is_part(data):
        children = maybe_children(data)
    if children is None:
        return
    child_paths = [(*path, key) for key, _ in children]
    is_tensor_tuple = is_uniform_tensor_tuple(data) and all(child_path in rows_at for child_path in child_paths)
    if is_tensor_tuple and set(batch_sizes) <= {len(data)}:
        rows = [rows_at[child_path] for child_path in child_paths]
        if not all(_has_row_per_sample(tensor_rows, batch_sizes) for tensor_rows in rows):
            raise _looks_per_sample(path_text(path), len(data))
    for child_path, (_, child) in zip(child_paths, children, strict=True):
        _check_tuples(child, is_part, rows_at, batch_sizes, child_path)


def _has_row_per_sample(rows: list[int], batch_sizes: tuple[int, ...]) -> bool:
    """Say whether a tensor has as many rows as its batch has samples, or no dimension, on every rank."""
    return all(count in (-1, batch_size) for count, batch_size in zip(rows, batch_sizes, strict=True))


def _looks_per_sample(where: str, count: int) -> CollectiveError:
    return CollectiveError(
        f"{where} is a tuple of {count} tensors in a batch of {count} samples, and they do not have one row per sample",
        "A tuple counts as a structure of tensors, so tensors of different samples would be joined",
        "Make it a list if each tensor belongs to one sample; put a structure of tensors into a dictionary",
    )


def _ambiguous_sequence(where: str, kind: type, *, either: bool) -> CollectiveError:
    if either:
        seen = "with as many entries as the batch has samples, whose tensors have as many rows"
    else:
        seen = "with neither as many entries as the batch has samples nor tensors with as many rows"
    return CollectiveError(
        f"{where} is a {kind.__name__} {seen}",
        "It is ambiguous whether each entry or each row belongs to one sample",
        "Stack it into one tensor, make it a list with one dictionary per sample, or, if each tensor has one row per "
        "sample, put the tensors into a dictionary",
    )


def _uncounted_batch(where: str, kind: type) -> CollectiveError:
    return CollectiveError(
        f"{where} is a {kind.__name__} of tensors, from a loader that makes its batches itself",
        "The number of samples in the batch is unknown, so whether each entry belongs to one sample is, too",
        "Make it a list with one dictionary per sample; put a structure of tensors into a dictionary",
    )


def _cannot_be_cut(where: str, what: str, sizes: Sequence[int], counts: BatchCounts, rank: int) -> CollectiveError:
    return CollectiveError(
        f"{where} is a {what} with {list(sizes)} rows on the ranks, whose batches have {list(counts.rows)} samples; "
        f"only {counts.real[rank]} of those of rank {rank} are its own, the rest is padding",
        "The padding cannot be cut off what does not have one row per sample",
        "Set fill_batches = False on the prepared loader, which leaves the last batch short; or use gather or reduce "
        "for a value that belongs to the rank",
    )


def _shapes_differ(where: str, shapes: list[Any], *, can_be_padded: bool) -> CollectiveError:
    hint = "Pass use_gather_object=True"
    if can_be_padded:
        hint = "Pass pad_index, which pads dimension 1, or use_gather_object=True"
    return CollectiveError(
        f"{where} has the shapes {', '.join(map(str, shapes))} on the ranks",
        "Tensors are concatenated along dimension 0 and must be equal in all others",
        hint,
    )
