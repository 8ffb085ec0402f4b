"""One seed for Python, NumPy and torch."""

from __future__ import annotations

import os
import random

import numpy as np
import torch
import torch.distributed as dist

from paceline.environment.world import World


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False, *, rank: int | None = None) -> None:
    """Seed every generator that training draws from.

    Args:
        seed: Any whole number.
        device_specific: Add this process's rank, so that dropout and augmentation differ between ranks.
        deterministic: Ask torch for deterministic kernels; those that have none raise.
        rank: What to add; None finds the rank out, in the process group or from the launcher's variables.

    Raises:
        WorldError: The rank was to be found out, and the launcher's variables contradict each other.
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
