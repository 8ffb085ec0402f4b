"""Tests that need accelerators; each says how many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    present = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    for item in items:
        needed = 2 if item.get_closest_marker("gpus2") else 1 if item.get_closest_marker("gpu") else 0
        if present < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} accelerators, {present} here"))


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone, for FSDP2."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
        device_id=torch.device("cuda", torch.cuda.current_device()),
    )
    yield
    dist.destroy_process_group()
