"""Smaller micro-batches when memory runs out, with the same optimizer steps.

One rank by itself goes on at the same sample, unless its strategy keeps the model in a form of its own. Of several
ranks, those that did not run out wait in collectives of a step that will never be whole, and what the strategy has
built holds on to their group; so the rank that ran out notes the smaller size in `output_dir` and fails, and the
launcher starts all of them again.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from paceline.environment.logging import get_logger
from paceline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from paceline.trainer.arguments.arguments import TrainingArguments
    from paceline.trainer.core import TrainerCore
    from paceline.trainer.loops.training import TrainingLoop
    from paceline.trainer.trainer import Trainer

__all__ = [
    "agree_on_micro_batch",
    "can_retry_in_process",
    "halve_micro_batch",
    "noted_micro_batch",
    "record_halved_batch",
]

logger = get_logger(__name__)

NOTE = "auto_batch_size.json"
_KEY = "per_device_train_batch_size"


def noted_micro_batch(args: TrainingArguments) -> int | None:
    """The size that a rank noted before the launcher started all of them again; None if it did not."""
    if not args.auto_find_batch_size:
        return None
    world, note = args.world, Path(args.output_dir) / NOTE
    if world.restart_count == 0:
        # Of another launch. All ranks meet before one could note anything.
        note.unlink(missing_ok=True)
    if not note.exists():
        return None
    return int(json.loads(note.read_text(encoding="utf-8"))[_KEY])


def agree_on_micro_batch(trainer: TrainerCore) -> None:
    """Take the smallest size that any rank found noted: machines may see different folders.

    Collective: every rank must call it.
    """
    if not trainer.args.auto_find_batch_size or trainer.accelerator.num_processes == 1:
        return
    own = trainer._batch_plan[0]
    least = min(trainer.accelerator.gather_object([own]))
    if least == own:
        return
    trainer._batch_plan = trainer.args.batch_plan(trainer.accelerator.num_processes, least)
    trainer.create_accelerator_and_postprocess()


def can_retry_in_process(trainer: Trainer) -> bool:
    """Whether this process can go on in smaller micro-batches; else the launcher must start all ranks again.

    Raises:
        ConfigError: It must, and starts nothing again.
    """
    accelerator, world = trainer.accelerator, trainer.args.world
    alone = accelerator.num_processes == 1 and accelerator.strategy.prepares_again
    if not alone and world.max_restarts == 0:
        what = (
            f"was asked for on {accelerator.num_processes} rank(s) under {accelerator.strategy.name}, and their "
            "launcher starts nothing again (max_restarts is 0)"
        )
        why = "where memory runs out in the middle of a step, all ranks must start anew"
        hint = "launch with --max_restarts 4: each of them halves the micro-batch"
        raise ConfigError([Problem("TrainingArguments(…)", "auto_find_batch_size", what, why, hint)])
    return alone


def record_halved_batch(trainer: Trainer) -> None:
    """Leave half the micro-batch for the ranks that the launcher starts in place of these."""
    args, micro = trainer.args, trainer._batch_plan[0] // 2
    world = args.world
    if world.restart_count >= world.max_restarts:
        logger.warning(
            "Memory ran out on rank %d with micro-batches of %d, and the ranks were started again as often as "
            "max_restarts allows (%d).",
            world.rank, trainer._batch_plan[0], world.max_restarts, main_process_only=False,
        )  # fmt: skip
        return
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # Several ranks may run out at once: each writes a file of its own and puts the whole of it in place.
    aside = folder / f".{NOTE}.{world.rank}"
    aside.write_text(json.dumps({_KEY: micro}), encoding="utf-8")
    aside.replace(folder / NOTE)
    logger.warning(
        "Memory ran out on rank %d; the ranks are started again with micro-batches of %d.",
        world.rank, micro, main_process_only=False,
    )  # fmt: skip


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
