"""What a script sets between the construction of a Trainer and `train` is what is trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paceline import Trainer, TrainerCallback, TrainingArguments
from tests.support.trainer import Sentences, arguments, farthest, tagger, timeless


def made(folder: Path, **changes: Any) -> Trainer:
    args = TrainingArguments(**arguments(str(folder), **{"max_steps": 4, "save_strategy": "no", **changes}))
    return Trainer(tagger(), args, train_dataset=Sentences(40, 1))


def history(trainer: Trainer) -> list[dict[str, Any]]:
    return [timeless(entry) for entry in trainer.state.log_history]


def rates(trainer: Trainer) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_an_optimizer_that_was_set_is_used(tmp_path: Path) -> None:
    given = Trainer(
        (model := tagger()),
        made(tmp_path).args,
        train_dataset=Sentences(40, 1),
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.5), None),
    )
    given.train()
    trainer = made(tmp_path)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.5)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert farthest(history(given), history(trainer)) < 1e-6
    assert rates(trainer) == pytest.approx([0.5, 0.375, 0.25, 0.125])


def test_an_optimizer_that_was_made_and_changed_is_used(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    for group in trainer.create_optimizer().param_groups:
        group["lr"] = 0.02
    trainer.train()
    assert rates(trainer) == pytest.approx([0.02, 0.015, 0.01, 0.005])


def test_a_schedule_that_was_set_is_used(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    optimizer = trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.1)
    trainer.train()
    assert rates(trainer) == pytest.approx([0.001] * 4)


def test_a_schedule_that_was_made_for_another_length_is_made_again(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    trainer.create_optimizer_and_scheduler(num_training_steps=100)
    trainer.train()
    assert rates(trainer) == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


class SetsFlags(Trainer):
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_deepspeed_enabled = True


def test_a_subclass_may_say_which_strategy_trains(tmp_path: Path) -> None:
    trainer = SetsFlags(tagger(), made(tmp_path).args, train_dataset=Sentences(40, 1))
    assert trainer.is_deepspeed_enabled
    assert not trainer.is_fsdp_enabled


def test_a_final_rate_is_compared_with_the_peak_of_a_schedule_that_was_made_before(tmp_path: Path) -> None:
    more = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}, "warmup_steps": 2}
    trainer, usual = made(tmp_path, **more), made(tmp_path, **more)
    trainer.create_optimizer_and_scheduler(9)
    trainer.train()
    usual.train()
    assert rates(trainer) == pytest.approx(rates(usual))


def test_a_further_training_begins_with_a_new_optimizer_and_its_arguments(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    trainer.create_optimizer()
    trainer.train()
    trainer.optimizer = None
    trainer.args.learning_rate = 0.1
    trainer.train()
    assert rates(trainer)[-4:] == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_a_further_training_of_a_new_model_forgets_the_optimizer_of_the_old_one(tmp_path: Path) -> None:
    args = made(tmp_path).args
    trainer = Trainer(args=args, model_init=tagger, train_dataset=Sentences(40, 1))
    trainer.create_optimizer()
    trainer.train()
    first = history(trainer)
    trainer.train()
    assert farthest(first, history(trainer)) < 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 2},
        {"global_batch_size": 8},
    ],
)
def test_batch_sizes_that_were_changed_are_used(tmp_path: Path, changes: dict[str, Any]) -> None:
    expected = made(tmp_path, max_steps=-1, num_train_epochs=1, **changes)
    expected.train()
    trainer = made(tmp_path, max_steps=-1, num_train_epochs=1)
    for name, value in changes.items():
        setattr(trainer.args, name, value)
    trainer.train()
    assert trainer.state.global_step == expected.state.global_step != 10
    assert farthest(history(expected), history(trainer)) < 1e-6


class Fails(TrainerCallback):
    """Raises before the third optimizer step, once."""

    has_failed = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        if state.global_step == 2 and not self.has_failed:
            self.has_failed = True
            raise RuntimeError("on purpose")


def test_gradients_from_before_are_not_added_to_the_first_step(tmp_path: Path) -> None:
    expected = made(tmp_path)
    expected.train()
    trainer = made(tmp_path)
    trainer.model(**{name: value[None] for name, value in Sentences(1, 5)[0].items()})["loss"].backward()
    trainer.train()
    assert farthest(history(expected), history(trainer)) < 1e-6
    resumed = made(tmp_path, save_strategy="steps", save_steps=2)
    resumed.add_callback(Fails())
    with pytest.raises(RuntimeError, match="on purpose"):
        resumed.train()
    resumed.train(resume_from_checkpoint=True)
    assert farthest(history(expected), history(resumed)) < 1e-6
