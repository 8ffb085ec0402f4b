"""How a model is spread over ranks: one file and one class for each way."""

from paceline.strategies.base import Strategy
from paceline.strategies.context import DistributedType, RunContext
from paceline.strategies.registry import load_strategy, strategy_names

__all__ = ["DistributedType", "RunContext", "Strategy", "load_strategy", "strategy_names"]
