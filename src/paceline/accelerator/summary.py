"""What was detected and decided, as text for the start of a log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.environment.device import describe_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paceline.accelerator.assembly import RunComponents
    from paceline.config import Origin
    from paceline.data import PreparedDataLoader
    from paceline.strategies import Strategy

_WIDTH = 13


def describe_run(
    components: RunComponents, strategy: Strategy | None, reason: str, loaders: Sequence[PreparedDataLoader], steps: int
) -> str:
    """Lines of `what     value`: devices, backend, strategy and why, precision, dtypes, data, global batch.

    Args:
        components: The run.
        strategy: The one in force; None while it is still open.
        reason: Why that one.
        loaders: Those prepared so far.
        steps: Micro-batches to an optimizer step.
    """
    rows = [*_where(components), *_strategy(strategy, reason), *_precision(components, strategy)]
    rows += [row for loader in loaders for row in _data(loader, steps)]
    rows += [("note", note) for note in components.resolved.notes]
    rows += [("settings", f"{key} = {value} ({origin.where})") for key, value, origin in _said(components)]
    return "\n".join(_table(rows))


def _table(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Name each topic once, in front of its first line."""
    before = ""
    for what, value in rows:
        yield f"{'' if what == before else what:<{_WIDTH}} {value}"
        before = what


def _where(components: RunComponents) -> Iterator[tuple[str, str]]:
    world = components.context.world
    machines = "" if world.num_nodes == 1 else f" on {world.num_nodes} machines"
    yield "processes", f"{world.size}{machines} (by the variables of {world.source})" if world.size > 1 else "1"
    yield "device", describe_device(components.context.device) + (", one each" if world.size > 1 else "")
    yield "backend", components.backend or "none: nothing is exchanged"


def _strategy(strategy: Strategy | None, reason: str) -> Iterator[tuple[str, str]]:
    yield "strategy", reason or "auto: decided when the first model is prepared"
    if strategy is not None:
        yield from (("strategy", line) for line in strategy.describe())


def _precision(components: RunComponents, strategy: Strategy | None) -> Iterator[tuple[str, str]]:
    yield "precision", components.context.precision.mode
    if strategy is not None:
        yield "dtypes", ", ".join(f"{use} {dtype}" for use, dtype in strategy.dtypes().items())


def _data(loader: PreparedDataLoader, steps: int) -> Iterator[tuple[str, str]]:
    yield "data", loader.describe()
    if loader.total_batch_size and steps > 1:
        total = loader.total_batch_size * steps
        yield "data", f"an optimizer step takes {total:,} samples = {loader.total_batch_size:,} x {steps} micro-batches"


def _said(components: RunComponents) -> Iterator[tuple[str, object, Origin]]:
    """The settings that somebody gave: neither defaults nor what was detected."""
    for key, value, origin in components.resolved.explain():
        if origin.kind not in ("default", "detected") and key != "strategy":
            yield key, value, origin
