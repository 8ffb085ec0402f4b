"""Dynamic loss scaling for fp16, with one verdict for all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.amp.grad_scaler import GradScaler, OptState

from paceline.errors import SteppingError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from paceline.collectives import Group
    from paceline.config import GradScalerKwargs


class LossScaler(GradScaler):
    """torch's gradient scaler, whose finding of an overflow is agreed by every rank.

    Under sharding an overflow may show in one rank's shard only. If that rank alone skipped its step, the
    ranks would part for good. The scale is adapted when the next loss is scaled, so several optimizers may
    unscale and step in any order before that.
    """

    def __init__(self, settings: GradScalerKwargs, device: torch.device, group: Group) -> None:
        super().__init__(
            device.type,
            init_scale=settings.init_scale,
            growth_factor=settings.growth_factor,
            backoff_factor=settings.backoff_factor,
            growth_interval=settings.growth_interval,
            enabled=settings.enabled,
        )
        self._group = group
        self._stepped = False

    def scale(self, outputs: Any) -> Any:
        """Multiply a loss by the current scale, after adapting it to how the last steps went."""
        if self._stepped:
            self._stepped = False
            self.update()
        return super().scale(outputs)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, once a step; again is nothing.

        Collective: every rank must call it.
        """
        if not self.is_enabled() or self.is_unscaled(optimizer):
            return
        if self._scale is None:
            raise SteppingError(
                "A step was asked for before any loss was scaled",
                "fp16 gradients exist only after accelerator.backward(loss)",
                "Call accelerator.backward(loss) instead of loss.backward()",
            )
        super().unscale_(optimizer)
        for found in self._found(optimizer):
            self._group.all_reduce(found, "max")

    def is_unscaled(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer's gradients were already divided in this step."""
        return self._per_optimizer_states[id(optimizer)]["stage"] is OptState.UNSCALED

    def step_if_finite(self, optimizer: Optimizer) -> bool:
        """Step unless some rank found an overflow; say whether the step was taken.

        Reads one number from the device: whether to move the scheduler is decided on the host.
        Collective: every rank must call it.
        """
        self.unscale_(optimizer)
        taken = not any(bool(found.item()) for found in self._found(optimizer))
        self.step(optimizer)
        self._stepped = True
        return taken

    def _found(self, optimizer: Optimizer) -> list[torch.Tensor]:
        found: dict[torch.device, torch.Tensor] = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        return list(found.values())
