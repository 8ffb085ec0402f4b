"""Tests that need accelerators; each says how many."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    present = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    for item in items:
        needed = 2 if item.get_closest_marker("gpus2") else 1 if item.get_closest_marker("gpu") else 0
        if present < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} accelerators, {present} here"))
