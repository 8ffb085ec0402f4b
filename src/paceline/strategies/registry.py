"""The table from a strategy's name to its class, which is imported on first use."""

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
    """The names of all strategies."""
    return tuple(_TABLE)


def load_strategy(name: str) -> type[Strategy]:
    """Import the class of the strategy with this name, and its engine.

    Raises:
        MissingExtraError: The strategy's engine is not installed.
        PrepareError: There is no such strategy.
    """
    try:
        module, cls = _TABLE[name]
    except KeyError:
        raise PrepareError(
            f"strategy={name!r}", "There is no such strategy", f"Choose auto, {', '.join(_TABLE)}"
        ) from None
    loaded: type[Strategy] = getattr(import_module(module), cls)
    return loaded
