"""Optimizer states that torchao stores in 8 bits or fewer: checkpoints hold them in fp32, which all optimizers read.

They are rounded again before the first step after a load. Most values come back exactly; one block of 256 in which the
largest value of a signed state is negative may come back scaled by less than one percent.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["full_precision", "is_quantized", "quantize_before_step"]

_UNSIGNED = ("exp_avg_sq", "max_exp_avg_sq")


def is_quantized(tensor: Any) -> bool:
    """Whether a tensor, or this rank's part of it, is stored in a quantized form of torchao."""
    if "torchao" not in sys.modules:
        return False
    local = getattr(tensor, "_local_tensor", tensor)
    return type(local).__module__.startswith("torchao.optim.")


def full_precision(local: Tensor) -> Tensor:
    """The values of a quantized tensor, in fp32; any other tensor itself."""
    if not is_quantized(local):
        return local
    quantized: Any = local
    values: Tensor = quantized.dequantize()
    return values.float()


def quantize_before_step(optimizer: Optimizer) -> None:
    """Let an optimizer of torchao, whose state is about to be loaded in fp32, quantize it before its next step."""
    if not type(optimizer).__module__.startswith("torchao.optim."):
        return

    def quantize(stepping: Any, *_: Any) -> None:
        handle.remove()
        for group in stepping.param_groups:
            for parameter in group["params"]:
                state = stepping.state.get(parameter, {})
                for key in [key for key in state if key.startswith(("exp_avg", "max_exp_avg"))]:
                    _quantize(stepping, parameter, state, key)

    handle = optimizer.register_step_pre_hook(quantize)


@torch.no_grad()
def _quantize(optimizer: Any, parameter: Any, state: dict[str, Any], key: str) -> None:
    loaded = state[key]
    if is_quantized(loaded):
        return
    state[key] = optimizer._new_buffer(parameter, key not in _UNSIGNED)
    target, source = (getattr(one, "_local_tensor", one) for one in (state[key], loaded))
    target.copy_(source)
