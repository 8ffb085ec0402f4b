"""The debug check: compares what the ranks pass to a collective, and names the ranks that differ."""

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


def check_agreement(
    group: Group, operation: str, data: Any, free_dim: Callable[[torch.Tensor], int | None] | None = None
) -> None:
    """Compare operation, structure, shapes, dtypes and devices over the ranks, in one exchange.

    Collective: every rank must call it.

    Args:
        group: The ranks to compare.
        operation: The name of the call, with the arguments that must agree.
        data: What this rank passes.
        free_dim: Returns the dimension of a tensor that may differ between ranks, or None.

    Raises:
        CollectiveError: On every rank, if the ranks differ; it names the ranks in the minority and what they passed.
    """
    calls = group.all_gather_object((operation, _describe_leaves(data, free_dim)))
    _require_same(
        [name for name, _ in calls],
        lambda odd, usual, value, norm: f"{odd} in {value} where {usual} in {norm}",
        ("is", "are"),
    )
    paths = list(dict.fromkeys(path for _, description in calls for path in description))
    for path in paths:
        _require_same([description.get(path, ("nothing", "")) for _, description in calls], partial(_difference, path))


def _describe_leaves(data: Any, free_dim: Callable[[torch.Tensor], int | None] | None) -> dict[str, tuple[str, str]]:
    """Return, by path, what each leaf is: its shape or type, and its dtype and device."""
    description = {}
    for path, leaf in leaves(data):
        if not isinstance(leaf, torch.Tensor):
            description[path_text(path)] = (f"a {type(leaf).__name__}", "")
            continue
        shape: list[int | str] = list(leaf.shape)
        free = None
        if free_dim is not None:
            free = free_dim(leaf)
        if free is not None:
            shape[free] = "*"
        text = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        description[path_text(path)] = (f"({text})", f"{leaf.dtype} on {leaf.device.type}")
    if maybe_children(data) == []:
        description[path_text(())] = (f"an empty {type(data).__name__}", "")
    return description


def _require_same(
    values: list[Any],
    sentence: Callable[[str, str, Any, Any], str],
    verb: tuple[str, str] = ("passes", "pass"),
) -> None:
    counted: Counter[Hashable] = Counter(values)
    if len(counted) <= 1:
        return
    norm = max(counted, key=lambda value: (counted[value], -values.index(value)))
    odd_value = next(value for value in values if value != norm)
    odd = [rank for rank, value in enumerate(values) if value == odd_value]
    usual = [rank for rank, value in enumerate(values) if value == norm]
    others = [rank for rank in range(len(values)) if rank not in odd and rank not in usual]
    seen = sentence(named_ranks(odd, *verb), named_ranks(usual, *verb), odd_value, norm)
    if others:
        seen += f"; {named_ranks(others, 'differs', 'differ')} too"
    raise CollectiveError(
        seen[0].upper() + seen[1:],
        "A collective needs the same call with the same structure, shapes and dtypes on every rank",
        "Pad with pad_across_processes first, or use gather_object for what differs",
    )


def _difference(path: str, odd: str, usual: str, value: tuple[str, str], norm: tuple[str, str]) -> str:
    if value[0] == norm[0]:
        return f"{odd} {path} as {value[1]} where {usual} {norm[1]}"
    shape = "as "
    if value[0].startswith("("):
        shape = "of shape "
    return f"{odd} {path} {shape}{value[0]} where {usual} {norm[0]}"
