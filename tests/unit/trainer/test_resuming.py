"""A training that goes on in other steps: the rest of the rows, each once, or an error."""

from __future__ import annotations

import contextlib
import io
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import IterableDataset

from paceline import Trainer, TrainerCallback, TrainingArguments
from paceline.errors import CheckpointError, DataError
from tests.support.ranks import run_on_ranks

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 10


class Seen(nn.Module):
    """Notes the rows that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(2, 3)
        self.rows: list[int] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.rows += [int(row) for row in x[:, 0]]
        logits = self.head(x / ROWS)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Stream(IterableDataset[dict[str, Any]]):
    """The same rows, of which nobody knows how many there are."""

    def __iter__(self) -> Any:
        return iter(rows())


def rows(count: int = ROWS) -> list[dict[str, Any]]:
    return [{"x": torch.tensor([float(row), 1.0]), "labels": row % 3} for row in range(count)]


def trainer_of(folder: Path | str, changes: dict[str, Any], data: Any = None, **more: Any) -> Trainer:
    said = {"per_device_train_batch_size": 1, "num_train_epochs": 2, "logging_strategy": "no", "save_strategy": "no"}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 0.1}
    args = TrainingArguments(output_dir=str(folder), **{**said, **quiet, **changes})
    return Trainer(args=args, train_dataset=rows() if data is None else data, **{"model": Seen(), **more})


def train(trainer: Trainer, resume: str | None = None) -> list[int]:
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(resume_from_checkpoint=resume)
    seen = trainer.accelerator.unwrap_model(trainer.model).rows
    return [row for rank in trainer.accelerator.gather_object([seen]) for row in rank]


def saved(folder: Path | str, **changes: Any) -> str:
    train(trainer_of(folder, {"save_strategy": "steps", "save_steps": 5, **changes}))
    return f"{folder}/checkpoint-"


OTHER_STEPS: dict[str, tuple[dict[str, Any], int]] = {
    "batch size": ({"per_device_train_batch_size": 2}, 5),
    "accumulation": ({"gradient_accumulation_steps": 2}, 5),
    "uneven": ({"per_device_train_batch_size": 4}, 3),
    "global batch": ({"global_batch_size": 5, "per_device_train_batch_size": 5}, 2),
    "one step": ({"per_device_train_batch_size": 16}, 1),
}


@pytest.mark.parametrize(
    ("kind", "by"), [*((kind, "steps") for kind in OTHER_STEPS), ("batch size", "epoch"), ("uneven", "epoch")]
)
def test_other_steps_after_a_pass_train_what_is_left(kind: str, by: str, tmp_path: Path) -> None:
    changes, steps = OTHER_STEPS[kind]
    folder = saved(tmp_path, save_strategy=by)
    trainer = trainer_of(tmp_path / "b", {**changes, "save_strategy": by, "save_steps": 100})
    assert Counter(train(trainer, f"{folder}10")) == Counter(range(ROWS))
    state = trainer.state
    assert (state.global_step, state.max_steps, state.epoch) == (10 + steps, 10 + steps, 2.0)
    # Half of the training was done, and all of it is now.
    assert trainer.lr_scheduler.last_epoch == 2 * steps
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0


def test_the_rate_goes_on_at_the_same_share_of_the_training(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    rates: list[float] = []

    class Notes(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **things: Any) -> None:
            rates.append(things["optimizer"].param_groups[0]["lr"])

    train(trainer_of(tmp_path / "b", {"per_device_train_batch_size": 2}, callbacks=[Notes()]), f"{folder}10")
    assert rates == pytest.approx([0.05, 0.04, 0.03, 0.02, 0.01])


def test_what_went_on_in_other_steps_goes_on_again(tmp_path: Path) -> None:
    """Passes of 10, 5 and 5 steps, and then 3: the counts add up, and within a pass the same step goes on."""
    folder = saved(tmp_path / "a", num_train_epochs=4)
    second = {"per_device_train_batch_size": 2, "num_train_epochs": 4, "save_strategy": "steps", "save_steps": 1}
    train(trainer_of(tmp_path / "b", second), f"{folder}10")
    within = trainer_of(tmp_path / "c", second)
    seen = train(within, f"{tmp_path}/b/checkpoint-17")
    assert (len(seen), within.state.global_step) == (3 * ROWS - 14, 25)
    third = trainer_of(tmp_path / "d", {**second, "per_device_train_batch_size": 4})
    assert Counter(train(third, f"{tmp_path}/b/checkpoint-20")) == Counter(range(ROWS))
    assert (third.state.global_step, third.state.epoch) == (20 + 3, 4.0)


@pytest.mark.parametrize("changes", [{"per_device_train_batch_size": 2}, {"gradient_accumulation_steps": 2}])
def test_other_steps_within_a_pass_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path)
    for step in (5, 15):
        with pytest.raises((CheckpointError, DataError), match=r"samples|global batch of 1 sample = 1 rank"):
            train(trainer_of(tmp_path / "b", changes), f"{folder}{step}")


def test_the_same_step_in_smaller_batches_goes_on_within_a_pass(tmp_path: Path) -> None:
    folder = saved(tmp_path, per_device_train_batch_size=2, save_steps=3)
    trainer = trainer_of(tmp_path / "b", {"gradient_accumulation_steps": 2})
    whole = train(trainer_of(tmp_path / "c", {"per_device_train_batch_size": 2}))
    assert train(trainer, f"{folder}3") == whole[6:]
    assert trainer.state.global_step == 10


def test_max_steps_counts_steps_of_any_size(tmp_path: Path) -> None:
    folder = saved(tmp_path, per_device_train_batch_size=10, num_train_epochs=3, save_steps=3)
    # Three passes are done, and by the arguments 12 steps are two.
    trainer = trainer_of(tmp_path / "b", {"max_steps": 12})
    assert len(train(trainer, f"{folder}3")) == 9
    assert trainer.state.global_step == trainer.lr_scheduler.last_epoch == 12


def test_an_end_before_the_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint-10 is at step 10 \(epoch 1\), and max_steps=7 ends before"):
        train(trainer_of(tmp_path / "b", {"max_steps": 7}), f"{folder}10")
    with pytest.raises(CheckpointError, match="num_train_epochs=1 ends before that"):
        train(trainer_of(tmp_path / "b", {"num_train_epochs": 1}), f"{folder}15")


def test_a_training_that_was_over_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path)
    assert train(trainer_of(tmp_path / "b", {}), f"{folder}15") != []
    assert "nothing is left to train" not in caplog.text
    assert train(trainer_of(tmp_path / "b", {}), f"{folder}20") == []
    assert "was complete at step 20: nothing is left to train" in caplog.text
    assert len(train(trainer_of(tmp_path / "b", {"num_train_epochs": 3}), f"{folder}20")) == ROWS


def test_a_schedule_of_the_script_is_not_counted_anew(tmp_path: Path) -> None:
    def given(folder: Path, changes: dict[str, Any]) -> Trainer:
        model = Seen()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        return trainer_of(folder, changes, model=model, optimizers=(optimizer, schedule))

    train(given(tmp_path / "a", {"save_strategy": "epoch"}))
    with pytest.raises(CheckpointError, match="StepLR counts steps"):
        train(given(tmp_path / "b", {"per_device_train_batch_size": 2}), f"{tmp_path}/a/checkpoint-10")


class Leaves(TrainerCallback):
    """Ends each pass, or the training, after some steps of a pass."""

    def __init__(self, after: int, wish: str = "should_epoch_stop") -> None:
        self.after, self.wish = after, wish

    def on_step_end(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        if state.updates_in_pass >= self.after:
            setattr(control, self.wish, True)


def test_a_pass_that_was_left_is_over(tmp_path: Path) -> None:
    changes = {"save_strategy": "epoch", "num_train_epochs": 3}
    whole = train(trainer_of(tmp_path / "a", changes, callbacks=[Leaves(4)]))
    again = train(trainer_of(tmp_path / "b", changes, callbacks=[Leaves(4)]), f"{tmp_path}/a/checkpoint-4")
    assert again == whole[4:]


def test_what_a_global_batch_leaves_out_stays_left_out(tmp_path: Path) -> None:
    changes = {"global_batch_size": 4, "per_device_train_batch_size": 2, "dataloader_drop_last": True}
    saving = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3}
    whole = train(trainer_of(tmp_path / "a", {**changes, **saving}))
    assert len(whole) == 24
    for step in range(1, 6):
        assert (
            train(trainer_of(tmp_path / "b", {**changes, **saving}), f"{tmp_path}/a/checkpoint-{step}")
            == whole[4 * step :]
        )


def test_a_stop_within_a_pass_is_no_end_of_it(tmp_path: Path) -> None:
    whole = train(trainer_of(tmp_path / "a", {"max_steps": 20}))
    train(trainer_of(tmp_path / "b", {"save_strategy": "epoch", "max_steps": 15}))
    trainer = trainer_of(tmp_path / "c", {"max_steps": 20})
    assert train(trainer, f"{tmp_path}/b/checkpoint-15") == whole[15:]
    assert trainer.state.epoch == 2.0


def test_more_data_after_a_pass(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    trainer = trainer_of(tmp_path / "b", {}, rows(20))
    assert Counter(train(trainer, f"{folder}10")) == Counter(range(20))
    assert trainer.state.global_step == 30
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0


def test_a_stream_goes_on_in_longer_trainings(tmp_path: Path) -> None:
    saving = {"max_steps": 7, "save_strategy": "steps", "save_steps": 7}
    train(trainer_of(tmp_path / "a", saving, Stream()))
    assert train(trainer_of(tmp_path / "b", {"max_steps": 12}, Stream()), f"{tmp_path}/a/checkpoint-7") == [
        7,
        8,
        9,
        0,
        1,
    ]
    train(trainer_of(tmp_path / "c", {**saving, "max_steps": 10, "save_steps": 10}, Stream()))
    other = {"max_steps": 15, "per_device_train_batch_size": 2}
    assert train(trainer_of(tmp_path / "d", other, Stream()), f"{tmp_path}/c/checkpoint-10") == [*range(ROWS)]


def on_ranks(folder: str, changes: dict[str, Any], resume: str | None = None) -> tuple[list[int], int, float]:
    trainer = trainer_of(folder, changes)
    seen = train(trainer, resume)
    return seen, trainer.state.global_step, trainer.optimizer.param_groups[0]["lr"]


def test_another_number_of_ranks_after_a_pass(tmp_path: Path) -> None:
    saving = {"save_strategy": "epoch"}
    run_on_ranks(1, on_ranks, str(tmp_path / "one"), saving)
    seen, steps, rate = run_on_ranks(2, on_ranks, str(tmp_path / "b"), {}, f"{tmp_path}/one/checkpoint-10")[0]
    assert (Counter(seen), steps, rate) == (Counter(range(ROWS)), 15, 0.0)
    run_on_ranks(2, on_ranks, str(tmp_path / "two"), saving)
    [(seen, steps, rate)] = run_on_ranks(1, on_ranks, str(tmp_path / "c"), {}, f"{tmp_path}/two/checkpoint-5")
    assert (Counter(seen), steps, rate) == (Counter(range(ROWS)), 15, 0.0)


def of_transformers(folder: str) -> None:
    import transformers

    quiet: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    quiet |= {"save_strategy": "steps", "save_steps": 5}
    args = transformers.TrainingArguments(output_dir=folder, per_device_train_batch_size=1, num_train_epochs=2, **quiet)
    transformers.Trainer(Seen(), args, train_dataset=rows()).train()


def test_a_training_of_transformers_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="pip install 'paceline[transformers]'")
    run_on_ranks(1, of_transformers, str(tmp_path / "a"))
    [(seen, steps, rate)] = run_on_ranks(1, on_ranks, str(tmp_path / "b"), {}, f"{tmp_path}/a/checkpoint-10")
    assert (Counter(seen), steps, rate) == (Counter(range(ROWS)), 20, 0.0)
    other = {"per_device_train_batch_size": 2}
    [(seen, steps, rate)] = run_on_ranks(1, on_ranks, str(tmp_path / "c"), other, f"{tmp_path}/a/checkpoint-10")
    assert (Counter(seen), steps, rate) == (Counter(range(ROWS)), 15, 0.0)
    with pytest.raises(AssertionError, match="within an epoch, at epoch"):
        run_on_ranks(1, on_ranks, str(tmp_path / "d"), {}, f"{tmp_path}/a/checkpoint-5")


class Counting(TrainerCallback):
    """Decays the learning rate by its own count, with noise of its own."""

    def __init__(self) -> None:
        self.calls = 0
        self.source = random.Random(1)

    def on_step_begin(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        self.calls += 1
        for group in things["optimizer"].param_groups:
            group["weight_decay"] = self.source.random() / self.calls


class Collecting(TrainerCallback):
    """Keeps lists under names that come up during the training, and a count that begins then."""

    def __init__(self) -> None:
        self.lists: dict[str, list[int]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        self.lists.setdefault("steps", []).append(state.global_step)
        self.calls = getattr(self, "calls", 0) + 1
        for group in things["optimizer"].param_groups:
            group["weight_decay"] = len(self.lists["steps"]) / self.calls**2


@pytest.mark.parametrize("kind", [Counting, Collecting, lambda: Leaves(4)])
def test_callbacks_go_on_where_they_were(kind: Any, tmp_path: Path) -> None:
    said = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = trainer_of(tmp_path, said, callbacks=[kind()])
    train(whole)
    # With another built-in callback before it.
    resumed = trainer_of(tmp_path / "resumed", {**said, "profile_steps": "2:3"}, callbacks=[kind()])
    train(resumed, str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == whole.state.global_step
    assert resumed.state.epoch == whole.state.epoch
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


class Drifting(Trainer):
    """Weighs its losses by its own count, and by noise that differs between ranks."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.calls = 0
        self.sums: dict[str, list[float]] = {}
        self.noise = torch.Generator().manual_seed(self.args.process_index)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.calls += 1
        self.sums.setdefault("noise", []).append(float(torch.rand((), generator=self.noise)))
        return loss * (1 + self.calls % 7 + sum(self.sums["noise"]))


class Annealed:
    """A loss that changes with its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        self.calls += 1
        return F.cross_entropy(outputs["logits"], labels) * (1 + self.calls % 7)


class Jitter:
    """A collator with noise of its own, and a count."""

    def __init__(self) -> None:
        self.source = random.Random(2)
        self.calls = 0

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.calls += 1
        shift = torch.tensor([0.0, self.source.random() + self.calls % 7])
        labels = torch.tensor([sample["labels"] for sample in samples])
        return {"x": torch.stack([sample["x"] for sample in samples]) + shift, "labels": labels}


OBJECTS: dict[str, dict[str, Any]] = {
    "trainer": {},
    "loss": {"compute_loss_func": Annealed},
    "collator": {"data_collator": Jitter},
}


def with_objects(folder: str, kind: str, resume: str | None = None) -> list[torch.Tensor]:
    said: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}
    said |= {"output_dir": folder, "per_device_train_batch_size": 1, "use_cpu": True, "report_to": "none"}
    args = TrainingArguments(
        **{**said, "disable_tqdm": True, "max_steps": 9, "logging_strategy": "no", "max_grad_norm": 0.0}
    )
    made = {name: make() for name, make in OBJECTS[kind].items()}
    trainer = (Drifting if kind == "trainer" else Trainer)(Seen(), args, train_dataset=rows(), **made)
    train(trainer, resume)
    return [parameter.detach() for parameter in trainer.accelerator.unwrap_model(trainer.model).parameters()]


def resumed_with_objects(folder: str, kind: str) -> None:
    whole = with_objects(f"{folder}/whole", kind)
    resumed = with_objects(f"{folder}/resumed", kind, f"{folder}/whole/checkpoint-4")
    assert all(map(torch.equal, whole, resumed))


@pytest.mark.parametrize("kind", OBJECTS)
def test_what_the_script_gave_the_trainer_goes_on_where_it_was(kind: str, tmp_path: Path) -> None:
    resumed_with_objects(str(tmp_path), kind)


def test_each_rank_goes_on_with_its_own_objects(tmp_path: Path) -> None:
    run_on_ranks(2, resumed_with_objects, str(tmp_path), "trainer")
