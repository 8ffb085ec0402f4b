"""What a run will need, the least sharding that fits, and what to change when memory ran out."""

from paceline.planner.choice import Choice, choose_strategy
from paceline.planner.footprint import Footprint, measure
from paceline.planner.remedies import Run, describe_out_of_memory, remedies, requested_bytes
from paceline.planner.usage import Usage, measure_usage, process_memory

__all__ = [
    "Choice",
    "Footprint",
    "Run",
    "Usage",
    "choose_strategy",
    "describe_out_of_memory",
    "measure",
    "measure_usage",
    "process_memory",
    "remedies",
    "requested_bytes",
]
