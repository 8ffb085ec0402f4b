"""Acting on the gradients that DeepSpeed's engines hold: each rank on its own runs, with the norm over all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.strategies.base import multiply
from paceline.strategies.deepspeed.partitions import norm_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn

    from paceline.collectives import Group
    from paceline.strategies.deepspeed.engine import ZeroEngine

    Runs = list[tuple[ZeroEngine, list[Tensor]]]


def runs_of(engines: Sequence[ZeroEngine], parameters: Iterable[nn.Parameter], device: torch.device) -> Runs:
    """This rank's runs of the gradients of some parameters, engine by engine."""
    asked = {id(p) for p in parameters}
    found: Runs = []
    for zero in engines:
        held = [zero.partitions.gradient(p) for group in zero.groups for p in group if id(p) in asked]
        found.append((zero, [gradient for gradient in held if gradient is not None]))
    if device.type != "cpu" and any(run.device.type == "cpu" for _, runs in found for run in runs):
        # Offloaded gradients are copied to the host behind its back.
        torch.accelerator.synchronize(device)
    return found


@torch.no_grad()
def clip_norm(found: Runs, max_norm: float, norm_type: float, group: Group, device: torch.device) -> Tensor:
    """Scale runs so that the norm over all ranks is at most `max_norm`; return the norm before, shape []."""
    largest = norm_type == float("inf")
    total = torch.zeros((), device=device)
    for zero, runs in found:
        share = norm_of(runs, norm_type, device)
        if zero.partitions.cut:
            group.all_reduce(share, "max" if largest else "sum")
        scale = zero.partitions.loss_scale
        share = share / (scale if largest else scale**norm_type)
        total = torch.maximum(total, share) if largest else total + share
        zero.clipped = True
    total = total if largest else total.pow(1.0 / norm_type)
    # The same guard as torch.nn.utils.clip_grad_norm_.
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for _, runs in found:
        multiply(runs, factor)
    return total


@torch.no_grad()
def clip_value(found: Runs, value: float) -> None:
    """Clamp every element of the runs to [-value, value], the loss scale taken out."""
    for zero, runs in found:
        limit = value * zero.partitions.loss_scale
        for run in runs:
            run.clamp_(-limit, limit)
