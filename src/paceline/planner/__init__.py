"""What a run will need, the least sharding that fits, and what to change when memory ran out."""

from paceline.planner.choice import Choice, choose_strategy
from paceline.planner.footprint import Footprint, measure
from paceline.planner.remedies import Run, asked_bytes, describe_out_of_memory, remedies
from paceline.planner.usage import Usage, measure_usage, process_memory

__all__ = [
    "Choice",
    "Footprint",
    "Run",
    "Usage",
    "asked_bytes",
    "choose_strategy",
    "describe_out_of_memory",
    "measure",
    "measure_usage",
    "process_memory",
    "remedies",
]
