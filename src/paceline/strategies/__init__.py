"""How a model is spread over ranks: one class for each way, and the registry that loads it."""

from paceline.strategies.base import Strategy
from paceline.strategies.context import DistributedType, RunContext
from paceline.strategies.protocols import Describable, GradientAccess, OptimizerAccess, TrainingStateAccess
from paceline.strategies.registry import load_strategy, strategy_names

__all__ = [
    "Describable",
    "DistributedType",
    "GradientAccess",
    "OptimizerAccess",
    "RunContext",
    "Strategy",
    "TrainingStateAccess",
    "load_strategy",
    "strategy_names",
]
