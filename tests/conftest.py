"""What every test shares: ranks that end with the session, and a check that no test leaves anything behind."""

from __future__ import annotations

import gc
import os
import threading
from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist

from tests.support.ranks import close_pools
from tests.support.slow_cases import slow_cases

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases as slow that other cases of their test stand for."""
    slow = slow_cases()
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _ranks_end_with_the_session() -> Iterator[None]:
    yield
    close_pools()


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves an environment variable or a thread behind, and close a process group that it opened."""
    variables = _environment()
    had_group = dist.is_initialized()
    threads = set(threading.enumerate())
    yield
    after = _environment()
    assert after == variables, f"environment changed: {set(after.items()) ^ set(variables.items())}"
    left = _threads_beside(threads)
    if left:
        # A thread that ends with its owner outlives the test if the owner is in a cycle.
        gc.collect()
        # On a busy machine one that was told to end may still be ending.
        for thread in _threads_beside(threads):
            thread.join(timeout=5)
        left = _threads_beside(threads)
    assert not left, f"threads left running: {left}"
    if dist.is_initialized() and not had_group:
        dist.destroy_process_group()  # later tests would take themselves for its rank 0


def _threads_beside(known: set[threading.Thread]) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t not in known and t.is_alive() and not t.daemon]


def _environment() -> dict[str, str]:
    # The first step of any torch optimizer in a process sets the second one, the import of DeepSpeed the third, and
    # torch's compiler and Triton those of the prefixes (KMP_: that of OpenMP).
    passing = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK")
    prefixes = ("_TORCHINDUCTOR_", "TRITON_", "KMP_")
    return {name: value for name, value in os.environ.items() if name not in passing and not name.startswith(prefixes)}
