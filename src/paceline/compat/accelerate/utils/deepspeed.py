"""What programs import for DeepSpeed. The engine is the core's: it steps where the prepared optimizer does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.compat.accelerate.optimizer import AcceleratedOptimizer
from paceline.compat.accelerate.scheduler import AcceleratedScheduler
from paceline.compat.accelerate.settings.deepspeed_file import HfDeepSpeedConfig
from paceline.compat.accelerate.settings.errors import InvalidValueError
from paceline.strategies.placeholders import DummyOptim, DummyScheduler

if TYPE_CHECKING:
    import torch

    from paceline.compat.accelerate.settings.deepspeed import DeepSpeedPlugin
    from paceline.compat.accelerate.state import AcceleratorState

__all__ = [
    "DeepSpeedEngineWrapper",
    "DeepSpeedOptimizerWrapper",
    "DeepSpeedSchedulerWrapper",
    "DummyOptim",
    "DummyScheduler",
    "HfDeepSpeedConfig",
    "get_active_deepspeed_plugin",
    "map_pytorch_optim_to_deepspeed",
]


class DeepSpeedEngineWrapper:
    """Calls an engine: a backward, and where the window ends a step.

    Args:
        engine: DeepSpeed's engine.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Compute gradients; at the end of the window step and drop them, which zero_grad of the engine does.

        Args:
            loss: One value.
            sync_gradients: Whether the window ends here.
            kwargs: Passed on to the engine.
        """
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if sync_gradients:
            self.engine.step()

    def get_global_grad_norm(self) -> float | None:
        """The norm of the last step's gradients over all ranks."""
        norm = self.engine.get_global_grad_norm()
        return float(norm) if hasattr(norm, "item") else norm


class DeepSpeedOptimizerWrapper(AcceleratedOptimizer):
    """The prepared optimizer of an engine."""


class DeepSpeedSchedulerWrapper(AcceleratedScheduler):
    """A schedule that belongs to an engine, which counts each step once."""

    is_of_engine = True


def get_active_deepspeed_plugin(state: AcceleratorState) -> DeepSpeedPlugin:
    """Return the plugin of DeepSpeed that is in use.

    Raises:
        InvalidValueError: The run does not use DeepSpeed, or several plugins are there and none is selected.
    """
    plugin = state.deepspeed_plugin
    if plugin is None:
        raise InvalidValueError(
            f"The active plugin of DeepSpeed is requested under {state.distributed_type}",
            "There is none",
            "Pass deepspeed_plugin to the Accelerator, or select one of several by name",
        )
    return plugin


def map_pytorch_optim_to_deepspeed(optimizer: Any) -> Any:
    """Return the optimizer that an engine steps in place of one of torch.

    Args:
        optimizer: The program's own.

    Returns:
        The same one: the core hands it to the engine, which steps it on its shards.
    """
    return optimizer
