"""When an optimizer step is taken: accumulation windows, loss weights, skipped steps and schedulers.

A window is the micro-batches between two optimizer steps. Gradients are the true mean over what was in it:

* `backward(loss)`: the mean over the micro-batches that the window really had, also in a short last window;
* `backward(loss_sum, weight=n)`: the sum over all ranks divided by the sum of all weights.

The divisor is applied as the first gradient of the backward pass, where it costs nothing. It is known before the
window ends in all cases but two (a stream that ends early, and weights over several micro-batches); then one multiply
over the gradients corrects it when the window closes. Nothing here reads a number from the device.
"""

from __future__ import annotations

from paceline.accelerator.stepping.loss import scalar_loss
from paceline.accelerator.stepping.loss_scaler import LossScaler
from paceline.accelerator.stepping.optimizer import AcceleratedOptimizer, steps_taken, unassigned_parameters
from paceline.accelerator.stepping.schedule_length import ScheduleLengthCheck, planned_steps
from paceline.accelerator.stepping.scheduler import AcceleratedScheduler, is_scheduler
from paceline.accelerator.stepping.window import (
    TRUE_MEAN,
    Accumulation,
    GradientBoundary,
    OwnBoundary,
    Window,
    WindowPolicy,
)

__all__ = [
    "TRUE_MEAN",
    "AcceleratedOptimizer",
    "AcceleratedScheduler",
    "Accumulation",
    "GradientBoundary",
    "LossScaler",
    "OwnBoundary",
    "ScheduleLengthCheck",
    "Window",
    "WindowPolicy",
    "is_scheduler",
    "planned_steps",
    "scalar_loss",
    "steps_taken",
    "unassigned_parameters",
]
