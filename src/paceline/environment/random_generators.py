"""The random generators of Python, NumPy and torch: one seed for all of them, and their states."""

from __future__ import annotations

import gc
import operator
import os
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from paceline.environment.world import World
from paceline.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["get_rng_states", "is_seeded", "set_rng_states", "set_seed", "state_of", "uninterrupted"]

# Scripts use seeds that NumPy accepts too; torch itself begins with 64 random bits.
_LARGEST_SEED = 2**32


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False, *, rank: int | None = None) -> None:
    """Seed the generators of Python, NumPy and torch on all devices.

    >>> set_seed(42)
    >>> first = torch.rand(2)
    >>> set_seed(42)
    >>> torch.equal(first, torch.rand(2))
    True

    Args:
        seed: Any integer, also one of NumPy or a tensor.
        device_specific: Add this process's rank, so that dropout and augmentation differ between ranks.
        deterministic: Make torch use deterministic kernels; operations without one raise.
        rank: The rank to add; None takes it from the process group or the launcher's variables.

    Raises:
        UsageError: The seed is not an integer.
        WorldError: The rank is taken from the launcher's variables, and they contradict each other.
    """
    seed = _as_integer(seed)
    if device_specific:
        seed += _own_rank() if rank is None else rank
    random.seed(seed)
    np.random.seed(seed % 2**32)  # the global generator is what scripts draw from
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def _as_integer(seed: Any) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        raise UsageError(
            f"set_seed got {seed!r}, a {type(seed).__name__}",
            "A seed is an integer: Python, NumPy and torch have no other kind in common",
            "Pass an int, or leave the call out if the run needs no seed",
        ) from None


def is_seeded() -> bool:
    """Tell whether a run can be repeated.

    Returns:
        Whether torch's generator was given a seed.
    """
    return torch.initial_seed() < _LARGEST_SEED


def _own_rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return World.read(os.environ).rank


def uninterrupted(*calls: partial[Any]) -> list[Any]:
    """Call functions in C one after another, while no other thread runs and no garbage is collected.

    The interpreter changes threads between calls made by Python code, and not between these. A collection could run a
    finalizer, or free a tensor, and either lets another thread run.

    Args:
        calls: Of functions that do not release the interpreter themselves.

    Returns:
        What they return, in order.
    """
    restore = gc.enable if gc.isenabled() else gc.disable
    _, *results, _ = map(partial.__call__, (partial(gc.disable), *calls, partial(restore)))
    return results


def state_of(generator: torch.Generator) -> torch.Tensor:
    """Read a generator's state, in whichever thread.

    torch locks the generator while it makes the tensor. If another thread ran meanwhile and read the same generator,
    both would wait for ever.

    Args:
        generator: Of any device.

    Returns:
        Its state, as `generator.get_state()` returns it.
    """
    state: torch.Tensor
    (state,) = uninterrupted(partial(generator.get_state))
    return state


def get_rng_states(device: torch.device) -> dict[str, Any]:
    """Read the states of the generators of Python, NumPy, torch and a device.

    Args:
        device: A device whose generator is read too, if it is a CUDA device.

    Returns:
        The states by library, as numbers, lists and tensors.
    """
    version, words, cached = random.getstate()
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(words), cached],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": state_of(torch.default_generator),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_states(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore the states that `get_rng_states` returned; the device's only if its type is the same.

    Args:
        state: The states.
        device: The device of this rank.
    """
    version, words, cached = state["python"]
    random.setstate((version, tuple(words), cached))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
