"""The least sharding that fits: DDP, else FSDP2 with growing means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.planner.footprint import Footprint

# The part of the free memory that parameters, gradients and optimizer state may take; the rest is for
# activations and temporary buffers, which nothing but a run can tell.
_SHARE_FOR_STATE = 0.7
# With less than half of the memory left for activations, computing them again is the cheaper way to fit.
_SHARE_BEFORE_CHECKPOINTING = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyChoice:
    """A strategy, what it needs to be told, and why it was taken.

    Attributes:
        strategy: Its name.
        settings: Fields of `FullyShardedDataParallelPlugin` that differ from its defaults.
        reason: One line for people.
    """

    strategy: str
    settings: dict[str, Any] = field(default_factory=dict)
    reason: str


def choose_strategy(footprint: Footprint, *, free: int, ranks: int, device: str) -> StrategyChoice:
    """Take the least sharding under which the training state fits with head-room.

    Args:
        footprint: Of one whole copy.
        free: Bytes that every rank can have on its device, at least.
        ranks: Among how many the state may be cut.
        device: What to call the device in the reason.
    """
    if ranks == 1:
        return StrategyChoice(strategy="single", reason="single: there is one process")
    available = free + footprint.placed
    usable = int(available * _SHARE_FOR_STATE)
    need = f"parameters + gradients + optimizer state take {_gb(footprint.total)}"
    have = f"{_gb(usable)} of {_gb(available)} free on {device} are for them"
    if footprint.total <= usable:
        return StrategyChoice(strategy="ddp", reason=f"ddp: {need} on every rank; {have}")
    for bytes_, settings, what in _growing(footprint, ranks, available):
        if bytes_ <= usable:
            reason = f"fsdp, {what}: {need}, too much for a rank; {_gb(bytes_)} when cut in {ranks}; {have}"
            return StrategyChoice(strategy="fsdp", settings=settings, reason=reason)
    settings = {"cpu_offload": True, "activation_checkpointing": True}
    reason = f"fsdp, parameters in host memory: {need}, {_gb(footprint.total // ranks)} a rank; {have}"
    return StrategyChoice(strategy="fsdp", settings=settings, reason=reason)


def _growing(footprint: Footprint, ranks: int, available: int) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Yield (bytes a rank, settings, words) from the fastest way to the most frugal one."""
    shard = footprint.total // ranks
    yield shard + footprint.parameters, {"reshard_after_forward": False}, "parameters kept after the forward"
    if shard <= available * _SHARE_BEFORE_CHECKPOINTING:
        yield shard, {}, "parameters dropped after the forward"
    yield shard, {"activation_checkpointing": True}, "with activation checkpointing"


def _gb(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e7 else f"{number / 1e6:.2f} MB"
