"""How a training goes on from a checkpoint that may have counted its steps otherwise."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR

from paceline.environment.logging import get_logger
from paceline.errors import CheckpointError
from paceline.trainer.callbacks.base import length_of
from paceline.trainer.model_files import STATE_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.trainer.loops.training import Plan, TrainingLoop
    from paceline.trainer.trainer import Trainer

__all__ = ["Pace", "carry_over", "pace_of", "take_over"]

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """What an optimizer step is; 0 where that is not known.

    Attributes:
        samples_per_step: Samples of a step over all ranks.
        updates_per_pass: Steps of a pass.
    """

    samples_per_step: int = 0
    updates_per_pass: int = 0

    @classmethod
    def saved(cls, state: Mapping[str, Any]) -> Pace:
        """That of the run which saved a state."""
        return cls(int(state.get("samples_per_step", 0)), int(state.get("updates_per_pass", 0)))


def pace_of(plan: Plan, loader: Any, accumulation: int) -> Pace:
    """That of this run; a loader of a subclass may have a batch size of its own."""
    total = getattr(loader, "total_batch_size", None)
    updates = 0 if length_of(loader) is None else plan.updates_per_pass
    return Pace(total * accumulation if total else plan.batch_size, updates)


def take_over(trainer: Trainer, loop: TrainingLoop, folder: str) -> Pace:
    """Go on where the transformers Trainer was, whose checkpoint was loaded; return what a step of it was.

    The order of its samples is not ours, so that only the end of a pass is a place to go on from.

    Raises:
        CheckpointError: The checkpoint does not say how far its training was, or lies within a pass.
    """
    state, path = trainer.state, Path(folder) / STATE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {STATE_FILE}",
            "The weights and the optimizer were found, but not how far the training was: it would begin at step 0",
            "Load it in a script with accelerator.load_state, or begin anew with its weights in the model",
        )
    held = json.loads(path.read_text(encoding="utf-8"))
    epoch = float(held.get("epoch") or 0)
    passes = math.ceil(epoch - 1e-6)
    if passes - epoch > 1e-6 and not trainer.args.ignore_data_skip:
        raise CheckpointError(
            f"{folder} was saved by another library within a pass, at epoch {epoch:g}",
            "Its samples come in another order here, so that some would be seen twice and others not at all",
            "Go on from a checkpoint at the end of a pass, or say ignore_data_skip=True to begin the next one",
        )
    state.load_state_dict({**held, "stateful_callbacks": {}})
    if state.best_model_checkpoint is not None:
        state.best_saved_metric = state.best_metric
    state.passes, state.updates_in_pass = passes, 0
    loop.logged_at = state.global_step
    loop.loader.set_epoch(passes)
    return Pace(0, round(state.global_step / epoch)) if passes else Pace()


def carry_over(trainer: Trainer, loop: TrainingLoop, saved: Pace, folder: str) -> None:
    """Count what is left to train in this run's steps, after a checkpoint was loaded.

    Within a pass an optimizer step must take as many samples as before. At the end of a pass anything may have
    changed: the passes that are left are trained, and the schedule goes on at the same share of the training.

    Args:
        trainer: Whose state was loaded.
        loop: About to go on.
        saved: Of the run that saved.
        folder: The checkpoint, for messages.

    Raises:
        CheckpointError: The steps to come would be others, or lie before the checkpoint.
    """
    state, plan = trainer.state, loop.plan
    own = Pace(state.samples_per_step, state.updates_per_pass)
    place = loop.loader.state_dict()
    is_within = not place["ended"] and bool(place["samples"] or place["batches"])
    is_pass_over = not state.updates_in_pass or 0 < saved.updates_per_pass <= state.updates_in_pass
    if is_pass_over and is_within:
        # A pass that was left before its end: the loader must not go on with the rest of it.
        loop.loader.set_epoch(place["epoch"] + 1)
    elif is_within and saved.samples_per_step not in (0, own.samples_per_step):
        raise _steps_differ(saved, own, folder)
    elif not is_within and state.updates_in_pass:
        is_pass_over = True
    if is_pass_over and state.updates_in_pass:
        # It was saved with the last step of a pass, before what is due at its end.
        state.updates_in_pass = plan.updates_per_pass
    counts_passes = trainer.args.max_steps <= 0
    is_same = saved.samples_per_step in (0, own.samples_per_step) and saved.updates_per_pass == own.updates_per_pass
    if counts_passes and is_pass_over and saved.updates_per_pass and not is_same:
        _count_anew(trainer, plan, saved, own)
    state.max_steps = plan.max_steps + (state.extra_steps if counts_passes else 0)
    _check_rest(trainer, plan, folder)


def _steps_differ(saved: Pace, own: Pace, folder: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} lies within a pass that was trained in steps of {saved.samples_per_step} samples, and this run's "
        f"steps have {own.samples_per_step}",
        "The rest of the pass would be counted in other steps than its beginning",
        f"Keep ranks x per_device_train_batch_size x gradient_accumulation_steps at {saved.samples_per_step}, or go on "
        "from a checkpoint at the end of a pass",
    )


def _count_anew(trainer: Trainer, plan: Plan, saved: Pace, own: Pace) -> None:
    """Go on counting in steps of another size: so many passes are done, whatever their steps were."""
    state = trainer.state
    passes = state.passes + (state.updates_in_pass > 0)
    done = passes * plan.updates_per_pass
    state.extra_steps = state.global_step - done
    if done and not trainer.scheduler_follows_metric:
        _move_schedule(trainer, done)
    logger.warning(
        "The checkpoint counted %d steps a pass, and this run has %d, of %d samples: from the end of pass %d on it "
        "trains %d more steps, and the learning rate goes on as after step %d of %d.",
        saved.updates_per_pass, own.updates_per_pass, own.samples_per_step, passes,
        max(0, plan.max_steps - done), done, plan.max_steps,
    )  # fmt: skip


def _move_schedule(trainer: Trainer, step: int) -> None:
    """Put the schedule that the arguments describe where it is after so many steps.

    Raises:
        CheckpointError: It is one of the script's or of DeepSpeed's own, which nobody else can count anew.
    """
    schedule = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    if trainer._describes_schedule and isinstance(schedule, LambdaLR):
        # By its own step, which knows how each optimizer keeps its rate.
        schedule.last_epoch = step - 1
        schedule.step()
        return
    raise CheckpointError(
        f"The checkpoint counted its steps otherwise, and {type(schedule).__name__} counts steps",
        "It was not made from the arguments, so that nobody can say where it is after as many passes",
        "Keep the samples of an optimizer step, leave the schedule to lr_scheduler_type, or say max_steps",
    )


def _check_rest(trainer: Trainer, plan: Plan, folder: str) -> None:
    """Refuse an end before the checkpoint; say it where nothing is left to train."""
    state = trainer.state
    counts_passes = trainer.args.max_steps <= 0
    if state.global_step > state.max_steps:
        said = (
            f"num_train_epochs={trainer.args.num_train_epochs:g}" if counts_passes else f"max_steps={state.max_steps}"
        )
        raise CheckpointError(
            f"{folder} is at step {state.global_step} (epoch {state.epoch:g}), and {said} ends before that",
            "Nothing would be trained, and the model would be one of more steps than were asked for",
            "Say how long the whole training is to be, or go on from an earlier checkpoint",
        )
    passes = state.passes + (state.updates_in_pass >= plan.updates_per_pass)
    if state.global_step == state.max_steps or (counts_passes and passes >= plan.num_train_epochs):
        logger.warning("The training in %s was over at step %d: nothing is left to train.", folder, state.global_step)
