"""Random number generators: seeded, and made the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from paceline.collectives import broadcast
from paceline.compat.accelerate.settings.enums import RNGType
from paceline.compat.accelerate.settings.errors import InvalidValueError
from paceline.compat.accelerate.state import PartialState, current_group
from paceline.environment import random_generators

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["set_seed", "synchronize_rng_state", "synchronize_rng_states"]


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seed the generators of Python, NumPy and torch on all devices.

    Args:
        seed: Any integer.
        device_specific: Add this rank, so that dropout differs between ranks.
        deterministic: Make torch use deterministic kernels; operations without one raise.
    """
    rank = PartialState().process_index if device_specific else 0
    random_generators.set_seed(seed, device_specific, deterministic, rank=rank)


def synchronize_rng_state(rng_type: RNGType | None = None, generator: torch.Generator | None = None) -> None:
    """Give a generator the state that it has on rank 0.

    Collective: every rank must call it.

    Args:
        rng_type: Which one: torch's for the CPU, that of a device, or `generator`.
        generator: The generator, for `RNGType.GENERATOR`.

    Raises:
        InvalidValueError: There is no such generator here.
    """
    get_state, set_state = _accessors(rng_type, generator)
    state = get_state()
    broadcast(current_group(), state)
    set_state(state)


def synchronize_rng_states(rng_types: Iterable[str | RNGType], generator: torch.Generator | None = None) -> None:
    """Give several generators the states that they have on rank 0. Collective: every rank must call it.

    Args:
        rng_types: Which ones, by member or value of `RNGType`.
        generator: The generator that "generator" stands for.
    """
    for rng_type in rng_types:
        synchronize_rng_state(RNGType(rng_type), generator=generator)


def _accessors(
    rng_type: RNGType | None, generator: torch.Generator | None
) -> tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], Any]]:
    if rng_type is RNGType.TORCH:
        return torch.get_rng_state, torch.set_rng_state
    if rng_type is RNGType.GENERATOR:
        if generator is None:
            raise InvalidValueError(
                "The state of a generator is to be synchronized", "There is none", "Pass generator=..."
            )
        return generator.get_state, generator.set_state
    name = "" if rng_type is None else rng_type.value
    module = getattr(torch, name, None) if name else None
    if module is None or not module.is_available():
        raise InvalidValueError(
            f"The generator {name or None!r} is to be synchronized",
            "This machine has no such device",
            "Leave it out of rng_types",
        )
    return module.get_rng_state, module.set_rng_state
