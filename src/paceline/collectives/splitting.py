"""Splits inputs between ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch

from paceline.collectives.nested import is_namedtuple, maybe_children, rebuild
from paceline.errors import CollectiveError

if TYPE_CHECKING:
    from paceline.collectives.group import Group

__all__ = ["split_between_processes"]

T = TypeVar("T")


@runtime_checkable
class Selectable(Protocol):
    """Something with rows that can be selected by index, such as a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def select(self, indices: Sequence[int]) -> Any:
        """Return the rows at `indices`."""


@contextmanager
def split_between_processes(
    group: Group, inputs: T, apply_padding: bool = False, *, debug: bool = False
) -> Iterator[T]:
    """Give each rank a contiguous part of `inputs`; the first n % size ranks get one more of the n inputs.

    Nothing is exchanged, so all ranks must pass the same `inputs`. They are never modified; a group of one rank gets
    them back as they are. With fewer inputs than ranks and no padding, the last ranks get none.

    Args:
        group: The ranks.
        inputs: A list, tuple or other sequence, a tensor or array (split along dimension 0), a data set with `select`,
            or a mapping, named tuple or dataclass of these, all of one length.
        apply_padding: Give every rank the same number, by repeating its last input.
        debug: Compare the number of inputs over the ranks first. Then it is a collective: every rank must call it.

    Yields:
        This rank's part, of the type of `inputs`.

    Raises:
        CollectiveError: The lengths of the columns differ, or something cannot be split; with `debug`, also if the
            ranks pass different numbers of inputs.
    """
    total = _common_length(inputs)
    if debug:
        _check_totals(group.all_gather_object(total))
    if group.size == 1:
        yield inputs
        return
    yield _pick(inputs, _indices(total, group.rank, group.size, apply_padding))


def _indices(total: int, rank: int, size: int, padded: bool) -> list[int]:
    share, extra = divmod(total, size)
    start = rank * share + min(rank, extra)
    own = list(range(start, start + share + (rank < extra)))
    if padded and total:
        full = share + (extra > 0)
        own += [own[-1] if own else total - 1] * (full - len(own))
    return own


def _maybe_columns(inputs: Any) -> list[tuple[object, Any]] | None:
    if isinstance(inputs, torch.Tensor | np.ndarray) or _is_selectable(inputs):
        return None
    if isinstance(inputs, list | tuple) and not is_namedtuple(inputs):
        return None
    return maybe_children(inputs)


def _common_length(inputs: Any) -> int:
    columns = _maybe_columns(inputs)
    if columns is None:
        return _length(inputs)
    lengths = {key: _common_length(column) for key, column in columns}
    if len(set(lengths.values())) > 1:
        seen = ", ".join(f"{key!r}: {length}" for key, length in lengths.items())
        raise CollectiveError(
            f"split_between_processes got columns of different lengths ({seen})",
            "Rows that belong to one sample would end up on different ranks",
            "Pass columns of one length",
        )
    return next(iter(lengths.values()), 0)


def _length(inputs: Any) -> int:
    if isinstance(inputs, torch.Tensor | np.ndarray):
        has_rows = inputs.ndim > 0
    else:
        has_rows = isinstance(inputs, Sequence) or _is_selectable(inputs)
    if not has_rows or isinstance(inputs, str | bytes):
        raise CollectiveError(
            f"split_between_processes got a {type(inputs).__name__}",
            "It has no rows that could be split",
            "Pass a list, tuple, tensor, array or dataset, or a dict of those; for a table, split range(len(table)) "
            "and take those rows",
        )
    return len(inputs)


def _is_selectable(inputs: Any) -> bool:
    # A tensor's `select` does something else, and that of a table (pandas, Polars, Arrow) selects columns.
    is_table = isinstance(inputs, torch.Tensor) or hasattr(inputs, "columns")
    return not is_table and isinstance(inputs, Selectable)


def _pick(inputs: Any, indices: list[int]) -> Any:
    columns = _maybe_columns(inputs)
    if columns is not None:
        return rebuild(inputs, [_pick(column, indices) for _, column in columns])
    if isinstance(inputs, torch.Tensor):
        return inputs[torch.tensor(indices, dtype=torch.long, device=inputs.device)]
    if isinstance(inputs, np.ndarray):
        return inputs[np.array(indices, dtype=np.intp)]
    if _is_selectable(inputs):
        return inputs.select(indices)
    picked = [inputs[index] for index in indices]
    if isinstance(inputs, tuple):
        return tuple(picked)
    return picked


def _check_totals(totals: list[int]) -> None:
    if len(set(totals)) > 1:
        raise CollectiveError(
            f"split_between_processes got {totals} inputs on the ranks",
            "Each rank takes its part of inputs that are the same on all ranks",
            "Pass the same inputs on every rank",
        )
