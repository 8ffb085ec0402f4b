"""How long a training is, in steps and epochs, and the size of an optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.trainer.argument_errors import field_error
from paceline.trainer.callbacks.base import length_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.accelerator.accelerator import Accelerator
    from paceline.trainer.arguments.arguments import TrainingArguments

__all__ = ["StepSize", "TrainingLength", "require_even_batches", "step_size", "training_length"]


@dataclass(frozen=True, slots=True)
class TrainingLength:
    """How long a training is.

    Attributes:
        max_steps: Optimizer steps of the whole training.
        num_train_epochs: Epochs of the whole training, rounded up.
        steps_per_epoch: Optimizer steps of an epoch; `max_steps` if the data has no length.
        epochs_per_step: The fraction of an epoch that an optimizer step is.
        batch_size: Samples of an optimizer step over all ranks.
        num_samples: Samples of the whole training.
    """

    max_steps: int
    num_train_epochs: int
    steps_per_epoch: int
    epochs_per_step: float
    batch_size: int
    num_samples: int


def training_length(args: TrainingArguments, loader: Any, *, accumulation: int, batch_size: int) -> TrainingLength:
    """Compute the steps and epochs of a training.

    Args:
        args: The arguments.
        loader: The prepared loader of the training set.
        accumulation: Micro-batches of an optimizer step.
        batch_size: Samples of an optimizer step over all ranks.

    Raises:
        ConfigError: The data has no length, and `max_steps` is not given.
    """
    batches = length_of(loader)
    if batches is None:
        if args.max_steps <= 0:
            raise field_error("max_steps", "is missing for data without length", hint="give a number of steps")
        samples = args.max_steps * batch_size
        return TrainingLength(args.max_steps, 2**31, args.max_steps, 1 / args.max_steps, batch_size, samples)
    updates, share = max(1, math.ceil(batches / accumulation)), accumulation / batches
    length = getattr(loader, "total_dataset_length", None)
    if args.global_batch_size is not None and length:
        # Computed from samples rather than batches, so that it does not depend on how a step is split.
        updates, share = math.ceil(length / batch_size), batch_size / length
        if args.dataloader_drop_last:
            updates = max(1, length // batch_size)
            share = 1 / updates
    if args.max_steps > 0:
        epochs = math.ceil(args.max_steps / updates)
        return TrainingLength(args.max_steps, epochs, updates, share, batch_size, args.max_steps * batch_size)
    steps = math.ceil(args.num_train_epochs * updates)
    samples = int((length or batches * batch_size) * args.num_train_epochs)
    return TrainingLength(steps, math.ceil(args.num_train_epochs), updates, share, batch_size, samples)


def require_even_batches(accelerator: Accelerator, loader: Any) -> None:
    """Refuse to train if some ranks would run out of batches before others. Collective: every rank must call it.

    Raises:
        ConfigError: `even_batches` is off, and ranks have different numbers of batches.
    """
    if accelerator.even_batches or not accelerator.use_distributed:
        return
    counts = accelerator.gather_object([length_of(loader)])
    if len(set(counts)) > 1:
        raise field_error(
            "accelerator_config.even_batches",
            f"False, and ranks have {', '.join(map(str, counts))} batches per epoch",
            "ranks with more batches would wait forever for the gradients of the others",
            "leave it out, or set dataloader_drop_last",
        )


@dataclass(frozen=True, slots=True)
class StepSize:
    """The size of an optimizer step; fields are 0 if unknown.

    Attributes:
        samples: Samples of a step over all ranks.
        per_epoch: Steps of an epoch.
    """

    samples: int = 0
    per_epoch: int = 0

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> StepSize:
        """The step size of the run whose state this is."""
        return cls(int(state.get("samples_per_step", 0)), int(state.get("updates_per_pass", 0)))


def step_size(length: TrainingLength, loader: Any, accumulation: int) -> StepSize:
    """The step size of this run; the loader of a subclass may have its own batch size."""
    total = getattr(loader, "total_batch_size", None)
    per_epoch = 0 if length_of(loader) is None else length.steps_per_epoch
    return StepSize(total * accumulation if total else length.batch_size, per_epoch)
