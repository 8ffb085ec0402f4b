"""Which kernels compute attention while models are prepared."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from paceline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from paceline.nn.flash_attention import FlashAttention
    from paceline.strategies.context import RunContext

__all__ = ["AttentionKernels"]

# Where they were measured to be faster than torch's.
_FASTER_ON = 9


class AttentionKernels:
    """Puts other kernels behind torch's attention from the first prepared model until models are forgotten.

    Args:
        context: The run, with `attention_kernels` of its configuration.

    Raises:
        ConfigError: It names kernels that cannot be used here.
    """

    def __init__(self, context: RunContext) -> None:
        self._in_use: FlashAttention | None = None
        self._choice = context.config.attention_kernels
        device = context.device
        if self._choice == "flash-attn-4":
            # A module of its own, which few runs need.
            from paceline.nn.flash_attention import unusable_reason

            reason = unusable_reason(device)
            if reason is not None:
                hint = "write attention_kernels: auto, or pip install --pre flash-attn-4 on a Hopper or Blackwell GPU"
                what, where = "flash-attn-4 cannot be used", context.source_of("attention_kernels")
                raise ConfigError([Problem(where, "attention_kernels", what, reason, hint)])
        is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _FASTER_ON
        self._is_wanted = self._choice == "flash-attn-4" or (self._choice == "auto" and is_hopper)

    def use(self) -> None:
        """Use them from now on, if they are to be used and installed."""
        if self._in_use is not None or not self._is_wanted:
            return
        from paceline.nn.flash_attention import FlashAttention, unusable_reason

        self._is_wanted = unusable_reason(torch.device("cuda")) is None
        if self._is_wanted:
            self._in_use = FlashAttention()
            weakref.finalize(self, self._in_use.release).atexit = False

    def release(self) -> None:
        """Leave attention to torch's kernels again, unless another Accelerator uses these."""
        if self._in_use is not None:
            self._in_use.release()
            self._in_use = None

    def describe(self) -> str | None:
        """Describe in one line which kernels are used; None where they are torch's."""
        return None if self._in_use is None else f"{self._in_use.describe()} (attention_kernels: {self._choice})"
