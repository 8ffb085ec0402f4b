"""`reduce_lr_on_plateau`: the rate follows the metric of evaluations, in the direction in which it improves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paceline import Trainer, TrainingArguments
from paceline.errors import ConfigError, PacelineError
from tests.support.trainer import Sentences, arguments, tagger


class Rises:
    """An accuracy that rises with every evaluation, then stays."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.calls += 1
        return {"accuracy": min(self.calls, 4) / 10}


PLATEAU = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
    "eval_strategy": "steps",
    "eval_steps": 1,
    "max_steps": 6,
    "learning_rate": 1.0,
}


def plateau(folder: Path, **changes: Any) -> Trainer:
    args = TrainingArguments(**arguments(str(folder), **{**PLATEAU, **changes}))
    return Trainer(
        tagger(), args, train_dataset=Sentences(16, 1), eval_dataset=Sentences(4, 2), compute_metrics=Rises()
    )


@pytest.mark.parametrize(
    "changes", [{"greater_is_better": True}, {"lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "mode": "max"}}]
)
def test_the_rate_falls_when_a_metric_no_longer_rises(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer = plateau(tmp_path, metric_for_best_model="accuracy", **changes)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    # The fifth evaluation is the first that is no better.
    assert rates == [1.0] * 5 + [0.5]
    assert trainer.state.best_global_step == 4


def test_a_plateau_does_not_begin_before_the_training(tmp_path: Path) -> None:
    trainer = plateau(tmp_path, metric_for_best_model="accuracy", greater_is_better=True, eval_on_start=True)
    trainer.train()
    assert trainer.lr_scheduler.last_epoch == 6


def test_a_plateau_without_its_metric_says_what_there_is(tmp_path: Path) -> None:
    trainer = plateau(tmp_path)
    trainer.eval_dataset = {"a": Sentences(4, 2), "b": Sentences(4, 3)}
    with pytest.raises(PacelineError, match=r"eval_loss\. The evaluation gives eval_a_loss"):
        trainer.train()
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    args = TrainingArguments(**arguments(str(tmp_path)))
    given = (optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(ConfigError, match="'no' with a ReduceLROnPlateau"):
        Trainer(trainer.model, args, train_dataset=Sentences(4, 1), optimizers=given)
