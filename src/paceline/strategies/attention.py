"""Which kernels compute attention while models are prepared."""

from __future__ import annotations

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
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._choice = context.config.attention_kernels
        self._in_use: FlashAttention | None = None

    def use(self) -> None:
        """Use them from now on, if they are to be used and can be.

        Raises:
            ConfigError: The configuration asks for kernels that cannot be used here.
        """
        if self._in_use is None and self._are_chosen():
            from paceline.nn.flash_attention import FlashAttention

            self._in_use = FlashAttention()

    def _are_chosen(self) -> bool:
        device = self._context.device
        is_faster = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _FASTER_ON
        if self._choice == "torch" or (self._choice == "auto" and not is_faster):
            return False
        # A module of its own, which few runs need.
        from paceline.nn.flash_attention import unusable_reason

        reason = unusable_reason(device)
        if reason is not None and self._choice == "flash-attn-4":
            hint = "write attention_kernels: auto, or pip install --pre flash-attn-4 on a Hopper or Blackwell GPU"
            what, where = "flash-attn-4 cannot be used", self._context.source_of("attention_kernels")
            raise ConfigError([Problem(where, "attention_kernels", what, reason, hint)])
        return reason is None

    def release(self) -> None:
        """Leave attention to torch's kernels again, unless another Accelerator uses these."""
        if self._in_use is not None:
            self._in_use.release()
            self._in_use = None

    def describe(self) -> str | None:
        """Describe in one line which kernels are used; None where they are torch's."""
        return None if self._in_use is None else f"{self._in_use.describe()} (attention_kernels: {self._choice})"
