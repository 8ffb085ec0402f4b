"""Resuming from a checkpoint, whose optimizer steps may have had another size."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR

from paceline.environment.logging import get_logger
from paceline.errors import CheckpointError, DamagedCheckpointError
from paceline.trainer import model_files
from paceline.trainer.callbacks import best_checkpoint
from paceline.trainer.loops.length import StepSize
from paceline.trainer.optim import optimizers
from paceline.trainer.optim.schedules import follows_metric

if TYPE_CHECKING:
    from paceline.trainer.loops.length import TrainingLength
    from paceline.trainer.loops.progress import Progress
    from paceline.trainer.loops.training import TrainingLoop
    from paceline.trainer.protocol import TrainerHooks

__all__ = ["resume_training"]

logger = get_logger(__name__)


def resume_training(
    hooks: TrainerHooks,
    loop: TrainingLoop,
    progress: Progress,
    requested: str | bool,
    *,
    has_own_optimizer: bool,
    has_own_schedule: bool,
) -> None:
    """Load a checkpoint and let the loop continue there. Collective: every rank must call it.

    Args:
        hooks: Everything is prepared.
        loop: About to run.
        progress: Is restored with the checkpoint.
        requested: A folder, or True for the newest complete checkpoint of `output_dir`, whichever library wrote it.
        has_own_optimizer: Whether the script gave an optimizer or a schedule, whose settings are its own business.
        has_own_schedule: Whether the schedule is not made from the arguments.

    Raises:
        CheckpointError: There is no checkpoint, or training cannot be resumed from it.
    """
    configured = optimizers.settings_of(hooks.optimizer)
    folder = _load(hooks, requested)
    if not has_own_optimizer:
        _warn_of_restored_settings(configured, optimizers.settings_of(hooks.optimizer))
    saved = progress.saved_step_size or _load_transformers_state(hooks, loop, folder)
    _convert_progress(hooks, loop, saved, folder, has_own_schedule=has_own_schedule)
    _restore_best(hooks, folder)
    if hooks.accelerator.is_main_process:
        model_files.warn_of_later(hooks.args.output_dir, folder, hooks.state.global_step)
    if hooks.args.ignore_data_skip:
        loop.loader.set_epoch(hooks.state.passes + 1)
    loop.resume()


def _load(hooks: TrainerHooks, requested: str | bool) -> str:
    output_dir = hooks.args.output_dir
    is_newest_wanted = str(requested).lower() == "true"
    folder = _newest_foreign(hooks) if is_newest_wanted else Path(str(requested)).expanduser()
    try:
        # Without a folder, all ranks agree on the newest complete one, and log each one that is skipped.
        loaded = hooks.accelerator.load_state(folder)
    except DamagedCheckpointError as error:
        weights = folder or model_files.newest_of(output_dir)
        if weights is None or not model_files.has_only_weights(weights):
            raise
        what = f"resume_from_checkpoint: {weights} contains only weights"
        hint = "Start a new training from these weights, or train without save_only_model"
        raise CheckpointError(what, "It was written with save_only_model", hint) from error
    if loaded is None:
        raise CheckpointError(
            f"resume_from_checkpoint=True, but there is no checkpoint in {output_dir}",
            "There is nothing to resume from",
            "Name a checkpoint, or leave the argument out to start a new training; "
            "get_last_checkpoint(output_dir) of paceline.trainer is the right value in both cases",
        )
    return loaded


def _newest_foreign(hooks: TrainerHooks) -> Path | None:
    """A checkpoint of another library that is the newest one, as rank 0 sees it; None if there is none."""
    output_dir, accelerator = Path(hooks.args.output_dir), hooks.accelerator
    found = model_files.newest_foreign(output_dir) if accelerator.is_main_process else None
    name = accelerator.broadcast_object_list([found and os.fspath(found.relative_to(output_dir))])[0]
    return None if name is None else output_dir / name


def _restore_best(hooks: TrainerHooks, resumed_from: str) -> None:
    # If machines have disks of their own, weights are loaded from rank 0's, and old checkpoints removed there.
    accelerator = hooks.accelerator
    local = None
    if accelerator.is_main_process:
        local = best_checkpoint.locate_best(hooks.state, Path(resumed_from))
    best_checkpoint.restore_best(hooks.state, resumed_from, accelerator.broadcast_object_list([local])[0])
    best_checkpoint.forget_other_metric(hooks.state, hooks.args)


def _warn_of_restored_settings(configured: list[dict[str, Any]], restored: list[dict[str, Any]]) -> None:
    """Warn of optimizer settings in the checkpoint that differ from the arguments."""
    for name, (from_arguments, from_checkpoint) in optimizers.differences(configured, restored).items():
        logger.warning(
            "The optimizer continues with %s = %s from the checkpoint, not %s from the arguments.",
            name, from_checkpoint, from_arguments,
        )  # fmt: skip


def _load_transformers_state(hooks: TrainerHooks, loop: TrainingLoop, folder: str) -> StepSize:
    """Take the progress from `trainer_state.json`, which transformers' Trainer wrote; return its step size.

    It shuffles differently, so that a training can only be resumed at the end of an epoch.

    Raises:
        CheckpointError: There is no such file, or the checkpoint is within an epoch.
    """
    state, path = hooks.state, Path(folder) / model_files.STATE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {model_files.STATE_FILE}",
            "It has weights and an optimizer, but not how far the training was: it would restart at step 0",
            "Load it in a script with accelerator.load_state, or start a new training from its weights",
        )
    saved = json.loads(path.read_text(encoding="utf-8"))
    epoch = float(saved.get("epoch") or 0)
    epochs = math.ceil(epoch - 1e-6)
    if epochs - epoch > 1e-6 and not hooks.args.ignore_data_skip:
        raise CheckpointError(
            f"{folder} was saved by another library within an epoch, at epoch {epoch:g}",
            "Samples have another order here: some would be trained on twice, and others never",
            "Resume from a checkpoint at the end of an epoch, or set ignore_data_skip=True to start the next one",
        )
    state.load_state_dict({**saved, "stateful_callbacks": {}})
    if state.best_model_checkpoint is not None:
        state.best_saved_metric = state.best_metric
    state.passes, state.updates_in_pass = epochs, 0
    loop.logged_at = state.global_step
    loop.loader.set_epoch(epochs)
    if epochs:
        return StepSize(0, round(state.global_step / epoch))
    return StepSize()


def _convert_progress(
    hooks: TrainerHooks, loop: TrainingLoop, saved: StepSize, folder: str, *, has_own_schedule: bool
) -> None:
    """Convert the progress of a checkpoint to steps of this run's size.

    Within an epoch, an optimizer step must have as many samples as before. At the end of an epoch everything may
    change: the remaining epochs are trained, and the schedule continues at the same fraction of the training.

    Raises:
        CheckpointError: Steps within the epoch would differ, or the training would end before the checkpoint.
    """
    state, length = hooks.state, loop.length
    current = StepSize(state.samples_per_step, state.updates_per_pass)
    is_epoch_over = _align_epoch(hooks, loop, saved, current, folder)
    counts_epochs = hooks.args.max_steps <= 0
    is_same = saved.samples in (0, current.samples) and saved.per_epoch == current.per_epoch
    if counts_epochs and is_epoch_over and saved.per_epoch and not is_same:
        _recount_steps(hooks, length, saved, current, has_own_schedule=has_own_schedule)
    state.max_steps = length.max_steps + (state.extra_steps if counts_epochs else 0)
    _check_remaining(hooks, length, folder)


def _align_epoch(hooks: TrainerHooks, loop: TrainingLoop, saved: StepSize, current: StepSize, folder: str) -> bool:
    """Make state and loader agree on whether an epoch is over; return whether it is."""
    state = hooks.state
    position = loop.loader.state_dict()
    is_within = not position["ended"] and bool(position["samples"] or position["batches"])
    is_epoch_over = not state.updates_in_pass or 0 < saved.per_epoch <= state.updates_in_pass
    # A callback ended the epoch in the step of the checkpoint.
    is_epoch_over |= hooks.control.should_epoch_stop
    if is_epoch_over and is_within:
        # The epoch was ended early: the loader must not continue with the rest of it.
        loop.loader.set_epoch(position["epoch"] + 1)
    elif is_within and saved.samples not in (0, current.samples):
        raise _steps_differ(saved, current, folder)
    elif not is_within and state.updates_in_pass:
        is_epoch_over = True
    if is_epoch_over and state.updates_in_pass:
        # The checkpoint was written after the last step of an epoch, before what is due at its end.
        state.updates_in_pass = loop.length.steps_per_epoch
    return is_epoch_over


def _steps_differ(saved: StepSize, current: StepSize, folder: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is within an epoch that was trained in steps of {saved.samples} samples, and this run's steps have "
        f"{current.samples}",
        "The rest of the epoch would be split into other steps than its beginning",
        f"Keep ranks x per_device_train_batch_size x gradient_accumulation_steps at {saved.samples}, or resume from a "
        "checkpoint at the end of an epoch",
    )


def _recount_steps(
    hooks: TrainerHooks, length: TrainingLength, saved: StepSize, current: StepSize, *, has_own_schedule: bool
) -> None:
    """Count completed epochs in steps of the new size, and move the schedule there."""
    state = hooks.state
    epochs = state.passes + (state.updates_in_pass > 0)
    done = epochs * length.steps_per_epoch
    state.extra_steps = state.global_step - done
    if done and not follows_metric(hooks.lr_scheduler):
        _move_schedule(hooks, done, has_own_schedule=has_own_schedule)
    logger.warning(
        "The checkpoint had %d steps per epoch, and this run has %d, of %d samples: after epoch %d it trains %d more "
        "steps, and the learning rate continues as after step %d of %d.",
        saved.per_epoch, current.per_epoch, current.samples, epochs,
        max(0, length.max_steps - done), done, length.max_steps,
    )  # fmt: skip


def _move_schedule(hooks: TrainerHooks, step: int, *, has_own_schedule: bool) -> None:
    """Set a schedule that was made from the arguments to an optimizer step.

    Raises:
        CheckpointError: It is a schedule of the script or of DeepSpeed.
    """
    schedule = getattr(hooks.lr_scheduler, "scheduler", hooks.lr_scheduler)
    if not has_own_schedule and isinstance(schedule, LambdaLR):
        # Through its own `step`, which knows how each optimizer stores its learning rate.
        schedule.last_epoch = step - 1
        schedule.step()
        return
    raise CheckpointError(
        f"The checkpoint had steps of another size, and {type(schedule).__name__} counts steps",
        "It was not made from the arguments, so its learning rate after as many epochs is unknown",
        "Keep the samples of an optimizer step, use lr_scheduler_type, or set max_steps",
    )


def _check_remaining(hooks: TrainerHooks, length: TrainingLength, folder: str) -> None:
    """Refuse to end before the checkpoint; warn if nothing is left to train."""
    args, state = hooks.args, hooks.state
    counts_epochs = args.max_steps <= 0
    if state.global_step > state.max_steps:
        end = f"num_train_epochs={args.num_train_epochs:g}" if counts_epochs else f"max_steps={state.max_steps}"
        raise CheckpointError(
            f"{folder} is at step {state.global_step} (epoch {state.epoch:g}), and {end} ends before that",
            "Nothing would be trained, and the model would have more steps than requested",
            "Give the length of the whole training, or resume from an earlier checkpoint",
        )
    epochs = state.passes + (state.updates_in_pass >= length.steps_per_epoch)
    if state.global_step == state.max_steps or (counts_epochs and epochs >= length.num_train_epochs):
        logger.warning(
            "The training in %s was complete at step %d: nothing is left to train.", folder, state.global_step
        )
