"""Callbacks: code that runs at named events of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from paceline.environment.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from paceline.trainer.arguments.arguments import TrainingArguments
    from paceline.trainer.state import TrainerControl, TrainerState

__all__ = ["EVENTS", "CallbackHandler", "CallbackOwner", "TrainerCallback", "fire", "length_of"]

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
# What an event has done. It is reset before callbacks are called, so that they can request it once more.
_DONE_BY = {"on_log": "should_log", "on_evaluate": "should_evaluate", "on_save": "should_save"}


class TrainerCallback:
    """Base class of callbacks; override the events of interest.

    Each event gets (args, state, control, **things). Things are `model`, `processing_class`, `optimizer`,
    `lr_scheduler`, `train_dataloader`, `eval_dataloader`, and `metrics` or `logs` where the event has any. A callback
    with `state_dict` and `load_state_dict` (of JSON values) is saved with every checkpoint.

    Example:
        >>> from paceline import TrainerState, TrainerControl
        >>> class StopAtLoss(TrainerCallback):
        ...     def on_log(self, args, state, control, logs, **things):
        ...         control.should_training_stop = logs.get("loss", 1.0) < 0.1
        >>> control = TrainerControl()
        >>> StopAtLoss().on_log(None, TrainerState(), control, logs={"loss": 0.05})
        >>> control.should_training_stop
        True
    """

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """The Trainer was constructed.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            **things: See the class.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """Training begins.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            **things: See the class.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """Training has ended.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            **things: See the class.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """An epoch begins.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            **things: See the class.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """An epoch has ended.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            **things: See the class.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """The first micro-batch of an optimizer step begins.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            **things: See the class.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """A micro-batch other than the last of its optimizer step has ended.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            **things: See the class.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """Gradients are complete and clipped; the optimizer has not stepped yet.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            **things: See the class.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """The optimizer has stepped; gradients are not zeroed yet.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            **things: See the class.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """An optimizer step has ended.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            **things: See the class.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """An evaluation has ended.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            **things: See the class; `metrics` are its results.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """

    def on_predict(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **things: Any
    ) -> Any:
        """A prediction has ended.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            metrics: The results of the prediction.
            **things: See the class.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """A checkpoint was written.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            **things: See the class.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """An entry was added to the log.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            **things: See the class; `logs` is the entry.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """A batch of an evaluation or prediction has ended.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            **things: See the class.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """

    def on_push_begin(self, args: Any, state: TrainerState, control: TrainerControl, **things: Any) -> Any:
        """Never called: paceline uploads nothing.

        Args:
            args: The `TrainingArguments`.
            state: The progress of training.
            control: Flags that the callback may set.
            **things: See the class.

        Returns:
            A `TrainerControl` that replaces the current one, or None.
        """


class CallbackHandler:
    """Calls callbacks in the order in which they were added.

    Args:
        callbacks: Instances of `TrainerCallback` or of classes with the same methods; classes are instantiated.

    Attributes:
        callbacks: The instances.
        things: What callbacks get at every event besides (args, state, control).
    """

    def __init__(self, callbacks: Iterable[Any]) -> None:
        self.callbacks: list[Any] = []
        self.things: dict[str, Any] = {}
        self._by_event: dict[str, list[Any]] = {}
        for callback in callbacks:
            self.add_callback(callback)

    def add_callback(self, callback: Any) -> None:
        """Add a callback; a second one of the same class is added with a warning.

        Args:
            callback: An instance, or a class, which is instantiated without arguments.
        """
        made = callback
        if isinstance(callback, type):
            made = callback()
        if any(type(known) is type(made) for known in self.callbacks):
            logger.warning("A second %s was added to the callbacks; both are called.", type(made).__name__)
        self.callbacks.append(made)
        self._sort()

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback.

        Args:
            callback: An instance, or a class whose first instance is removed.

        Returns:
            The callback that was removed; None if there was none.
        """
        for known in self.callbacks:
            if known is callback or (isinstance(callback, type) and type(known) is callback):
                self.callbacks.remove(known)
                self._sort()
                return known
        return None

    def _sort(self) -> None:
        """List the callbacks that override each event, so that the others cost nothing in a step."""
        self._by_event = {
            event: [getattr(callback, event) for callback in self.callbacks if _overrides(callback, event)]
            for event in EVENTS
        }

    def call_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> TrainerControl:
        """Call an event on all callbacks.

        Args:
            event: One of `EVENTS`.
            args: The training arguments.
            state: The progress of training.
            control: The flags that callbacks may set.
            **more: What this event has besides `things`.

        Returns:
            The control to use from here on: the last one that a callback returned, else `control`.
        """
        for method in self._by_event[event]:
            control = method(args, state, control, **self.things, **more) or control
        return control

    def states(self) -> dict[str, Any]:
        """Collect the state of callbacks that have a `state_dict`.

        Returns:
            A list of states for each class name.
        """
        saved: dict[str, Any] = {}
        for callback in self.callbacks:
            if hasattr(callback, "state_dict"):
                saved.setdefault(type(callback).__name__, []).append(callback.state_dict())
        return saved

    def load_states(self, saved: dict[str, Any]) -> None:
        """Restore the state of callbacks.

        Args:
            saved: What `states` returned.
        """
        remaining = {name: list(states) for name, states in saved.items()}
        for callback in self.callbacks:
            states = remaining.get(type(callback).__name__)
            if states and hasattr(callback, "load_state_dict"):
                callback.load_state_dict(states.pop(0))


class CallbackOwner(Protocol):
    """Whatever has callbacks, and the state and control that they get: a Trainer."""

    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler


def fire(owner: CallbackOwner, event: str, **more: Any) -> None:
    """Call an event on all callbacks of a Trainer; any of them may replace its control.

    Args:
        owner: The Trainer.
        event: One of `EVENTS`.
        **more: What this event has: `metrics` or `logs`.
    """
    done = _DONE_BY.get(event)
    if done is not None:
        setattr(owner.control, done, False)
    owner.control = owner.callback_handler.call_event(event, owner.args, owner.state, owner.control, **more)


def _overrides(callback: Any, event: str) -> bool:
    method = getattr(type(callback), event, None)
    name = getattr(method, "__qualname__", "")
    return callable(method) and not name.startswith("TrainerCallback.")


def length_of(loader: Any) -> int | None:
    """The number of batches of a loader.

    Args:
        loader: Anything that yields batches.

    Returns:
        Its length; None if it has none.
    """
    try:
        return len(loader)
    except TypeError:
        return None
