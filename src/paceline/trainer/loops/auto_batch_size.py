"""`auto_find_batch_size`: smaller micro-batches when memory runs out, for the same optimizer steps.

A single rank continues at the same sample, unless its strategy cannot prepare a model twice. With several ranks, the
others wait in collectives of a step that is never completed. So the rank that ran out of memory writes the smaller
size into `output_dir` and fails, and the launcher restarts all of them.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from paceline.accelerator.oom_report import find_out_of_memory
from paceline.environment.logging import get_logger
from paceline.trainer.argument_errors import field_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.accelerator.accelerator import Accelerator
    from paceline.trainer.arguments.arguments import BatchPlan, TrainingArguments
    from paceline.trainer.loops.training import TrainingLoop
    from paceline.trainer.protocol import TrainerHooks

__all__ = ["agree_on_plan", "recorded_micro_batch", "run_with_smaller_batches"]

logger = get_logger(__name__)

_FILE = "auto_batch_size.json"
_KEY = "per_device_train_batch_size"


def recorded_micro_batch(args: TrainingArguments) -> int | None:
    """The size that a rank recorded before the launcher restarted all of them; None if none did."""
    if not args.auto_find_batch_size:
        return None
    world, record = args.world, Path(args.output_dir) / _FILE
    if world.restart_count == 0:
        # From another launch. All ranks meet before one could write a new record.
        record.unlink(missing_ok=True)
    if not record.exists():
        return None
    return int(json.loads(record.read_text(encoding="utf-8"))[_KEY])


def agree_on_plan(args: TrainingArguments, accelerator: Accelerator, plan: BatchPlan) -> BatchPlan:
    """The plan with the smallest micro-batch of any rank; machines may not share `output_dir`.

    Collective: every rank must call it.
    """
    if not args.auto_find_batch_size or accelerator.num_processes == 1:
        return plan
    least = min(accelerator.gather_object([plan.micro_batch]))
    if least == plan.micro_batch:
        return plan
    return args.batch_plan(accelerator.num_processes, least)


def run_with_smaller_batches(
    hooks: TrainerHooks, loop: TrainingLoop, plan: BatchPlan, prepare_again: Callable[[BatchPlan], None]
) -> None:
    """Run the loop; each time memory runs out in a micro-batch, halve it and continue.

    Args:
        hooks: Everything is prepared.
        loop: About to run.
        plan: The current batch sizes.
        prepare_again: Prepares the same model and optimizer for other batch sizes.

    Raises:
        ConfigError: All ranks would have to restart, and the launcher restarts none.
    """
    can_retry, has_begun = _can_retry_in_process(hooks), False
    while True:
        try:
            if has_begun:
                return loop.run_until_done()
            return loop.run()
        except (MemoryError, RuntimeError) as error:
            # Evaluations and optimizer steps do not fit better with smaller batches, and the latter may be half done.
            if find_out_of_memory(error) is None or not loop.in_batch or plan.micro_batch == 1:
                raise
            if not can_retry:
                _record_halved_batch(hooks.args, plan.micro_batch)
                raise
        has_begun = True
        plan = hooks.args.batch_plan(hooks.accelerator.num_processes, plan.micro_batch // 2)
        logger.warning("Out of memory: continuing with micro-batches of %d, %d per step.", *plan)
        _free_step(hooks, loop)
        prepare_again(plan)


def _can_retry_in_process(hooks: TrainerHooks) -> bool:
    """Whether this process can continue with smaller micro-batches; else the launcher must restart all ranks.

    Raises:
        ConfigError: It must, and `max_restarts` is 0.
    """
    accelerator = hooks.accelerator
    can_retry = accelerator.num_processes == 1 and accelerator.strategy.prepares_again
    if not can_retry and hooks.args.world.max_restarts == 0:
        raise field_error(
            "auto_find_batch_size",
            f"set for {accelerator.num_processes} rank(s) under {accelerator.strategy.name}, but the launcher does not "
            "restart ranks (max_restarts is 0)",
            "when memory runs out within a step, all ranks must restart",
            "launch with --max_restarts 4: each restart halves the micro-batch",
        )
    return can_retry


def _record_halved_batch(args: TrainingArguments, micro_batch: int) -> None:
    """Write half the micro-batch for the restarted ranks."""
    world = args.world
    if world.restart_count >= world.max_restarts:
        logger.warning(
            "Out of memory on rank %d with micro-batches of %d, and max_restarts (%d) is used up.",
            world.rank, micro_batch, world.max_restarts, main_process_only=False,
        )  # fmt: skip
        return
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # Several ranks may run out of memory at once: each writes its own file and renames it.
    temporary = folder / f".{_FILE}.{world.rank}"
    temporary.write_text(json.dumps({_KEY: micro_batch // 2}), encoding="utf-8")
    temporary.replace(folder / _FILE)
    logger.warning(
        "Out of memory on rank %d: restarting with micro-batches of %d.",
        world.rank, micro_batch // 2, main_process_only=False,
    )  # fmt: skip


def _free_step(hooks: TrainerHooks, loop: TrainingLoop) -> None:
    """Discard the step that ran out of memory; it is repeated from its first sample."""
    loop.model.zero_grad(set_to_none=True)
    loop.meter.drop_open_step()
    gc.collect()
    if hooks.accelerator.device.type != "cpu":
        torch.accelerator.empty_cache()
