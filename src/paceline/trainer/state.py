"""The state of a training, and what callbacks request of it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = ["TrainerControl", "TrainerState"]


@dataclass
class TrainerState:
    """The progress of a training, saved with every checkpoint, and as `trainer_state.json` for people.

    Attributes:
        epoch: Epochs so far, with the fraction of the current one.
        global_step: Optimizer steps so far.
        max_steps: Optimizer steps of the whole training.
        logging_steps: Optimizer steps between two log entries.
        eval_steps: Optimizer steps between two evaluations.
        save_steps: Optimizer steps between two checkpoints.
        train_batch_size: Samples of a micro-batch on each rank.
        num_train_epochs: Epochs of the whole training.
        num_input_tokens_seen: Input tokens of all ranks so far, where they are counted.
        total_flos: Always 0: paceline does not estimate it.
        log_history: All log entries so far.
        best_metric: The best value so far of `metric_for_best_model`.
        best_global_step: The optimizer step after which it was measured.
        best_model_checkpoint: The folder of the best saved checkpoint; if none was saved at `best_global_step`, it
            is from another step.
        is_local_process_zero: Whether this process is the first rank of its machine.
        is_world_process_zero: Whether this process is rank 0.
        stateful_callbacks: The state of callbacks that have a `state_dict`, by class name.
        is_hyper_param_search: Always false: paceline has no hyperparameter search. Callbacks of transformers read
            this and the next two.
        trial_name: Always None.
        trial_params: Always None.
        passes: Epochs that were completed, or ended early.
        updates_in_pass: Optimizer steps of the current epoch so far.
        samples_per_step: Samples of an optimizer step over all ranks.
        updates_per_pass: Optimizer steps of an epoch.
        extra_steps: Optimizer steps so far, minus those that the epochs so far have with the current batch size.
        best_by: `metric_for_best_model` and `greater_is_better`.
        best_saved_metric: The value of that metric for `best_model_checkpoint`.
        last_metric: Its value in the last evaluation.
        last_metric_step: The optimizer step of that evaluation.
        last_checkpoint: The folder of the last checkpoint.
        last_checkpoint_step: The optimizer step of that checkpoint.
    """

    epoch: float = 0.0
    global_step: int = 0
    max_steps: int = 0
    logging_steps: int = 500
    eval_steps: int = 500
    save_steps: int = 500
    train_batch_size: int | None = None
    num_train_epochs: int = 0
    num_input_tokens_seen: int = 0
    total_flos: float = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    stateful_callbacks: dict[str, Any] = field(default_factory=dict)
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None
    passes: int = 0
    updates_in_pass: int = 0
    samples_per_step: int = 0
    updates_per_pass: int = 0
    extra_steps: int = 0
    best_by: list[Any] | None = None
    best_saved_metric: float | None = None
    last_metric: float | None = None
    last_metric_step: int | None = None
    last_checkpoint: str | None = None
    last_checkpoint_step: int | None = None

    # Properties of this process and settings of this run, which are not taken from a checkpoint.
    _OF_THIS_RUN = (
        "is_local_process_zero",
        "is_world_process_zero",
        "max_steps",
        "num_train_epochs",
        "train_batch_size",
        "samples_per_step",
        "updates_per_pass",
    )
    # Needed to resume, but left out of `trainer_state.json`, which has only the fields that transformers reads.
    _FOR_RESUMING = (
        "passes",
        "updates_in_pass",
        "samples_per_step",
        "updates_per_pass",
        "extra_steps",
        "best_by",
        "best_saved_metric",
        "last_metric",
        "last_metric_step",
        "last_checkpoint",
        "last_checkpoint_step",
    )
    _INTERVALS = ("logging_steps", "eval_steps", "save_steps")

    def state_dict(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the progress of a training; settings of this run are kept."""
        known = {f.name for f in dataclasses.fields(self)} - {*self._OF_THIS_RUN, *self._INTERVALS}
        for name, value in state.items():
            if name in known:
                setattr(self, name, value)

    def save_to_json(self, json_path: str | os.PathLike[str]) -> None:
        """Write the fields that transformers' `TrainerState` has, as JSON.

        Args:
            json_path: The file.
        """
        shown = {name: value for name, value in self.state_dict().items() if name not in self._FOR_RESUMING}
        text = json.dumps(shown, indent=2, sort_keys=True)
        Path(json_path).expanduser().write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load_from_json(cls, json_path: str | os.PathLike[str]) -> TrainerState:
        """Read a file that `save_to_json` or transformers wrote.

        Args:
            json_path: The file.

        Returns:
            The state; fields that are not in the file have their defaults.
        """
        values = json.loads(Path(json_path).expanduser().read_text(encoding="utf-8"))
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass
class TrainerControl:
    """What callbacks request; the last three are reset once they are done.

    Attributes:
        should_training_stop: End the training after this step.
        should_epoch_stop: End this epoch after this step.
        should_save: Save now.
        should_evaluate: Evaluate now.
        should_log: Log now.
    """

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False

    def new_training(self) -> None:
        """Reset `should_training_stop`."""
        self.should_training_stop = False

    def new_epoch(self) -> None:
        """Reset `should_epoch_stop`."""
        self.should_epoch_stop = False

    def new_step(self) -> None:
        """Reset what was requested in the previous step."""
        self.should_save = self.should_evaluate = self.should_log = False
