"""Where a training is, and what callbacks ask of it."""

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
    """Where a training is; saved with every checkpoint, and as `trainer_state.json` for people.

    Attributes:
        epoch: Passes over the data so far, with the part of the current one.
        global_step: Optimizer steps so far.
        max_steps: Optimizer steps of the whole training.
        logging_steps: Steps between two log entries.
        eval_steps: Steps between two evaluations.
        save_steps: Steps between two checkpoints.
        train_batch_size: Samples of one rank's micro-batch.
        num_train_epochs: Passes of the whole training.
        num_input_tokens_seen: Input tokens of all ranks so far, where they are counted.
        total_flos: Always 0: paceline does not walk the model to estimate it.
        log_history: Every log entry so far.
        best_metric: The best value so far of the metric that decides.
        best_global_step: When it was reached.
        best_model_checkpoint: The folder of the best checkpoint that was saved; where nothing was saved at
            `best_global_step`, it is of another step.
        stateful_callbacks: What callbacks with a `state_dict` keep.
        is_hyper_param_search: Always false: paceline searches for no hyper-parameters. Callbacks of transformers
            look at it, and at the next two.
        trial_name: Always None.
        trial_params: Always None.
        passes: Passes that were completed or left.
        updates_in_pass: Optimizer steps in the current one.
        samples_per_step: Samples of an optimizer step over all ranks.
        updates_per_pass: Optimizer steps of a pass.
        extra_steps: How many more steps were taken up to here than the passes so far have with this many samples.
        best_by: The metric that decides, and whether more of it is better.
        best_saved_metric: Its value at `best_model_checkpoint`.
        last_metric: What the last evaluation gave for it.
        last_metric_step: When.
        last_checkpoint: The checkpoint that was saved last.
        last_checkpoint_step: When.
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

    # Facts about this process, and settings of this run, are not taken from a checkpoint.
    _OWN = (
        "is_local_process_zero",
        "is_world_process_zero",
        "max_steps",
        "num_train_epochs",
        "train_batch_size",
        "samples_per_step",
        "updates_per_pass",
    )
    # What a resume needs; `trainer_state.json` has the fields that transformers reads, and no others.
    _PLACE = (
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
    _OWN_INTERVALS = ("logging_steps", "eval_steps", "save_steps")

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over where a training was; what this run was told stays."""
        known = {f.name for f in dataclasses.fields(self)} - {*self._OWN, *self._OWN_INTERVALS}
        for name, value in state.items():
            if name in known:
                setattr(self, name, value)

    def save_to_json(self, json_path: str | os.PathLike[str]) -> None:
        """Write it as JSON with the fields of transformers, whose `TrainerState` reads it too."""
        shown = {name: value for name, value in self.state_dict().items() if name not in self._PLACE}
        text = json.dumps(shown, indent=2, sort_keys=True)
        Path(json_path).expanduser().write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load_from_json(cls, json_path: str | os.PathLike[str]) -> TrainerState:
        """Read what `save_to_json` wrote."""
        found = json.loads(Path(json_path).expanduser().read_text(encoding="utf-8"))
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in found.items() if name in known})


@dataclass
class TrainerControl:
    """What callbacks ask for; the last three hold until they were done.

    Attributes:
        should_training_stop: End the training after this step.
        should_epoch_stop: End this pass after this step.
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
        """Forget the wish to stop."""
        self.should_training_stop = False

    def new_epoch(self) -> None:
        """Forget the wish to end the pass."""
        self.should_epoch_stop = False

    def new_step(self) -> None:
        """Forget what was asked for in the last step."""
        self.should_save = self.should_evaluate = self.should_log = False
