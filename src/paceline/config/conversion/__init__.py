"""Converts files of Accelerate and DeepSpeed and command lines of torchrun, with a line for each key."""

from __future__ import annotations

from paceline.config.conversion.deepspeed import deepspeed_problems
from paceline.config.conversion.file import convert_file
from paceline.config.conversion.result import Conversion, ConvertedKey
from paceline.config.conversion.torchrun import convert_torchrun, is_torchrun

__all__ = ["Conversion", "ConvertedKey", "convert_file", "convert_torchrun", "deepspeed_problems", "is_torchrun"]
