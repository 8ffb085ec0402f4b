"""What a test needs that not every machine has."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install 'paceline[deepspeed]'",
)


def with_deepspeed(values: list[Any]) -> list[Any]:
    """Parameters of a test that are skipped, visibly, where DeepSpeed is not installed."""
    return [pytest.param(value, marks=needs_deepspeed, id=str(value)) for value in values]
