"""The states of this process's random number generators, as numbers, lists and tensors."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["get_rng_states", "set_rng_states"]


def get_rng_states(device: torch.device) -> dict[str, Any]:
    """Return the states of the generators of Python, NumPy, torch and `device`."""
    version, words, cached = random.getstate()
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(words), cached],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_states(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore the states that `get_rng_states` returned; the device's only if its type is the same."""
    version, words, cached = state["python"]
    random.setstate((version, tuple(words), cached))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
