"""A signal within an evaluation, and memory that runs out: nothing is lost, counted twice or taken for the weights."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from paceline.errors import PREEMPTED
from tests.support.trainer import Counted, Sentences, accuracy, arguments, tagger, timeless

EVALUATING = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 100}


class Signal(TrainerCallback):
    """Sends SIGTERM to this process in the last evaluation batch but one of a step, and leaves time to notice it."""

    def __init__(self, step: int, batch: int) -> None:
        self.step, self.batch = step, batch
        self.batches = 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        if state.global_step != self.step:
            return
        self.batches += 1
        if self.batches == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)


class Averaged(Trainer):
    """Evaluates an average of the weights."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}

    def training_step(self, *given: Any, **more: Any) -> torch.Tensor:
        loss = super().training_step(*given, **more)
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 0.1)
        return loss

    def evaluate(self, *given: Any, **more: Any) -> dict[str, float]:
        trained = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        try:
            return super().evaluate(*given, **more)
        finally:
            self.model.load_state_dict(trained)


class Hits:
    """Counts batch by batch."""

    def __init__(self) -> None:
        self.samples = 0

    def update(self, prediction: Any) -> None:
        self.samples += len(prediction.label_ids)

    def compute(self) -> dict[str, float]:
        samples, self.samples = self.samples, 0
        return {"samples": samples}


WAYS: dict[str, Any] = {
    "averaged": lambda folder, callbacks: Averaged(**parts(folder), callbacks=callbacks),
    "counted": lambda folder, callbacks: Trainer(**parts(folder) | {"compute_metrics": Hits()}, callbacks=callbacks),
    "several": lambda folder, callbacks: Trainer(
        **parts(folder, metric_for_best_model="a_samples", greater_is_better=True)
        | {"eval_dataset": {"a": Sentences(8, 2), "b": Sentences(8, 3)}},
        callbacks=[EarlyStoppingCallback(4), *callbacks],
    ),
}


def parts(folder: str, **changes: Any) -> dict[str, Any]:
    return {
        "model": tagger(),
        "args": TrainingArguments(**arguments(folder, **EVALUATING, **changes)),
        "train_dataset": Sentences(48, 1),
        "eval_dataset": Sentences(12, 2),
        "compute_metrics": accuracy,
    }


@pytest.mark.parametrize("way", WAYS)
def test_a_signal_within_an_evaluation_stops_after_it(way: str, tmp_path: Path) -> None:
    whole = WAYS[way](str(tmp_path / "whole"), [Signal(-1, 0)])
    whole.train()
    with pytest.raises(SystemExit) as ended:
        WAYS[way](str(tmp_path / "stopped"), [Signal(3, 3 if way == "several" else 2)]).train()
    assert ended.value.code == PREEMPTED
    resumed = WAYS[way](str(tmp_path / "stopped"), [Signal(-1, 0)])
    resumed.train(resume_from_checkpoint=True)
    assert [timeless(e) for e in resumed.state.log_history] == [timeless(e) for e in whole.state.log_history]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


class Hungry(Trainer):
    """Runs out of memory with more than two samples."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().training_step(model, inputs, num_items_in_batch)


class SignalAfter(TrainerCallback):
    """Sends SIGTERM to this process after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)


def hungry(folder: str, **changes: Any) -> tuple[Hungry, Counted]:
    said = {"max_steps": 6, "auto_find_batch_size": True, "save_strategy": "steps", "save_steps": 2, **changes}
    args = TrainingArguments(**arguments(folder, **said))
    trainer, counted = Hungry(tagger(), args, train_dataset=Sentences(20, 1)), Counted()
    trainer.accelerator.register_for_checkpointing(counted)
    return trainer, counted


def losses(trainer: Trainer) -> list[dict[str, Any]]:
    return [timeless(entry) for entry in trainer.state.log_history]


@pytest.mark.parametrize("step", [2, 4])
def test_checkpoints_after_memory_ran_out_can_be_resumed(step: int, tmp_path: Path) -> None:
    whole, counted = hungry(str(tmp_path))
    counted.value = 5
    whole.train()
    # Memory runs out again in the first step of the resumed run, within a pass.
    resumed, counted = hungry(str(tmp_path))
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert losses(resumed) == losses(whole)
    assert counted.value == 5
    assert resumed.optimizer.num_steps == whole.optimizer.num_steps == 6


def test_a_signal_is_heard_after_memory_ran_out(tmp_path: Path) -> None:
    whole, _ = hungry(str(tmp_path / "whole"))
    whole.train()
    stopped, _ = hungry(str(tmp_path / "stopped"), save_steps=100)
    stopped.add_callback(SignalAfter(3))
    with pytest.raises(SystemExit) as ended:
        stopped.train()
    assert ended.value.code == PREEMPTED
    resumed, _ = hungry(str(tmp_path / "stopped"), save_steps=100)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)


class LeavesFirstPass(TrainerCallback):
    """Ends the first pass after its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        control.should_epoch_stop = state.global_step == 2


class HungryLater(Hungry):
    """Runs out of memory from the second pass on."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.state.passes == 0:
            return Trainer.training_step(self, model, inputs, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)


def test_a_pass_that_was_left_is_not_gone_on_with(tmp_path: Path) -> None:
    of_runs = []
    for kind in (Trainer, HungryLater):
        args = TrainingArguments(**arguments(str(tmp_path), max_steps=5, auto_find_batch_size=True))
        trainer = kind(tagger(), args, train_dataset=Sentences(20, 1), callbacks=[LeavesFirstPass()])
        trainer.train()
        of_runs.append([entry.get("loss", 0.0) for entry in trainer.state.log_history])
    assert of_runs[1] == pytest.approx(of_runs[0], abs=1e-5)
