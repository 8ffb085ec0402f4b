"""Which checkpoint is the best: of those that were saved, the one with the best metric, whichever came first."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.environment.logging import get_logger

if TYPE_CHECKING:
    from paceline.trainer.arguments.arguments import TrainingArguments
    from paceline.trainer.state import TrainerState

__all__ = ["find_best_again", "go_on", "is_best_saved", "note_checkpoint", "note_metric", "watch_metric"]

logger = get_logger(__name__)


def note_metric(state: TrainerState, value: float, *, greater: bool) -> bool:
    """Note what an evaluation gave for the weights of this step; say whether it is the best so far."""
    if math.isnan(value):
        return False
    state.last_metric, state.last_metric_step = value, state.global_step
    _match(state, greater=greater)
    if not _gains(value, state.best_metric, greater=greater):
        return False
    state.best_metric, state.best_global_step = value, state.global_step
    return True


def note_checkpoint(state: TrainerState, folder: str, *, greater: bool) -> None:
    """Note that the weights of this step are in `folder`."""
    state.last_checkpoint, state.last_checkpoint_step = folder, state.global_step
    _match(state, greater=greater)


def _match(state: TrainerState, *, greater: bool) -> None:
    """Compare the last checkpoint with the best one, where its weights were measured: before it was saved, or after."""
    value, folder = state.last_metric, state.last_checkpoint
    if value is None or folder is None or state.last_metric_step != state.last_checkpoint_step:
        return
    if _gains(value, state.best_saved_metric, greater=greater):
        state.best_saved_metric, state.best_model_checkpoint = value, folder


def _gains(value: float, best: float | None, *, greater: bool) -> bool:
    if best is None:
        return True
    return value > best if greater else value < best


def is_best_saved(state: TrainerState) -> bool:
    """Whether the best that was measured was saved, or something as good."""
    return state.best_model_checkpoint is not None and state.best_saved_metric == state.best_metric


def watch_metric(state: TrainerState, args: TrainingArguments) -> None:
    """Forget what was the best by another metric than this run's."""
    metric = [args.metric_for_best_model, args.greater_is_better]
    if state.best_metric is not None and state.best_by not in (None, metric):
        logger.warning(
            "The best so far (%s at step %s) was measured by metric_for_best_model=%r with greater_is_better=%s, and "
            "this run says %r with %s: what is the best begins anew.",
            state.best_metric, state.best_global_step, *(state.best_by or ()), *metric,
        )  # fmt: skip
        state.best_metric = state.best_saved_metric = state.last_metric = None
        state.best_global_step = state.last_metric_step = None
        state.best_model_checkpoint = None
    state.best_by = metric


def find_best_again(state: TrainerState, resumed_from: Path) -> str | None:
    """Where the best checkpoint so far is: beside the one that a run goes on from, else where it was; None if nowhere.

    A run whose folder was moved has it under its name there.
    """
    if state.best_model_checkpoint is None:
        return None
    recorded = Path(state.best_model_checkpoint)
    found = next((path for path in (resumed_from.parent / recorded.name, recorded) if path.is_dir()), None)
    return None if found is None else str(found)


def go_on(state: TrainerState, resumed_from: str, best: str | None) -> None:
    """Take over what was the best, after a checkpoint was loaded.

    Args:
        state: As it was loaded.
        resumed_from: That checkpoint.
        best: What `find_best_again` found on rank 0.
    """
    state.last_checkpoint, state.last_checkpoint_step = resumed_from, state.global_step
    if best is None and state.best_model_checkpoint is not None:
        logger.warning(
            "The best checkpoint so far, %s (%s), is not there any more: the best from here on is taken.",
            state.best_model_checkpoint, state.best_saved_metric,
        )  # fmt: skip
        state.best_saved_metric = None
    state.best_model_checkpoint = best
