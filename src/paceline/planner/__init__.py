"""Memory planning: what a run needs, the least sharding that fits, and what to change when memory runs out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.environment.lazy_names import lazy_attributes

if TYPE_CHECKING:
    from paceline.planner.footprint import Footprint, measure
    from paceline.planner.memory_usage import MemoryUsage, measure_memory, process_memory
    from paceline.planner.remedies import RunSettings, describe_out_of_memory, find_remedies, requested_bytes
    from paceline.planner.strategy_choice import StrategyChoice, choose_strategy
else:
    __getattr__, _ = lazy_attributes(
        __name__,
        {
            "footprint": "Footprint measure",
            "memory_usage": "MemoryUsage measure_memory process_memory",
            "remedies": "RunSettings describe_out_of_memory find_remedies requested_bytes",
            "strategy_choice": "StrategyChoice choose_strategy",
        },
    )

__all__ = [
    "Footprint",
    "MemoryUsage",
    "RunSettings",
    "StrategyChoice",
    "choose_strategy",
    "describe_out_of_memory",
    "find_remedies",
    "measure",
    "measure_memory",
    "process_memory",
    "requested_bytes",
]
