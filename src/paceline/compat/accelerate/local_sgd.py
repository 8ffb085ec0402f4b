"""Averages weights every few steps instead of gradients in each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from paceline.compat.accelerate.settings.enums import DistributedType
from paceline.compat.accelerate.settings.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

    from paceline.compat.accelerate.accelerator import Accelerator

__all__ = ["LocalSGD"]


class LocalSGD:
    """Lets each rank train by itself, and averages the weights every `local_sgd_steps` steps and at the end.

    Args:
        accelerator: Of the run.
        model: Prepared.
        local_sgd_steps: Calls of `step` between two averages.
        enabled: False exchanges gradients as usual.

    Raises:
        UnsupportedError: The model is sharded.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, local_sgd_steps: int, enabled: bool = True) -> None:
        sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
        if accelerator.distributed_type in sharded:
            raise UnsupportedError(
                f"LocalSGD is made under {accelerator.distributed_type}",
                "No rank has the whole model, so none can train by itself",
                "Train with DDP, or leave LocalSGD out",
            )
        self.enabled = enabled and accelerator.use_distributed
        self.num_steps = 0
        self.accelerator = accelerator
        self.model = model
        self.local_sgd_steps = local_sgd_steps
        self._quiet: Any = None

    def __enter__(self) -> Self:
        if self.enabled:
            self._quiet = self.accelerator.no_sync(self.model)
            self._quiet.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if not self.enabled:
            return
        if error[0] is None:
            self._average()
        self._quiet.__exit__(*error)

    def step(self) -> None:
        """Count a step, and average the weights where it is due. Collective: every rank must call it."""
        self.num_steps += 1
        if self.enabled and self.num_steps % self.local_sgd_steps == 0:
            self._average()

    @torch.no_grad()
    def _average(self) -> None:
        self.accelerator.wait_for_everyone()
        for parameter in self.model.parameters():
            parameter.copy_(self.accelerator.reduce(parameter, reduction="mean"))
