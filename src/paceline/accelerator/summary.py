"""Describes what was detected and decided, as text for the start of a log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.accelerator.strategy_selection import unused_settings
from paceline.environment.device import describe_device
from paceline.environment.random_generators import is_seeded
from paceline.errors import counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paceline.accelerator.assembly import RunComponents
    from paceline.accelerator.prepared import Prepared
    from paceline.accelerator.strategy_selection import StrategySelector
    from paceline.config import Origin
    from paceline.data import PreparedDataLoader
    from paceline.strategies import Strategy

_WIDTH = 13


def describe_run(components: RunComponents, selector: StrategySelector, prepared: Prepared, num_steps: int) -> str:
    """Lines of `topic     value`: devices, backend, strategy and why, precision, dtypes, seed, data, global batch.

    Args:
        components: The run.
        selector: Knows the strategy and why it was chosen.
        prepared: What was prepared so far.
        num_steps: Micro-batches to an optimizer step.
    """
    strategy = selector.maybe_current
    rows = [*_hardware(components), *_strategy(strategy, selector.reason), *_precision(components, strategy), *_seed()]
    rows += [row for loader in prepared.loaders for row in _data(loader, num_steps)]
    rows += [("note", note) for note in components.resolved.notes]
    unused = [] if strategy is None else unused_settings(components, strategy.name)
    # The tables of all names are needed for a description only.
    from paceline.config.schema.names import all_settings

    known = all_settings()
    rows += [
        ("settings", f"{key} = {known[key].with_unit(value)} ({origin.where}{'; not used' if key in unused else ''})")
        for key, value, origin in _explicit(components)
    ]
    return "\n".join(_table(rows))


def _table(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Name each topic once, in front of its first line."""
    previous = ""
    for topic, value in rows:
        yield f"{'' if topic == previous else topic:<{_WIDTH}} {value}"
        previous = topic


def _hardware(components: RunComponents) -> Iterator[tuple[str, str]]:
    world = components.context.world
    machines = "" if world.num_nodes == 1 else f" on {world.num_nodes} machines"
    starter = "paceline launch or torchrun" if world.source == "torchrun" else world.source
    yield "processes", f"{world.size}{machines} (started by {starter})" if world.size > 1 else "1"
    yield "device", describe_device(components.context.device) + (", one each" if world.size > 1 else "")
    yield "backend", components.backend or "none: nothing is exchanged"


def _strategy(strategy: Strategy | None, reason: str) -> Iterator[tuple[str, str]]:
    yield "strategy", reason or "auto: decided when the first model is prepared"
    if strategy is not None:
        yield from (("strategy", line) for line in strategy.describe())
        yield from (("compiler", line) for line in strategy.compiler.describe())
        attention = strategy.attention.describe()
        yield from [("attention", attention)] if attention is not None else []


def _precision(components: RunComponents, strategy: Strategy | None) -> Iterator[tuple[str, str]]:
    yield "precision", components.context.precision.mode
    if strategy is not None:
        yield from (("precision", line) for line in strategy.fp8.describe())
        yield "dtypes", ", ".join(f"{use} {dtype}" for use, dtype in strategy.dtypes().items())


def _seed() -> Iterator[tuple[str, str]]:
    if is_seeded():
        yield "seed", str(torch.initial_seed())
    else:
        yield "seed", "none: initial weights and the order of samples differ in every run; call set_seed(0) first"


def _data(loader: PreparedDataLoader, num_steps: int) -> Iterator[tuple[str, str]]:
    yield "data", loader.describe()
    batch_size = loader.total_batch_size
    if batch_size and num_steps > 1:
        total = batch_size * num_steps
        micro_batches = f"{num_steps} micro-batches x {counted(batch_size, 'sample')}"
        yield "data", f"an optimizer step takes {total:,} samples = {micro_batches}"


def _explicit(components: RunComponents) -> Iterator[tuple[str, object, Origin]]:
    """The settings from a file, a flag, a variable or the script: neither defaults nor detected."""
    for key, value, origin in components.resolved.explain():
        if origin.kind not in ("default", "detected") and key != "strategy":
            yield key, value, origin
