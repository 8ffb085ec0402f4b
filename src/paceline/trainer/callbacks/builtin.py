"""The callbacks that a Trainer has by default, and early stopping."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from paceline.errors import ConfigError, explains_keywords
from paceline.trainer.argument_errors import field_problem
from paceline.trainer.callbacks.base import TrainerCallback, length_of
from paceline.trainer.callbacks.best_checkpoint import metric_key
from paceline.trainer.callbacks.profiling import ProfileCallback
from paceline.trainer.callbacks.tracking import TrackedRun, TrackingCallback

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.trainer.arguments.arguments import TrainingArguments
    from paceline.trainer.state import TrainerControl, TrainerState

__all__ = [
    "DefaultFlowCallback",
    "EarlyStoppingCallback",
    "PrinterCallback",
    "ProgressCallback",
    "with_defaults",
]


def with_defaults(callbacks: Sequence[Any], args: TrainingArguments, run: TrackedRun) -> list[Any]:
    """The callbacks of a Trainer: the given ones between the built-in ones, in the order in which they are called."""
    is_quiet = args.disable_tqdm
    if is_quiet is None:
        # A bar redraws itself, which would fill a log file with lines.
        is_quiet = not (sys.stderr.isatty() or "ipykernel" in sys.modules)
    display = PrinterCallback() if is_quiet else ProgressCallback()
    profiling = []
    if args.profile_steps:
        profiling = [ProfileCallback(run.accelerator, args.profile_steps)]
    return [DefaultFlowCallback(), TrackingCallback(run), *profiling, *callbacks, display]


class DefaultFlowCallback(TrainerCallback):
    """Requests logging, evaluation, checkpoints and the end of training at the intervals of the arguments."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Request what is due after this step."""
        step = state.global_step
        first = step == 1 and args.logging_first_step
        control.should_log |= first or (args.logging_strategy == "steps" and step % state.logging_steps == 0)
        by_steps = args.eval_strategy == "steps" and step >= args.eval_delay
        control.should_evaluate |= by_steps and step % state.eval_steps == 0
        control.should_save |= args.save_strategy == "steps" and step % state.save_steps == 0
        if step >= state.max_steps:
            control.should_training_stop = True
            control.should_evaluate |= by_steps
            control.should_save |= args.save_strategy == "steps"

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Request what is due once per epoch."""
        control.should_log |= args.logging_strategy == "epoch"
        control.should_evaluate |= args.eval_strategy == "epoch" and state.epoch >= args.eval_delay
        control.should_save |= args.save_strategy == "epoch"


class EarlyStoppingCallback(TrainerCallback):
    """Stops training when `metric_for_best_model` has not improved for several evaluations.

    Args:
        early_stopping_patience: Consecutive evaluations without improvement after which training stops.
        early_stopping_threshold: An improvement must be larger than this.
    """

    @explains_keywords()
    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float = 0.0) -> None:
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.early_stopping_patience_counter = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Check that there will be a metric.

        Raises:
            ConfigError: There is no evaluation, or no metric is named.
        """
        problems = []
        if args.metric_for_best_model is None:
            what, hint = "is missing with an EarlyStoppingCallback", "name a metric"
            problems.append(field_problem("metric_for_best_model", what, hint=hint))
        if args.eval_strategy == "no":
            what, hint = "'no' with an EarlyStoppingCallback", "write steps or epoch"
            problems.append(field_problem("eval_strategy", what, hint=hint))
        if problems:
            raise ConfigError(problems)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Count evaluations without improvement, and stop after too many."""
        name = args.metric_for_best_model
        value = things["metrics"].get(metric_key(name))
        if value is None:  # another one of several evaluation sets; if none has the metric, the training raises
            return
        sign = 1 if args.greater_is_better else -1
        # NaN is never an improvement.
        gain = value
        if not math.isnan(value):
            gain = math.inf
        if state.best_metric is not None:
            gain = sign * (value - state.best_metric)
        if gain > max(0.0, self.early_stopping_threshold):
            self.early_stopping_patience_counter = 0
        else:
            self.early_stopping_patience_counter += 1
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def state_dict(self) -> dict[str, int]:
        """The count so far."""
        return {"counter": self.early_stopping_patience_counter}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the count."""
        self.early_stopping_patience_counter = state["counter"]


class ProgressCallback(TrainerCallback):
    """Shows a progress bar for training and one for evaluation, on rank 0."""

    def __init__(self) -> None:
        self._training: Any = None
        self._evaluation: Any = None
        self._shown = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Open the bar."""
        if state.is_world_process_zero:
            self._training = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)
        self._shown = state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Advance the bar."""
        if self._training is not None:
            self._training.update(state.global_step - self._shown)
            self._shown = state.global_step

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Advance the evaluation's bar; open it at the first batch."""
        if not state.is_world_process_zero:
            return
        if self._evaluation is None:
            total = length_of(things.get("eval_dataloader"))
            self._evaluation = tqdm(total=total, leave=self._training is None, dynamic_ncols=True)
        self._evaluation.update(1)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Close the evaluation's bar."""
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def on_predict(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **things: Any
    ) -> None:
        """Close the evaluation's bar."""
        self.on_evaluate(args, state, control)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Print the entry above the bar."""
        if state.is_world_process_zero and self._training is not None:
            self._training.write(as_line(things["logs"]))

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Close the bar."""
        if self._training is not None:
            self._training.close()
            self._training = None


class PrinterCallback(TrainerCallback):
    """Prints each log entry as a line, on rank 0."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Print the entry."""
        if state.is_world_process_zero:
            print(as_line(things["logs"]), flush=True)


def as_line(logs: dict[str, Any]) -> str:
    """A log entry as a line, with four significant digits."""
    return "{" + ", ".join(f"{name}: {_short(value)}" for name, value in logs.items()) + "}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
