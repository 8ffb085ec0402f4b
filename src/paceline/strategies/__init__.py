"""How a model is spread over ranks: one file and one class for each way."""

from paceline.strategies.base import Strategy
from paceline.strategies.surroundings import DistributedType, Surroundings
from paceline.strategies.table import load_strategy, strategy_names

__all__ = ["DistributedType", "Strategy", "Surroundings", "load_strategy", "strategy_names"]
