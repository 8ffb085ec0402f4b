"""The choice of a strategy: DDP if the training state fits, else FSDP2 with as little sharding as possible."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.planner.footprint import Footprint

# The fraction of free memory that parameters, gradients and optimizer state may take; the rest is for activations
# and temporary buffers, whose size only a run can tell.
_SHARE_FOR_STATE = 0.7
# With less than half of the memory left for activations, recomputing them is the cheaper way to fit.
_SHARE_BEFORE_CHECKPOINTING = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyChoice:
    """A strategy, its settings, and why it was chosen.

    Attributes:
        strategy: `single`, `ddp` or `fsdp`.
        settings: Fields of `FullyShardedDataParallelPlugin` that differ from its defaults.
        reason: One line for the log.
    """

    strategy: str
    settings: dict[str, Any] = field(default_factory=dict)
    reason: str


def choose_strategy(footprint: Footprint, *, free: int, ranks: int, device: str) -> StrategyChoice:
    """Choose the least sharding under which the training state fits with head-room.

    Args:
        footprint: The training state of one unsharded copy.
        free: Bytes free on every rank's device, at least.
        ranks: Number of ranks that can share the state.
        device: The device's name in the reason.
    """
    if ranks == 1:
        return StrategyChoice(strategy="single", reason="single: there is one process")
    available = free + footprint.placed
    usable = int(available * _SHARE_FOR_STATE)
    need = f"parameters + gradients + optimizer state take {_bytes(footprint.total)}"
    have = f"{_bytes(usable)} of the {_bytes(available)} free for each rank on {device} are available for them"
    if footprint.total <= usable:
        return StrategyChoice(strategy="ddp", reason=f"ddp: {need} on every rank; {have}")
    for bytes_, settings, what in _candidates(footprint, ranks, available):
        if bytes_ <= usable:
            reason = f"fsdp, {what}: {need}, too much for one rank; {_bytes(bytes_)} sharded over {ranks} ranks; {have}"
            return StrategyChoice(strategy="fsdp", settings=settings, reason=reason)
    settings = {"cpu_offload": True, "activation_checkpointing": True}
    reason = f"fsdp, parameters in host memory: {need}, {_bytes(footprint.total // ranks)} per rank; {have}"
    return StrategyChoice(strategy="fsdp", settings=settings, reason=reason)


def _candidates(footprint: Footprint, ranks: int, available: int) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Yield (bytes per rank, settings, description), the fastest first and the smallest last."""
    shard = footprint.total // ranks
    yield shard + footprint.parameters, {"reshard_after_forward": False}, "parameters kept after the forward"
    if shard <= available * _SHARE_BEFORE_CHECKPOINTING:
        yield shard, {}, "parameters resharded after the forward"
    yield shard, {"activation_checkpointing": True}, "with activation checkpointing"


def _bytes(number: int) -> str:
    if number >= 2**24:
        return f"{number / 2**30:.2f} GiB"
    return f"{number / 2**20:.2f} MiB" if number >= 2**14 else f"{number / 2**10:.2f} KiB"
