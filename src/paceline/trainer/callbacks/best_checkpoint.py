"""The best checkpoint: the one with the best metric among those saved, whichever of saving and measuring came first."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.environment.logging import get_logger
from paceline.errors import PacelineError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.trainer.arguments.arguments import TrainingArguments
    from paceline.trainer.state import TrainerState

__all__ = [
    "forget_other_metric",
    "is_best_saved",
    "locate_best",
    "metric_key",
    "note_checkpoint",
    "note_metric",
    "note_metrics",
    "read_metric",
    "restore_best",
]

logger = get_logger(__name__)


def metric_key(name: str) -> str:
    """The name of a metric in the results of an evaluation, which all begin with `eval_`."""
    if name.startswith("eval_"):
        return name
    return f"eval_{name}"


def note_metrics(state: TrainerState, args: TrainingArguments, metrics: Mapping[str, float]) -> bool:
    """Record `metric_for_best_model` of an evaluation; return whether it is the best so far.

    Raises:
        PacelineError: The evaluation has no such metric.
    """
    name = args.metric_for_best_model
    if name is None:
        return False
    return note_metric(state, read_metric(name, metrics), greater=bool(args.greater_is_better))


def read_metric(name: str | None, metrics: Mapping[str, float]) -> float:
    """The metric of an evaluation that decides which weights are better; None is the loss.

    Raises:
        PacelineError: The evaluation has no such metric.
    """
    key = metric_key(name or "loss")
    if key not in metrics:
        raise PacelineError(
            f"metric_for_best_model={name!r}, which is {key}",
            f"The evaluation gives {', '.join(metrics)}",
            "Name one of them",
        )
    return float(metrics[key])


def note_metric(state: TrainerState, value: float, *, greater: bool) -> bool:
    """Record the metric of the current weights; return whether it is the best so far."""
    if math.isnan(value):
        return False
    state.last_metric, state.last_metric_step = value, state.global_step
    _compare(state, greater=greater)
    if not _is_better(value, state.best_metric, greater=greater):
        return False
    state.best_metric, state.best_global_step = value, state.global_step
    return True


def note_checkpoint(state: TrainerState, folder: str, *, greater: bool) -> None:
    """Record that the current weights are being saved into `folder`."""
    state.last_checkpoint, state.last_checkpoint_step = folder, state.global_step
    _compare(state, greater=greater)


def _compare(state: TrainerState, *, greater: bool) -> None:
    """Compare the last checkpoint with the best one, if the last metric is of the same step."""
    value, folder = state.last_metric, state.last_checkpoint
    if value is None or folder is None or state.last_metric_step != state.last_checkpoint_step:
        return
    if _is_better(value, state.best_saved_metric, greater=greater):
        state.best_saved_metric, state.best_model_checkpoint = value, folder


def _is_better(value: float, best: float | None, *, greater: bool) -> bool:
    if best is None:
        return True
    return value > best if greater else value < best


def is_best_saved(state: TrainerState) -> bool:
    """Whether a checkpoint has the best metric that was measured."""
    return state.best_model_checkpoint is not None and state.best_saved_metric == state.best_metric


def forget_other_metric(state: TrainerState, args: TrainingArguments) -> None:
    """Discard the best so far, with a warning, if it was measured with another metric than this run's."""
    metric = [args.metric_for_best_model, args.greater_is_better]
    if state.best_metric is not None and state.best_by not in (None, metric):
        logger.warning(
            "The best so far (%s at step %s) was measured with metric_for_best_model=%r and greater_is_better=%s, but "
            "this run has %r and %s: the search for the best checkpoint starts over.",
            state.best_metric, state.best_global_step, *(state.best_by or ()), *metric,
        )  # fmt: skip
        state.best_metric = state.best_saved_metric = state.last_metric = None
        state.best_global_step = state.last_metric_step = None
        state.best_model_checkpoint = None
    state.best_by = metric


def locate_best(state: TrainerState, resumed_from: Path) -> str | None:
    """The folder of the best checkpoint so far: next to the one that is resumed, or where it was; None if nowhere.

    It is next to the resumed one if the whole folder was moved.
    """
    if state.best_model_checkpoint is None:
        return None
    recorded = Path(state.best_model_checkpoint)
    for candidate in (resumed_from.parent / recorded.name, recorded):
        if candidate.is_dir():
            return str(candidate)
    return None


def restore_best(state: TrainerState, resumed_from: str, best: str | None) -> None:
    """Continue the search for the best checkpoint after a checkpoint was loaded.

    Args:
        state: As loaded.
        resumed_from: The checkpoint.
        best: What `locate_best` returned on rank 0.
    """
    state.last_checkpoint, state.last_checkpoint_step = resumed_from, state.global_step
    if best is None and state.best_model_checkpoint is not None:
        logger.warning(
            "The best checkpoint so far, %s (%s), no longer exists: the next best one replaces it.",
            state.best_model_checkpoint, state.best_saved_metric,
        )  # fmt: skip
        state.best_saved_metric = None
    state.best_model_checkpoint = best
