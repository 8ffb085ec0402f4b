"""The one table from a strategy's name to its class, loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from paceline.errors import PrepareError

if TYPE_CHECKING:
    from paceline.strategies.base import Strategy

_TABLE = {
    "single": ("paceline.strategies.single", "SingleStrategy"),
    "ddp": ("paceline.strategies.ddp.strategy", "DDPStrategy"),
    "fsdp": ("paceline.strategies.fsdp.strategy", "FSDPStrategy"),
    "deepspeed": ("paceline.strategies.deepspeed.strategy", "DeepSpeedStrategy"),
}


def strategy_names() -> tuple[str, ...]:
    """The names of the strategies that this release carries out."""
    return tuple(_TABLE)


def load_strategy(name: str) -> type[Strategy]:
    """The class of the strategy with this name; imports its engine.

    Raises:
        MissingExtraError: The strategy's engine is not installed.
        PrepareError: No such strategy.
    """
    try:
        module, cls = _TABLE[name]
    except KeyError:
        raise PrepareError(
            f"strategy={name!r}", "There is no such strategy", f"Choose auto, {', '.join(_TABLE)}"
        ) from None
    loaded: type[Strategy] = getattr(import_module(module), cls)
    return loaded
