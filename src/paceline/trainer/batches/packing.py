"""Packs sequences into rows of one length, so that no token is padding: positions restart with each sequence.

A map-style set is packed once, by the lengths of its samples: a sample of the packed set is a row. A stream is packed
while it is read. Either way rows are distributed, shuffled, counted and resumed like any other samples.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, IterableDataset

from paceline.errors import DataError, PrepareError
from paceline.trainer.batches.collate import IGNORED
from paceline.trainer.batches.sampling import lengths_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from paceline.accelerator.accelerator import Accelerator

__all__ = ["PackedSet", "PackedStream", "PackingCollator", "check_packing", "pack_dataset", "packs_flat"]

# Samples that are packed together: the best places for a few thousand leave a percent of the rows empty.
_WINDOW = 8192
# Rows that a stream fills at once; a row is finished when the next sample fits into none.
_OPEN_ROWS = 16
_SETTING = "packing=True"


def pack_dataset(
    dataset: Any, length: int | None, *, shuffle: bool, seed: int, length_column: str
) -> tuple[Dataset[Any], int]:
    """Pack a data set.

    Args:
        dataset: Map-style, or a stream; samples are mappings with `input_ids`.
        length: Of a row; None takes that of the longest sample.
        shuffle: Whether samples of anywhere in the set may share a row; else neighbours do.
        seed: Of that.
        length_column: Column with the length of each sample, if there is one.

    Returns:
        The packed set, and the length of its rows.

    Raises:
        DataError: A sample is longer than a row, or a stream has no given length.
    """
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        if length is None:
            raise DataError(
                f"{_SETTING} with a stream ({type(dataset).__name__}) and without packing_length",
                "The longest sample of a stream is unknown",
                "Set packing_length",
            )
        kind = StatefulPackedStream if _has_state(dataset) else PackedStream
        return kind(dataset, length), length
    lengths = lengths_of(dataset, length_column, "input_ids", setting=_SETTING)
    length = max(lengths) if length is None else length
    too_long = next((i for i, size in enumerate(lengths) if size > length), None)
    if too_long is not None:
        raise _too_long(f"Sample {too_long}", lengths[too_long], length)
    order = list(range(len(lengths)))
    if shuffle:
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    return PackedSet(dataset, pack(lengths, order, length, in_order=not shuffle), sum(lengths)), length


def pack(lengths: Sequence[int], order: Sequence[int], length: int, *, in_order: bool) -> list[list[int]]:
    """Which samples share a row.

    Args:
        lengths: Of all samples.
        order: Their indices, shuffled or not.
        length: Of a row.
        in_order: Whether only neighbours in `order` may share a row.

    Returns:
        For each row, its samples.
    """
    if in_order:
        return _pack_neighbours(lengths, order, length)
    rows: list[list[int]] = []
    for start in range(0, len(order), _WINDOW):
        rows += _pack_best(lengths, order[start : start + _WINDOW], length)
    return rows


def _pack_neighbours(lengths: Sequence[int], order: Sequence[int], length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free = 0
    for index in order:
        if not rows or lengths[index] > free:
            rows.append([])
            free = length
        rows[-1].append(index)
        free -= lengths[index]
    return rows


def _pack_best(lengths: Sequence[int], order: Sequence[int], length: int) -> list[list[int]]:
    """The longest samples first, each into the fullest row where it fits."""
    rows: list[list[int]] = []
    # (tokens left, row), in order.
    free: list[tuple[int, int]] = []
    for index in sorted(order, key=lambda i: -lengths[i]):
        at = bisect.bisect_left(free, (lengths[index], -1))
        if at < len(free):
            left, row = free.pop(at)
        else:
            left, row = length, len(rows)
            rows.append([])
        rows[row].append(index)
        if left > lengths[index]:
            bisect.insort(free, (left - lengths[index], row))
    return rows


class PackedSet(Dataset[list[Any]]):
    """Rows of a packed map-style set; each is the list of its samples.

    Args:
        dataset: The samples.
        rows: Which samples share a row.
        num_tokens: Of all samples.
    """

    _objects_of_script = ("dataset",)

    def __init__(self, dataset: Any, rows: list[list[int]], num_tokens: int) -> None:
        self.dataset = dataset
        self.rows = rows
        self.num_tokens = num_tokens

    @property
    def num_samples(self) -> int:
        """Samples in all rows."""
        return sum(map(len, self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Any]:
        return [self.dataset[i] for i in self.rows[index]]

    def __getattr__(self, name: str) -> Any:
        # Only what prepared loaders look for: data sets that change with the epoch.
        if name == "set_epoch":
            return getattr(self.dataset, name)
        raise AttributeError(name)


class PackedStream(IterableDataset[list[Any]]):
    """Rows of a stream that is packed while it is read; each is the list of its samples.

    Args:
        dataset: Yields samples.
        length: Of a row.
    """

    _objects_of_script = ("dataset",)

    def __init__(self, dataset: Any, length: int) -> None:
        self.dataset = dataset
        self.length = length
        # Rows that are not full yet.
        self._open: list[list[Any]] = []
        # Whether the source has ended, and only these rows are left. Its own state begins anew then.
        self._has_ended = False
        # A state that was loaded for the next iteration.
        self._loaded: tuple[list[list[Any]], bool] | None = None

    def __iter__(self) -> Iterator[list[Any]]:
        # Also where the last iteration was left before its end, nothing of it is left over.
        loaded, self._loaded = self._loaded, None
        rows, self._has_ended = loaded or ([], False)
        self._open = rows
        if not self._has_ended:
            yield from self._read(rows)
        self._has_ended = True
        while rows:
            yield rows.pop(0)
        self._has_ended = False

    def _read(self, rows: list[list[Any]]) -> Iterator[list[Any]]:
        for sample in self.dataset:
            size = _size_of(sample)
            if size > self.length:
                raise _too_long("A sample of the stream", size, self.length)
            fitting = [row for row in rows if _filled(row) + size <= self.length]
            if fitting:
                max(fitting, key=_filled).append(sample)
            elif len(rows) < _OPEN_ROWS:
                rows.append([sample])
            else:
                fullest = max(range(len(rows)), key=lambda i: _filled(rows[i]))
                full = rows.pop(fullest)
                rows.append([sample])
                yield full

    def __getattr__(self, name: str) -> Any:
        if name == "set_epoch":
            return getattr(self.dataset, name)
        raise AttributeError(name)


class StatefulPackedStream(PackedStream):
    """A packed stream whose source has a state: it is saved with the rows that are not full yet."""

    def state_dict(self) -> dict[str, Any]:
        """The position: the state of the source, and what was read and not yielded."""
        rows, has_ended = self._loaded or (self._open, self._has_ended)
        rows = [[{name: _storable(value) for name, value in sample.items()} for sample in row] for row in rows]
        return {"source": self.dataset.state_dict(), "open": rows, "ended": has_ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there in the next iteration."""
        if not state["ended"]:
            self.dataset.load_state_dict(state["source"])
        self._loaded = [list(row) for row in state["open"]], bool(state["ended"])


def _storable(value: Any) -> Any:
    """A tensor of what is in a row; text and other columns as they are."""
    if isinstance(value, torch.Tensor | np.ndarray) or not isinstance(value, Sequence) or isinstance(value, str):
        return value
    try:
        return torch.as_tensor(value)
    except (RuntimeError, TypeError, ValueError):
        # A list of texts, or of lists of several lengths.
        return value


def _filled(row: Sequence[Any]) -> int:
    return sum(_size_of(sample) for sample in row)


def _size_of(sample: Any) -> int:
    """The tokens of a sample that are not padding.

    Raises:
        DataError: It has no `input_ids`.
    """
    if not isinstance(sample, Mapping) or "input_ids" not in sample:
        found = ", ".join(map(str, sample)) if isinstance(sample, Mapping) else f"a {type(sample).__name__}"
        raise DataError(f"{_SETTING}, and a sample has {found}", "Rows are made of input_ids", "Name the tokens so")
    tokens = sample["input_ids"]
    if getattr(tokens, "ndim", 1) != 1:
        raise DataError(
            f"{_SETTING}, and input_ids of a sample has shape {tuple(tokens.shape)}",
            "A sample is one sequence",
            "Tokenize without return_tensors, or take the first row",
        )
    return len(tokens)


def _too_long(what: str, size: int, length: int) -> DataError:
    return DataError(
        f"{what} has {size:,} tokens, and packing_length is {length:,}",
        "It fits into no row, and cutting it off would lose targets",
        "Raise packing_length, or cut samples where they are tokenized",
    )


def _has_state(dataset: Any) -> bool:
    return hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")


@dataclass(frozen=True, slots=True)
class PackingCollator:
    """Makes a batch of rows: `input_ids`, `labels` and `position_ids`, and other columns of the same length.

    The first target of each sequence is ignored, since the token before it is of another one. What is left of a row is
    a sequence of its own without targets, so that all batches have one shape.

    Attributes:
        length: Of a row.
        takes: Columns that the model takes; None if it takes any.
        flat: Whether to make one row of all, with the limits of its sequences, as kernels of variable length want it.
    """

    length: int
    takes: frozenset[str] | None = None
    flat: bool = False

    def __call__(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """Return the batch."""
        made = [self._row(row) for row in rows]
        batch = {name: torch.stack([row[name] for row in made]) for name in made[0]}
        return self._flatten(batch) if self.flat else batch

    def _row(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        names = [name for name in samples[0] if self._is_kept(name, samples[0])]
        columns: dict[str, list[Tensor]] = {name: [] for name in (*names, "labels", "position_ids")}
        for sample in samples:
            mask = sample.get("attention_mask")
            kept = slice(None) if mask is None else torch.as_tensor(mask).bool()
            tokens = torch.as_tensor(sample["input_ids"])[kept]
            labels = torch.as_tensor(sample["labels"] if "labels" in sample else sample["input_ids"])[kept].clone()
            labels[:1] = IGNORED
            for name in names:
                columns[name].append(torch.as_tensor(sample[name])[kept])
            columns["labels"].append(labels)
            columns["position_ids"].append(torch.arange(len(tokens)))
        left = self.length - sum(map(len, columns["labels"]))
        if left:
            for name in names:
                columns[name].append(torch.zeros(left, dtype=columns[name][0].dtype))
            columns["labels"].append(torch.full((left,), IGNORED))
            columns["position_ids"].append(torch.arange(left))
        return {name: torch.cat(parts) for name, parts in columns.items()}

    def _is_kept(self, name: str, sample: Mapping[str, Any]) -> bool:
        if name in ("labels", "attention_mask", "position_ids"):
            return False
        if name == "input_ids":
            return True
        value = sample[name]
        is_per_token = isinstance(value, Sized) and not isinstance(value, str) and len(value) == _size_of(sample)
        if self.takes is not None:
            return name in self.takes and is_per_token
        return is_per_token

    def _flatten(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        positions = batch["position_ids"].reshape(-1)
        starts = torch.nonzero(positions == 0).reshape(-1)
        limits = torch.cat([starts, torch.tensor([len(positions)])]).to(torch.int32)
        longest = int(limits.diff().max())
        return {
            **{name: value.reshape(1, -1) for name, value in batch.items()},
            **_limits(limits, longest),
        }


def packs_flat(model: nn.Module) -> bool:
    """Whether a model's attention takes sequences of variable length one after the other, as FlashAttention does."""
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return isinstance(attention, str) and "flash" in attention


def check_packing(
    accelerator: Accelerator,
    model: nn.Module,
    loss_of: Callable[[dict[str, Any]], Tensor | None],
    batch: Mapping[str, Any],
    takes: frozenset[str] | None,
) -> None:
    """Make sure that a model computes for two sequences of a row what it computes for each alone. Collective.

    Args:
        accelerator: Of the training.
        model: Not wrapped.
        loss_of: Computes the mean loss of a batch.
        batch: The first one, on the device.
        takes: The inputs that the model takes; None if it takes any.

    Raises:
        PrepareError: A sequence sees another one.
    """
    packed, apart = _beginning(batch, takes)
    was_training = model.training
    # Without dropout, both forwards compute the same.
    model.eval()
    try:
        with torch.no_grad():
            # Two forwards on every rank: each may be collective.
            losses = [loss_of(packed), loss_of(apart)]
    finally:
        model.train(was_training)
    nothing = torch.full((), torch.nan, device=accelerator.device)
    found = torch.stack([nothing if loss is None else loss.detach().float().reshape(()) for loss in losses])
    everywhere = accelerator.gather(found[None])
    # Sequences of one token have no target.
    compared = everywhere[~everywhere.isnan().any(1)]
    # Kernels of 16 bits round differently for other shapes.
    bound = 1e-4 if accelerator.mixed_precision == "no" else 2e-2
    gaps = (compared[:, 0] - compared[:, 1]).abs()
    if not len(compared) or not bool((gaps > bound * compared[:, 1].abs() + 1e-5).any()):
        return
    in_one_row, apart_from_it = compared[int(gaps.argmax())].tolist()
    raise PrepareError(
        f"packing=True, and two sequences have a loss of {in_one_row:.6g} in one row, and {apart_from_it:.6g} apart",
        f"{type(model).__name__} lets a sequence see the ones before it: its attention does not follow position_ids",
        "Use a model that does, as causal language models of transformers do with sdpa, eager or flash attention; or "
        "leave packing out",
    )


def _beginning(batch: Mapping[str, Any], takes: frozenset[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first sequences of the first row, packed and apart; where there are two, the second could see the first."""
    positions = batch["position_ids"][0]
    starts = [*torch.nonzero(positions == 0).reshape(-1).tolist(), len(positions)][:3]
    spans = list(pairwise(starts))
    longest = max(end - start for start, end in spans)
    columns = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim() == 2}
    packed: dict[str, Any] = {name: value[:1, : starts[-1]] for name, value in columns.items()}
    if "cu_seq_lens_q" in batch:
        packed |= _limits(batch["cu_seq_lens_q"].new_tensor(starts), longest)
    apart: dict[str, Any] = {name: _padded(name, value[0], spans, longest) for name, value in columns.items()}
    places = torch.arange(longest, device=positions.device)
    apart["position_ids"] = places.expand(len(spans), -1)
    if takes is None or "attention_mask" in takes:
        apart["attention_mask"] = torch.stack([places < end - start for start, end in spans]).long()
    return packed, apart


def _padded(name: str, row: Tensor, spans: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Parts of a row in rows of their own."""
    filler = IGNORED if name == "labels" else 0
    return torch.stack([F.pad(row[start:end], (0, length - end + start), value=filler) for start, end in spans])


def _limits(limits: Tensor, longest: int) -> dict[str, Any]:
    return {"cu_seq_lens_q": limits, "cu_seq_lens_k": limits, "max_length_q": longest, "max_length_k": longest}
