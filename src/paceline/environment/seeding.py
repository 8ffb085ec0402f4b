"""One seed for Python, NumPy and torch."""

from __future__ import annotations

import os
import random

import numpy as np
import torch
import torch.distributed as dist

from paceline.environment.world import World


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False, *, rank: int | None = None) -> None:
    """Seed the generators of Python, NumPy and torch on all devices.

    >>> set_seed(42)
    >>> first = torch.rand(2)
    >>> set_seed(42)
    >>> torch.equal(first, torch.rand(2))
    True

    Args:
        seed: Any integer.
        device_specific: Add this process's rank, so that dropout and augmentation differ between ranks.
        deterministic: Make torch use deterministic kernels; operations without one raise.
        rank: The rank to add; None takes it from the process group or the launcher's variables.

    Raises:
        WorldError: The rank is taken from the launcher's variables, and they contradict each other.
    """
    if device_specific:
        seed += _own_rank() if rank is None else rank
    random.seed(seed)
    np.random.seed(seed % 2**32)  # the global generator is what scripts draw from
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def _own_rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return World.read(os.environ).rank
