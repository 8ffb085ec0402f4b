"""Dynamic loss scaling for fp16, in which all ranks skip the same steps."""

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
    """torch's gradient scaler, with an overflow on one rank skipping the step on all.

    Under sharding an overflow may show in one rank's shard only. If only that rank skipped its step, the ranks'
    weights would differ from then on. The scale is updated when the next loss is scaled, so several optimizers may
    unscale and step in any order before that.

    Args:
        settings: Initial scale, growth and backoff.
        device: Where gradients are.
        group: All ranks.
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
        """Multiply a loss by the scale, after updating that for the steps since the last loss."""
        if self._stepped:
            self._stepped = False
            self.update()
        return super().scale(outputs)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the optimizer's gradients by the scale; a second call before the step does nothing.

        Collective: every rank must call it.

        Raises:
            SteppingError: No loss was scaled yet.
        """
        if not self.is_enabled() or self.is_unscaled(optimizer):
            return
        if self._scale is None:
            raise SteppingError(
                "Gradients were unscaled before any loss was scaled",
                "fp16 gradients exist only after accelerator.backward(loss)",
                "Call accelerator.backward(loss) instead of loss.backward()",
            )
        super().unscale_(optimizer)
        for found_inf in self._found_inf(optimizer):
            self._group.all_reduce(found_inf, "max")

    def is_unscaled(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer's gradients were already divided for the coming step."""
        return self._per_optimizer_states[id(optimizer)]["stage"] is OptState.UNSCALED

    def step_if_finite(self, optimizer: Optimizer) -> bool:
        """Step unless some rank found an overflow; return whether the step was taken.

        Reads one number from the device: whether the scheduler steps is decided on the host.
        Collective: every rank must call it.

        Raises:
            SteppingError: None of the optimizer's parameters has a gradient.
        """
        self.unscale_(optimizer)
        found = self._found_inf(optimizer)
        if self.is_enabled() and not found:
            raise SteppingError(
                f"{type(optimizer).__name__} was stepped under mixed_precision='fp16', and its parameters have no "
                "gradients",
                "The loss scaler has nothing to check for an overflow",
                "Call accelerator.backward() on a loss that depends on them before the step, or leave the step out",
            )
        taken = not any(bool(found_inf.item()) for found_inf in found)
        self.step(optimizer)
        self._stepped = True
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and the steps since it grew, as they are when the next loss is scaled."""
        state: dict[str, Any] = super().state_dict()
        if not state or not self._stepped or self._scale is None or self._growth_tracker is None:
            return state
        # On copies: an optimizer may have unscaled its gradients, and step after this.
        scale, steps = self._scale.clone(), self._growth_tracker.clone()
        found = [value.to(scale.device) for values in self._all_found_inf() for value in values]
        growth = (self._growth_factor, self._backoff_factor, self._growth_interval)
        torch._amp_update_scale_(scale, steps, torch.stack(found).sum(0), *growth)
        return {**state, "scale": scale.item(), "_growth_tracker": int(steps.item())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a scale; steps since the last loss count no more."""
        self._stepped = False
        self._per_optimizer_states.clear()
        super().load_state_dict(state_dict)

    def _all_found_inf(self) -> list[list[torch.Tensor]]:
        states: list[dict[str, Any]] = list(self._per_optimizer_states.values())
        return [list(state["found_inf_per_device"].values()) for state in states]

    def _found_inf(self, optimizer: Optimizer) -> list[torch.Tensor]:
        by_device: dict[torch.device, torch.Tensor] = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        return list(by_device.values())
