"""Gathering what belongs to samples: one entry per real sample, whatever was padded to share them out."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.collectives.agreement import check_agreement
from paceline.collectives.entries import Evidence, is_plain_entries, is_unclear, maybe_per_sample, tensors_alike
from paceline.collectives.nested import leaves, map_leaves, maybe_children, path_text, send_to_device
from paceline.collectives.packing import all_gather_many
from paceline.errors import CollectiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from paceline.collectives.group import Group
    from paceline.collectives.nested import Path

__all__ = ["BatchCounts", "gather_samples"]


_SEQUENCES = (list, tuple)


@dataclass(frozen=True)
class BatchCounts:
    """How many samples of the current batch each rank has.

    Attributes:
        rows: Per rank, the samples in its batch.
        real: Per rank, how many of those are its own; the rest, at the end, is padding.
        counted: Whether samples were counted, before they were collated. A loader that collates by itself is counted
            in whole batches: `rows` is 1 for a rank that has a batch, and `real` is 0 where that is a filler.
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
    pad_index: float | None = None,
    debug: bool = False,
) -> Any:
    """Gather what was computed on the current batch, once per sample, in rank order.

    What is left out is decided by how many samples each rank's batch was made of. A rank whose batch holds no padding
    brings everything, whatever its shape; a rank whose batch is all padding brings nothing. Only a batch that is
    filled up in part has to be cut, and only what has one row per sample, on every rank, can be: dimension 0 as long
    as the batch has samples. Anything else in such a batch is an error that names it. What merely happens to be as
    long there (an `edge_index` [2, E] in a batch of two) cannot be told apart from rows: leave such a thing out,
    or set `fill_batches = False` on the prepared loader, so that no batch is ever filled up in part.

    The structure stays; of its parts

    - a tensor or NumPy array is concatenated along dimension 0, [n of all ranks, ...]; n may differ.
    - a tensor without dimensions is a value of the rank: one from each rank that brings something.
    - a list of anything but tensors, and the tuple of strings that torch's collate makes, is concatenated. A list of
      mappings is one of these: the targets of single samples.
    - a list of tensors (or of tuples of tensors) that are alike in all but size is one entry per sample where it has as
      many entries as the batch has samples, and structure where every tensor has a row per sample. Where it may be
      both, or is neither, it is an error on several ranks. A tuple of alike mappings is one entry per sample in the
      same case; any other tuple is structure.
    - any other object becomes a list with one entry per rank that brings something.

    Collective: every rank must call it.

    Args:
        group: The ranks.
        data: Tensors and objects, nested.
        counts: Of the batch in use; None if there is none, then nothing is left out.
        use_gather_object: Pickle the tensors too, as their shapes may differ in any dimension: lists are concatenated,
            and other tensors become lists with one entry per rank, without the rows of padding. They arrive
            in host memory.
        pad_index: Where tensors differ in dimension 1, as sequences do in length, pad them with this to the longest.
        debug: Compare the structure over the ranks first.

    Raises:
        CollectiveError: The counts are for another number of ranks, something cannot be cut, or tensors differ in
            more than dimension 0; with `debug`, also when the ranks differ in anything else.
    """
    if counts is not None and len(counts.rows) != group.size:
        raise CollectiveError(
            f"Counts for {len(counts.rows)} ranks were given to a group of {group.size}",
            "Each rank needs its own",
            "Gather over the group that the loader shares its data out to",
        )
    gathering = _SampleGather(group, counts, pickle_tensors=use_gather_object, pad_index=pad_index)
    if debug:
        check_agreement(group, "gather_samples", gathering.comparable(data), lambda tensor: 0 if tensor.dim() else None)
    return gathering.run(data)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What ranks must know of each other's tensors, in three numbers; -1 for a dimension that is not there.

    Everything but the first two dimensions must be equal, and a checksum tells whether it is.
    """

    rows: int
    width: int
    rest: int

    @classmethod
    def of(cls, value: torch.Tensor) -> _Shape:
        rest = zlib.crc32(repr((value.dim(), tuple(value.shape[2:]), value.dtype)).encode())
        rows, width = (*value.shape[:2], -1, -1)[:2]
        return cls(rows, width, rest)


class _SampleGather:
    """One call of `gather_samples`: collects the parts, exchanges them, puts the results in their places."""

    def __init__(
        self, group: Group, counts: BatchCounts | None, *, pickle_tensors: bool, pad_index: float | None
    ) -> None:
        self.group = group
        self.counts = counts
        self.pickle_tensors = pickle_tensors
        self.pad_index = pad_index
        # By identity: sequences of tensors that turned out to be one entry a sample, or structure.
        self._entries: set[int] = set()
        self._structure: set[int] = set()

    def run(self, data: Any) -> Any:
        self._settle(data)
        places = list(leaves(data, self._is_part))
        travelling = [(path, part.detach()) for path, part in places if self._travels_as_tensor(part)]
        objects = [(path, part) for path, part in places if not self._travels_as_tensor(part)]
        shapes, columns = self._exchange([_Shape.of(value) for _, value in travelling], [part for _, part in objects])
        # All ranks refuse the same things here, before any of them waits for a tensor.
        if self.group.size > 1 and self.counts is not None and self.counts.counted:
            there = [rank for rank in range(self.group.size) if self._brings(rank)]
            rows_at = {path: [seen[r].rows for r in there] for (path, _), seen in zip(travelling, shapes, strict=True)}
            _check_tuples(data, self._is_part, rows_at, tuple(self.counts.rows[rank] for rank in there))
        pieces = [self._piece(path, value, seen) for (path, value), seen in zip(travelling, shapes, strict=True)]
        joined = iter([self._joined(path, column) for (path, _), column in zip(objects, columns, strict=True)])
        gathered = iter(self._gather(pieces))

        def place(part: Any) -> Any:
            return next(gathered if self._travels_as_tensor(part) else joined)

        return map_leaves(place, data, self._is_part)

    def comparable(self, data: Any) -> Any:
        """Return the structure without what may differ between ranks: entries, pickled tensors, padded lengths."""

        def kind(part: Any) -> Any:
            if not isinstance(part, torch.Tensor):
                return None if isinstance(part, list | tuple | np.ndarray) else part
            if self.pickle_tensors:
                return None
            return part if self.pad_index is None or part.dim() < 2 else part.narrow(1, 0, 0)

        return map_leaves(kind, data, lambda value: self._is_part(value) or self._is_open(value))

    # What is what

    def _travels_as_tensor(self, part: Any) -> bool:
        return isinstance(part, torch.Tensor) and not self.pickle_tensors

    def _is_part(self, value: Any) -> bool:
        """Say whether a container is a list of entries, rather than structure."""
        if not isinstance(value, _SEQUENCES):
            return False
        if self.pickle_tensors and isinstance(value, list):
            return True
        return id(value) in self._entries or is_plain_entries(value)

    def _is_open(self, value: Any) -> bool:
        """Say whether only all ranks together can tell what a sequence is."""
        if not isinstance(value, _SEQUENCES) or self.counts is None or id(value) in self._structure:
            return False
        return not self._is_part(value) and is_unclear(value)

    def _settle(self, data: Any) -> None:
        """Find out which sequences of tensors are one entry a sample, and which are structure."""
        if self.counts is None:
            return
        while places := list(filter(self._is_open_place, leaves(data, lambda v: self._is_part(v) or self._is_open(v)))):
            samples = self.counts.rows[self.group.rank]
            seen = self.group.all_gather_object([Evidence.of(value, samples) for _, value in places])
            for (path, value), evidence in zip(places, zip(*seen, strict=True), strict=True):
                chosen = self._entries if self._is_per_sample(path, value, evidence) else self._structure
                chosen.add(id(value))
            # What is structure may hold further sequences.

    def _is_open_place(self, place: tuple[Path, Any]) -> bool:
        return self._is_open(place[1])

    def _is_per_sample(self, path: Path, value: Any, evidence: Sequence[Evidence]) -> bool:
        assert self.counts is not None
        if self.group.size == 1:
            # Whatever is unclear comes back as it is.
            return evidence[0].per_sample and not evidence[0].per_row and self.counts.counted
        # A batch that only fills up may be of another size.
        there = [rank for rank in range(self.group.size) if self._brings(rank)]
        evidence = [evidence[rank] for rank in there]
        per_sample = maybe_per_sample(evidence, type(value)) if self.counts.counted else None
        if per_sample is None and len(there) == 1 and self.counts.real[there[0]] == self.counts.rows[there[0]]:
            # One rank alone brings something, and all of it, so that it comes as it is either way.
            return True
        if per_sample is None and self.counts.counted:
            raise _cannot_be_told(path_text(path), type(value), either=evidence[0].per_sample)
        if per_sample is None:
            raise _not_counted(path_text(path), type(value))
        return per_sample

    # How much of it

    def _kept(self, path: Path, what: str, sizes: Sequence[int]) -> list[int]:
        """Return how much each rank brings of something with `sizes` rows or entries on the ranks.

        Raises:
            CollectiveError: A batch that is filled up in part has to be cut, and this has not one row per sample.
        """
        if self.counts is None:
            return list(sizes)
        counts = self.counts
        in_part = [rank for rank, real in enumerate(counts.real) if 0 < real < counts.rows[rank]]
        if in_part and tuple(sizes) != counts.rows:
            raise _cannot_be_cut(path_text(path), what, sizes, counts, in_part)
        return [
            size if real == rows else real for size, rows, real in zip(sizes, counts.rows, counts.real, strict=True)
        ]

    def _brings(self, rank: int) -> bool:
        """Say whether a rank brings anything: not if its batch is all padding."""
        counts = self.counts
        return counts is None or counts.real[rank] > 0 or counts.rows[rank] == 0

    # The exchange

    def _exchange(self, shapes: list[_Shape], objects: list[Any]) -> tuple[list[list[_Shape]], list[list[Any]]]:
        """Return, for each tensor and each object, what all ranks have there."""
        if objects:
            # In one message: objects are pickled in any case.
            portable = objects if self.group.device.type == "cpu" else send_to_device(objects, "cpu")
            seen = self.group.all_gather_object((shapes, portable))
            return _columns([one for one, _ in seen], shapes), _columns([one for _, one in seen], objects)
        if self.group.size == 1 or not shapes:
            return [[shape] for shape in shapes], []
        # In host memory: a device would have to be waited for.
        numbers = torch.tensor([(shape.rows, shape.width, shape.rest) for shape in shapes])
        by_rank = self.group.all_gather(numbers).tolist()
        return [[_Shape(*one[index]) for one in by_rank] for index in range(len(shapes))], []

    def _joined(self, path: Path, column: list[Any]) -> Any:
        """Put together the objects of all ranks."""
        there = [rank for rank in range(self.group.size) if self._brings(rank)]
        if not all(isinstance(value, list | tuple | np.ndarray | torch.Tensor) for value in column) or any(
            isinstance(value, np.ndarray | torch.Tensor) and not value.ndim for value in column
        ):
            return [column[rank] for rank in there]
        first = column[0]
        kept = self._kept(path, type(first).__name__, [len(value) for value in column])
        values = [column[rank][: kept[rank]] for rank in there]
        if isinstance(first, list | tuple):
            return type(first)(entry for entries in values for entry in entries)
        shapes = {value.shape[1:] for value in values}
        if not isinstance(first, np.ndarray) or (self.pickle_tensors and len(shapes) > 1):
            return values
        if len(shapes) > 1:
            raise _differ(path_text(path), [tuple(value.shape) for value in values], padded=True)
        return np.concatenate(values) if values else first[:0]

    def _piece(self, path: Path, value: torch.Tensor, seen: list[_Shape]) -> _Piece:
        """Say what this rank sends of a tensor, and what comes of it.

        Raises:
            CollectiveError: The tensors of the ranks do not fit together.
        """
        where = path_text(path)
        if len({shape.rest for shape in seen}) > 1:
            told = self.group.all_gather_object((tuple(value.shape), str(value.dtype)))
            raise _differ(where, told, padded=True)
        if not value.dim():
            kept = [int(self._brings(rank)) for rank in range(self.group.size)]
            return _Piece(value.reshape(1)[: kept[self.group.rank]], kept)
        kept = self._kept(path, f"tensor {list(value.shape)}", [shape.rows for shape in seen])
        own = kept[self.group.rank]
        piece = value if own == value.shape[0] else value[:own]
        if value.dim() == 1:
            return _Piece(piece, kept)
        widths = [shape.width for shape, count in zip(seen, kept, strict=True) if count]
        if len(set(widths)) > 1 and self.pad_index is None:
            raise _differ(where, [(shape.rows, shape.width, *value.shape[2:]) for shape in seen], padded=False)
        width = max(widths, default=value.shape[1])
        fill = 0 if self.pad_index is None else self.pad_index
        if width < value.shape[1]:
            # Padding that is longer than every sample.
            piece = piece[:, :width]
        return _Piece(_sized(piece, 1, width, fill), kept)

    def _gather(self, pieces: list[_Piece]) -> Iterator[torch.Tensor]:
        if not pieces:
            return
        if self.group.size == 1:
            yield from (piece.value for piece in pieces)
            return
        sent = [_sized(piece.value, 0, max(piece.kept), 0) for piece in pieces]
        for piece, blocks in zip(pieces, all_gather_many(self.group, sent), strict=True):
            if len(set(piece.kept)) == 1:
                # Contiguous, so that a small result does not keep the buffer that it came in alive.
                yield blocks.contiguous().flatten(0, 1)
            else:
                yield torch.cat([block[:count] for block, count in zip(blocks, piece.kept, strict=True)])


@dataclass(frozen=True, slots=True)
class _Piece:
    """What a rank brings of a tensor, and how many rows each rank brings."""

    value: torch.Tensor
    kept: list[int]


def _sized(value: torch.Tensor, dim: int, size: int, fill: float) -> torch.Tensor:
    """Fill a tensor up along a dimension."""
    missing = size - value.shape[dim]
    if not missing:
        return value
    shape = list(value.shape)
    shape[dim] = missing
    return torch.cat([value, value.new_full(shape, fill)], dim)


def _columns(by_rank: list[list[Any]], own: list[Any]) -> list[list[Any]]:
    if any(len(values) != len(own) for values in by_rank):
        raise CollectiveError(
            f"The ranks bring {[len(values) for values in by_rank]} tensors and objects to be gathered",
            "They are gathered one by one",
            "Give the same structure on every rank; a list that belongs to single samples holds dictionaries",
        )
    return [list(column) for column in zip(*by_rank, strict=True)]


def _check_tuples(
    data: Any, is_part: Callable[[Any], bool], rows_at: dict[Path, list[int]], rows: tuple[int, ...], path: Path = ()
) -> None:
    """Refuse a tuple of tensors that belong to single samples: it would be taken for structure."""
    children = None if is_part(data) else maybe_children(data)
    if children is None:
        return
    paths = [(*path, key) for key, _ in children]
    if all(each in rows_at for each in paths) and tensors_alike(data) and (len(data),) * len(rows) == rows:
        seen = [(size, count) for each in paths for size, count in zip(rows_at[each], rows, strict=True)]
        if any(size not in (-1, count) for size, count in seen):
            raise _looks_per_sample(path_text(path), len(data))
    for inner, (_, child) in zip(paths, children, strict=True):
        _check_tuples(child, is_part, rows_at, rows, inner)


def _looks_per_sample(where: str, count: int) -> CollectiveError:
    return CollectiveError(
        f"{where} is a tuple of {count} tensors in a batch of {count} samples, and they have not a row per sample",
        "A tuple is taken for a set of tensors, so that those of different samples would be joined",
        "Make it a list, if each belongs to one sample; a set of tensors goes into a dictionary",
    )


def _cannot_be_told(where: str, kind: type, *, either: bool) -> CollectiveError:
    if either:
        saw = "as many entries as the batch has samples, whose tensors have as many rows"
    else:
        saw = "neither as many entries as the batch has samples, nor tensors of as many rows"
    return CollectiveError(
        f"{where} is a {kind.__name__} of {saw}",
        "It cannot be told whether each entry belongs to a sample or each row does",
        "Stack it to one tensor, or make it a list of dictionaries, one a sample; a set of tensors that have a row a "
        "sample each goes into a dictionary",
    )


def _not_counted(where: str, kind: type) -> CollectiveError:
    return CollectiveError(
        f"{where} is a {kind.__name__} of tensors, from a loader that collates by itself",
        "How many samples the batch has is not known, so that it cannot be told whether each entry belongs to one",
        "Make it a list of dictionaries, one a sample; a set of tensors goes into a dictionary",
    )


def _cannot_be_cut(
    where: str, what: str, sizes: Sequence[int], counts: BatchCounts, in_part: list[int]
) -> CollectiveError:
    rank = in_part[0]
    return CollectiveError(
        f"{where} is a {what} with {list(sizes)} rows on the ranks, whose batches have {list(counts.rows)} samples; "
        f"of those of rank {rank} only {counts.real[rank]} are its own, and the rest fills up the last batch",
        "What has not one row per sample cannot be cut to the samples that count",
        "Set fill_batches = False on the prepared loader: then that batch stays short; or use gather or reduce for "
        "a value of the rank",
    )


def _differ(where: str, shapes: list[Any], *, padded: bool) -> CollectiveError:
    return CollectiveError(
        f"{where} has the shapes {', '.join(map(str, shapes))} on the ranks",
        "Tensors are joined along dimension 0, and must be alike in the others",
        "Use use_gather_object=True" if padded else "Give pad_index, which pads dimension 1, or use_gather_object=True",
    )
