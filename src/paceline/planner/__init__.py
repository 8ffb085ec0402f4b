"""Memory planning: what a run needs, the least sharding that fits, and what to change when memory runs out."""

from paceline.planner.footprint import Footprint, measure
from paceline.planner.memory_usage import MemoryUsage, measure_memory, process_memory
from paceline.planner.remedies import RunSettings, describe_out_of_memory, remedies, requested_bytes
from paceline.planner.strategy_choice import StrategyChoice, choose_strategy

__all__ = [
    "Footprint",
    "MemoryUsage",
    "RunSettings",
    "StrategyChoice",
    "choose_strategy",
    "describe_out_of_memory",
    "measure",
    "measure_memory",
    "process_memory",
    "remedies",
    "requested_bytes",
]
