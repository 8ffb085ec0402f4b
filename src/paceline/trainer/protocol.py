"""What the loops and other parts of a training need of the `Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from paceline.trainer.callbacks.base import CallbackOwner

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from paceline.accelerator.accelerator import Accelerator

__all__ = ["TrainerHooks"]


class TrainerHooks(CallbackOwner, Protocol):
    """The public attributes of a `Trainer` that its parts use, and the methods that subclasses may override.

    Attributes change during a training (the model is prepared again for smaller micro-batches, callbacks may
    replace the control), so they are read each time.
    """

    accelerator: Accelerator
    model: nn.Module
    model_wrapped: nn.Module
    optimizer: Any
    lr_scheduler: Any
    label_names: list[str]
    eval_dataset: Any
    processing_class: Any
    compute_loss_func: Callable[..., Tensor] | None
    compute_metrics: Any
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None
    tokens_seen: int

    @property
    def _objects_of_script(self) -> list[str]:
        """The attributes that hold the script's own objects."""
        ...

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Forward and backward of a micro-batch."""
        ...

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """The loss of a micro-batch."""
        ...

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, predictions and labels of a batch."""
        ...

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the evaluation set."""
        ...

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add an entry to the log."""
        ...

    def save_checkpoint(self) -> None:
        """Write a checkpoint."""
        ...

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the weights."""
        ...
