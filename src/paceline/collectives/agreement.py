"""The debug check: do all ranks bring the same thing to a collective, and if not, which rank is odd."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from paceline.collectives.nested import leaves, maybe_children, path_text
from paceline.errors import CollectiveError, named_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from paceline.collectives.group import Group

# What one rank brings: the operation, and for each leaf its path and what it is, in words.
Account = tuple[str, dict[str, tuple[str, str]]]


def check_agreement(
    group: Group, operation: str, data: Any, free_dim: Callable[[torch.Tensor], int | None] | None = None
) -> None:
    """Compare operation, structure, shapes, dtypes and devices over the ranks, in one exchange.

    Collective: every rank must call it.

    Args:
        group: The ranks to compare.
        operation: The name of the call with the arguments that must agree.
        data: What this rank brings.
        free_dim: Says of a tensor which dimension may differ from rank to rank, if any.

    Raises:
        CollectiveError: On every rank, if the ranks differ; it names the odd ranks and what they bring.
    """
    accounts = group.all_gather_object((operation, _account(data, free_dim)))
    _require_same(
        [name for name, _ in accounts],
        lambda odd, usual, value, norm: f"{odd} in {value} where {usual} in {norm}",
        ("is", "are"),
    )
    paths = list(dict.fromkeys(path for _, account in accounts for path in account))
    for path in paths:
        _require_same([account.get(path, ("nothing", "")) for _, account in accounts], partial(_difference, path))


def _account(data: Any, free_dim: Callable[[torch.Tensor], int | None] | None) -> dict[str, tuple[str, str]]:
    account = {}
    for path, leaf in leaves(data):
        if not isinstance(leaf, torch.Tensor):
            account[path_text(path)] = (f"a {type(leaf).__name__}", "")
            continue
        shape: list[int | str] = list(leaf.shape)
        free = None if free_dim is None else free_dim(leaf)
        if free is not None:
            shape[free] = "*"
        text = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        account[path_text(path)] = (f"({text})", f"{leaf.dtype} on {leaf.device.type}")
    if maybe_children(data) == []:
        account[path_text(())] = (f"an empty {type(data).__name__}", "")
    return account


def _require_same(
    values: list[Any],
    sentence: Callable[[str, str, Any, Any], str],
    verb: tuple[str, str] = ("brings", "bring"),
) -> None:
    counted: Counter[Hashable] = Counter(values)
    if len(counted) <= 1:
        return
    norm = max(counted, key=lambda value: (counted[value], -values.index(value)))
    odd_value = next(value for value in values if value != norm)
    odd = [rank for rank, value in enumerate(values) if value == odd_value]
    usual = [rank for rank, value in enumerate(values) if value == norm]
    others = [rank for rank in range(len(values)) if rank not in odd and rank not in usual]
    saw = sentence(named_ranks(odd, *verb), named_ranks(usual, *verb), odd_value, norm)
    if others:
        saw += f"; {named_ranks(others, 'differs', 'differ')} too"
    raise CollectiveError(
        saw[0].upper() + saw[1:],
        "A collective needs the same call with the same structure, shapes and dtypes on every rank",
        "Pad with pad_across_processes first, or exchange unequal things with gather_object",
    )


def _difference(path: str, odd: str, usual: str, value: tuple[str, str], norm: tuple[str, str]) -> str:
    if value[0] == norm[0]:
        return f"{odd} {path} as {value[1]} where {usual} {norm[1]}"
    shape = "of shape " if value[0].startswith("(") else "as "
    return f"{odd} {path} {shape}{value[0]} where {usual} {norm[0]}"
