"""Turning what others wrote (Accelerate, DeepSpeed, torchrun) into a configuration, with a line for each key."""

from __future__ import annotations

from paceline.config.conversion.deepspeed import deepspeed_problems
from paceline.config.conversion.file import convert_file
from paceline.config.conversion.result import Conversion, Fate
from paceline.config.conversion.torchrun import convert_torchrun, is_torchrun

__all__ = ["Conversion", "Fate", "convert_file", "convert_torchrun", "deepspeed_problems", "is_torchrun"]
