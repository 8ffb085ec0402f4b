"""Scales and clips gradients that DeepSpeed's engines hold: each rank its own shards, by the norm over all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.strategies.deepspeed.partitions import norm_of
from paceline.strategies.protocols import multiply

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from paceline.collectives import Group
    from paceline.strategies.deepspeed.engine import ZeroEngine

    LocalGradients = list[tuple[ZeroEngine, list[Tensor]]]


def local_gradients(
    engines: Iterable[ZeroEngine], parameters: Iterable[nn.Parameter], device: torch.device
) -> LocalGradients:
    """This rank's shards of the gradients of some parameters, by engine."""
    requested = {id(p) for p in parameters}
    result: LocalGradients = []
    for zero in engines:
        shards = [zero.partitions.gradient(p) for group in zero.groups for p in group if id(p) in requested]
        result.append((zero, [gradient for gradient in shards if gradient is not None]))
    if device.type != "cpu" and any(shard.device.type == "cpu" for _, shards in result for shard in shards):
        # DeepSpeed copies offloaded gradients to the host asynchronously.
        torch.accelerator.synchronize(device)
    return result


@torch.no_grad()
def clip_norm(
    gradients: LocalGradients, max_norm: float, norm_type: float, group: Group, device: torch.device
) -> Tensor:
    """Scale gradients so that their norm over all ranks is at most `max_norm`; return the norm before, shape []."""
    largest = norm_type == float("inf")
    total = torch.zeros((), device=device)
    for zero, shards in gradients:
        share = norm_of(shards, norm_type, device)
        if zero.partitions.is_sharded:
            group.all_reduce(share, "max" if largest else "sum")
        scale = zero.partitions.loss_scale
        share = share / (scale if largest else scale**norm_type)
        total = torch.maximum(total, share) if largest else total + share
        zero.is_clipped = True
    total = total if largest else total.pow(1.0 / norm_type)
    # The same guard as torch.nn.utils.clip_grad_norm_.
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for _, shards in gradients:
        multiply(shards, factor)
    return total


@torch.no_grad()
def clip_value(gradients: LocalGradients, value: float) -> None:
    """Clamp every element to [-value, value], without the loss scale."""
    for zero, shards in gradients:
        limit = value * zero.partitions.loss_scale
        for shard in shards:
            shard.clamp_(-limit, limit)
