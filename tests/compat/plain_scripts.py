"""The scripts of this folder, as runs."""

from __future__ import annotations

import importlib
from typing import Any

RUNS = (
    "gradient_accumulation",
    "automatic_gradient_accumulation",
    "checkpointing",
    "tracking",
    "early_stopping",
    "local_sgd",
    "multi_model",
    "metrics",
    "profiler",
    "comm_hooks",
    "cross_validation",
    "k_fold",
)
# Of each kind one: accumulation, state, samples for metrics, several models.
SHORT = ["automatic_gradient_accumulation", "checkpointing", "metrics", "multi_model"]


def run(name: str, folder: str) -> dict[str, Any]:
    """What a script returns."""
    found: dict[str, Any] = importlib.import_module(f"tests.compat.scripts.{name}").main(folder)
    return found
