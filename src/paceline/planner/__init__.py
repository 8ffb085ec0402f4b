"""What a run will need, and the least sharding that fits."""

from paceline.planner.choice import Choice, choose_strategy
from paceline.planner.footprint import Footprint, measure

__all__ = ["Choice", "Footprint", "choose_strategy", "measure"]
