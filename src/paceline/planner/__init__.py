"""What a run will need, the least sharding that fits, and what to change when memory ran out."""

from paceline.planner.choice import Choice, choose_strategy
from paceline.planner.footprint import Footprint, measure
from paceline.planner.remedies import Run, asked_bytes, describe_shortage, remedies
from paceline.planner.usage import Usage, measure_usage, process_memory

__all__ = [
    "Choice",
    "Footprint",
    "Run",
    "Usage",
    "asked_bytes",
    "choose_strategy",
    "describe_shortage",
    "measure",
    "measure_usage",
    "process_memory",
    "remedies",
]
