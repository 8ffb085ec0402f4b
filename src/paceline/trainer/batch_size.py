"""Smaller micro-batches when memory runs out, with the same optimizer steps."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

from paceline.environment.logging import get_logger
from paceline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from paceline.trainer.loop import TrainingLoop
    from paceline.trainer.trainer import Trainer

__all__ = ["halve_micro_batch", "is_out_of_memory", "refuse_several_ranks"]

logger = get_logger(__name__)

_WORDS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS)


def refuse_several_ranks(trainer: Trainer) -> None:
    """Refuse to look for a batch size where ranks would have to find it together.

    Raises:
        ConfigError: There are several ranks.
    """
    ranks = trainer.accelerator.num_processes
    if ranks > 1:
        what = f"was asked for on {ranks} ranks"
        why = "one that runs out of memory leaves the others waiting in their collectives"
        hint = "find the size on one rank, and set global_batch_size with per_device_train_batch_size"
        raise ConfigError([Problem("TrainingArguments(…)", "auto_find_batch_size", what, why, hint)])


def halve_micro_batch(trainer: Trainer, loop: TrainingLoop) -> None:
    """Go on with the step that ran out of memory, in more and smaller micro-batches."""
    micro = trainer._batch_plan[0] // 2
    trainer._batch_plan = trainer.args.batch_plan(trainer.accelerator.num_processes, micro)
    logger.warning("Memory ran out; going on with micro-batches of %d, %d to a step.", *trainer._batch_plan)
    # The place lies between two steps, whose samples stay, so that the loader knows it in smaller batches as well.
    loop.model.zero_grad(set_to_none=True)
    loop.meter.drop_open_step()
    gc.collect()
    if trainer.accelerator.device.type != "cpu":
        torch.accelerator.empty_cache()
    trainer.rebuild(loop)
