"""One seed for Python, NumPy and torch."""

from __future__ import annotations

import random

import numpy as np
import torch


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False, *, rank: int = 0) -> None:
    """Seed every generator that training draws from.

    Args:
        seed: Not negative.
        device_specific: Add `rank`, so that dropout and augmentation differ between ranks.
        deterministic: Ask torch for deterministic kernels; those that have none raise.
        rank: This process's rank; only read with `device_specific`.
    """
    if device_specific:
        seed += rank
    random.seed(seed)
    np.random.seed(seed % 2**32)  # the global generator is what scripts draw from
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
