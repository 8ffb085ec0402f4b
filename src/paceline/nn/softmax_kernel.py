"""A Triton kernel: the losses of a chunk of logits, and their gradient in place of them, in two passes over memory.

The same with torch's operations takes three times the memory traffic, and an fp32 copy of the logits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["has_kernel", "losses_and_gradients"]

_BLOCK = 8192


@lru_cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def kernel(  # type: ignore[no-untyped-def]
        logits, targets, losses, ignore_index, smoothing, z_loss,
        num_classes: tl.constexpr, block: tl.constexpr, smooths: tl.constexpr, needs_gradient: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        logits += row * num_classes
        target = tl.load(targets + row)
        if target == ignore_index:
            tl.store(losses + row, 0.0)
            return
        # Read before the second pass overwrites it.
        of_target = tl.load(logits + target).to(tl.float32)
        peak = float("-inf")
        total = 0.0
        sum_of_all = 0.0
        for start in range(0, num_classes, block):
            columns = start + tl.arange(0, block)
            x = tl.load(logits + columns, mask=columns < num_classes, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(peak, tl.max(x, 0))
            total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), 0)
            peak = higher
            if smooths:
                sum_of_all += tl.sum(tl.where(columns < num_classes, x, 0.0), 0)
        log_sum = peak + tl.log(total)
        share = smoothing / num_classes
        loss = log_sum - (1 - smoothing) * of_target - share * sum_of_all + z_loss * log_sum * log_sum
        tl.store(losses + row, loss)
        if needs_gradient:
            factor = 1 + 2 * z_loss * log_sum
            for start in range(0, num_classes, block):
                columns = start + tl.arange(0, block)
                x = tl.load(logits + columns, mask=columns < num_classes, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(x - log_sum) * factor - share
                gradient = tl.where(columns == target, gradient - (1 - smoothing), gradient)
                tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=columns < num_classes)

    return kernel


def losses_and_gradients(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needs_gradient: bool,
) -> Tensor:
    """Compute the loss of each row, and replace the logits by their gradients.

    Args:
        logits: Shape [tokens, classes], contiguous; rows of ignored targets keep what they have.
        targets: Shape [tokens].
        ignore_index: See `linear_cross_entropy`.
        label_smoothing: See `linear_cross_entropy`.
        z_loss: See `linear_cross_entropy`.
        needs_gradient: False leaves the logits.

    Returns:
        In fp32, shape [tokens].
    """
    tokens, classes = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    if tokens:
        _kernel()[(tokens,)](
            logits, targets, losses, ignore_index, float(label_smoothing), float(z_loss),
            num_classes=classes, block=_BLOCK, smooths=label_smoothing > 0, needs_gradient=needs_gradient, num_warps=16,
        )  # fmt: skip
    return losses


@lru_cache
def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel can be built for a device, and computes what torch computes.

    Args:
        device: Where the logits are.
        dtype: Of the logits.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float32):
        return False
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(3, 5 + _BLOCK, device=device, generator=generator).to(dtype)
    targets = torch.tensor([4, _BLOCK + 1, 0], device=device)
    expected = F.cross_entropy(logits.float(), targets, reduction="none")
    probabilities = logits.float().softmax(-1).to(dtype)
    try:
        found = losses_and_gradients(
            logits, targets, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, needs_gradient=True
        )
    except Exception:  # Triton is missing, or there is no compiler for its launcher.
        return False
    logits.scatter_add_(1, targets[:, None], torch.ones(3, 1, device=device, dtype=dtype))
    return bool(torch.allclose(found, expected, rtol=1e-4)) and bool((logits - probabilities).abs().max() < 1e-2)
