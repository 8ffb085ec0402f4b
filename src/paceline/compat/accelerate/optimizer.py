"""The prepared optimizer, under Accelerate's name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.accelerator import stepping
from paceline.compat.accelerate.settings.errors import UnsupportedError
from paceline.compat.accelerate.state import AcceleratorState, GradientState

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["AcceleratedOptimizer"]


class AcceleratedOptimizer(stepping.AcceleratedOptimizer):
    """An optimizer that steps and drops gradients only where `sync_gradients` is true. `prepare` makes it.

    Args:
        optimizer: The optimizer to step.
        device_placement: Accepted: the state follows the parameters.
        scaler: The loss scaler of fp16.
        core: What the core hands over.

    Raises:
        UnsupportedError: A program makes one itself.
    """

    def __init__(self, optimizer: Optimizer, device_placement: bool = True, scaler: Any = None, **core: Any) -> None:
        if "window" not in core:
            raise UnsupportedError(
                "AcceleratedOptimizer(…) was made by the program",
                "Only prepare() connects an optimizer to the Accelerator that says when it steps",
                "Write optimizer = accelerator.prepare(optimizer)",
            )
        super().__init__(optimizer, scaler=scaler, **core)
        self.scaler = scaler
        self.device_placement = device_placement
        self.accelerator_state = AcceleratorState()
        self.gradient_state = GradientState()

    @property
    def _is_overflow(self) -> bool:
        """Whether the last step was skipped: the name under which programs set it, in tests of schedules."""
        return self.step_was_skipped

    @_is_overflow.setter
    def _is_overflow(self, value: bool) -> None:
        self.step_was_skipped = value

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop gradients where `sync_gradients` is true, whether before or after the backward pass.

        Args:
            set_to_none: False writes zeros; else their memory is freed.
        """
        if self.gradient_state.sync_gradients:
            self.drop_gradients(set_to_none is None or set_to_none)
