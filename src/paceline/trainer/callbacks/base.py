"""Callbacks: what happens besides the loop, at moments that have names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from paceline.environment.logging import get_logger
from paceline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable

    from paceline.trainer.arguments.arguments import TrainingArguments
    from paceline.trainer.state import TrainerControl, TrainerState

__all__ = [
    "EVENTS",
    "CallbackHandler",
    "DefaultFlowCallback",
    "EarlyStoppingCallback",
    "PrinterCallback",
    "ProgressCallback",
    "TrainerCallback",
    "length_of",
]

logger = get_logger(__name__)

EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_evaluate",
    "on_predict",
    "on_save",
    "on_log",
    "on_prediction_step",
    "on_push_begin",
)


class TrainerCallback:
    """Override the events of interest; each gets (args, state, control, **things) and may return the control.

    Things are `model`, `processing_class`, `optimizer`, `lr_scheduler`, `train_dataloader`, `eval_dataloader`, and
    `metrics` or `logs` where there are some. A callback with `state_dict` and `load_state_dict` (of JSON values) is
    saved with every checkpoint.
    """

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """The Trainer was built."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """Training begins."""

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """Training is over."""

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """A pass begins."""

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """A pass is over."""

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """The first micro-batch of an optimizer step begins."""

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """A micro-batch is over that is not the last of its step."""

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """Gradients are final and clipped, and not used yet."""

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """The optimizer has stepped, and gradients are still there."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """An optimizer step is over."""

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """An evaluation is over; `metrics` has what it found."""

    def on_predict(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **things: Any
    ) -> Any:
        """A prediction is over."""

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """A checkpoint was written."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """`logs` were added to the history."""

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """A batch of an evaluation is over."""

    def on_push_begin(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """Never called: paceline uploads nothing."""


class CallbackHandler:
    """Calls every callback that has something to do at an event, in the order in which they were added."""

    def __init__(self, callbacks: Iterable[Any]) -> None:
        self.callbacks: list[Any] = []
        self.things: dict[str, Any] = {}
        self._by_event: dict[str, list[Any]] = {}
        for callback in callbacks:
            self.add_callback(callback)

    def add_callback(self, callback: Any) -> None:
        """Add a callback, or a class of which one is made; a second one of a class is added with a warning."""
        made = callback() if isinstance(callback, type) else callback
        if any(type(known) is type(made) for known in self.callbacks):
            logger.warning("A second %s was added to the callbacks; both are called.", type(made).__name__)
        self.callbacks.append(made)
        self._sort()

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, or the first of a class, and return it; None if there is none."""
        for known in self.callbacks:
            if known is callback or (isinstance(callback, type) and type(known) is callback):
                self.callbacks.remove(known)
                self._sort()
                return known
        return None

    def _sort(self) -> None:
        """Note who does something at each event, so that those who do not cost nothing in a step."""
        self._by_event = {
            event: [getattr(callback, event) for callback in self.callbacks if _acts_on(callback, event)]
            for event in EVENTS
        }

    def fire(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> TrainerControl:
        """Call the event on everyone, and return the control that is in force then."""
        for method in self._by_event[event]:
            control = method(args, state, control, **self.things, **more) or control
        return control

    def states(self) -> dict[str, Any]:
        """What callbacks with a state keep, by their classes' names."""
        saved: dict[str, Any] = {}
        for callback in self.callbacks:
            if hasattr(callback, "state_dict"):
                saved.setdefault(type(callback).__name__, []).append(callback.state_dict())
        return saved

    def load_states(self, saved: dict[str, Any]) -> None:
        """Give callbacks back what they kept."""
        left = {name: list(states) for name, states in saved.items()}
        for callback in self.callbacks:
            states = left.get(type(callback).__name__)
            if states and hasattr(callback, "load_state_dict"):
                callback.load_state_dict(states.pop(0))


def _acts_on(callback: Any, event: str) -> bool:
    method = getattr(type(callback), event, None)
    name = getattr(method, "__qualname__", "")
    return callable(method) and not name.startswith("TrainerCallback.")


class DefaultFlowCallback(TrainerCallback):
    """Says when to log, evaluate, save and stop, as the arguments ask."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Look at the number of the step."""
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
        """Look at what is done once a pass."""
        control.should_log |= args.logging_strategy == "epoch"
        control.should_evaluate |= args.eval_strategy == "epoch" and state.epoch >= args.eval_delay
        control.should_save |= args.save_strategy == "epoch"


class EarlyStoppingCallback(TrainerCallback):
    """Stops when the metric has not improved for several evaluations.

    Args:
        early_stopping_patience: Evaluations without an improvement that are borne.
        early_stopping_threshold: What an improvement must exceed.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float = 0.0) -> None:
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.early_stopping_patience_counter = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Check that there is a metric to look at."""
        problems = []
        if args.metric_for_best_model is None:
            problems.append(("metric_for_best_model", "is missing with an EarlyStoppingCallback", "name a metric"))
        if args.eval_strategy == "no":
            problems.append(("eval_strategy", "'no' with an EarlyStoppingCallback", "write steps or epoch"))
        if problems:
            raise ConfigError(Problem("TrainingArguments(…)", key, what, hint=hint) for key, what, hint in problems)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Count evaluations without an improvement."""
        name = args.metric_for_best_model
        value = things["metrics"].get(name if name.startswith("eval_") else f"eval_{name}")
        if value is None:  # of another one of several sets; where none gives it, the training says so
            return
        sign = 1 if args.greater_is_better else -1
        # What is no number is no gain.
        gain = value if math.isnan(value) else math.inf
        if state.best_metric is not None:
            gain = sign * (value - state.best_metric)
        if gain > max(0.0, self.early_stopping_threshold):
            self.early_stopping_patience_counter = 0
        else:
            self.early_stopping_patience_counter += 1
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def state_dict(self) -> dict[str, int]:
        """How many evaluations brought nothing."""
        return {"counter": self.early_stopping_patience_counter}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting."""
        self.early_stopping_patience_counter = state["counter"]


class ProgressCallback(TrainerCallback):
    """One bar for training and one for evaluation, on rank 0 only."""

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
        """Move the bar."""
        if self._training is not None:
            self._training.update(state.global_step - self._shown)
            self._shown = state.global_step

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Move the evaluation's bar, opening it first."""
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
        """Write the entry above the bar."""
        if state.is_world_process_zero and self._training is not None:
            self._training.write(shown(things["logs"]))

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Close the bar."""
        if self._training is not None:
            self._training.close()
            self._training = None


class PrinterCallback(TrainerCallback):
    """Prints each log entry as a line."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> None:
        """Print the entry on rank 0."""
        if state.is_world_process_zero:
            print(shown(things["logs"]), flush=True)


def length_of(loader: Any) -> int | None:
    """The batches of a loader; None if nobody knows."""
    try:
        return len(loader)
    except TypeError:
        return None


def shown(logs: dict[str, Any]) -> str:
    """A log entry as a line: four significant digits."""
    return "{" + ", ".join(f"{name}: {_short(value)}" for name, value in logs.items()) + "}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
