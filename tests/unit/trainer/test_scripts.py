"""What scripts written for transformers' Trainer do around a training, and what they override."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from paceline import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from paceline.errors import CheckpointError, ConfigError, DataError, NotBuiltError, PacelineError, PrepareError
from paceline.trainer.optim.optimizers import optimizer_class
from tests.support.ranks import run_on_ranks
from tests.support.trainer import Sentences, arguments, run, tagger


def made(
    folder: Path | str, cls: type[Trainer] = Trainer, changes: dict[str, Any] | None = None, **more: Any
) -> Trainer:
    args = TrainingArguments(**arguments(str(folder), **{"max_steps": 4, **(changes or {})}))
    data = {"train_dataset": Sentences(40, 1), "eval_dataset": Sentences(21, 2)}
    return cls(**{"model": tagger(), "args": args, **data, **more})


def test_the_end_of_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = made(tmp_path, changes={"eval_strategy": "steps", "eval_steps": 2})
    found = trainer.train()
    trainer.log_metrics("train", found.metrics)
    text = capsys.readouterr().out
    assert "***** train metrics *****" in text
    assert "train_loss " in text
    assert "train_runtime            = 0:00:" in text
    trainer.save_metrics("train", found.metrics)
    metrics = trainer.evaluate()
    assert metrics["epoch"] == 0.4
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    trainer.create_model_card(finetuned_from="a/model", tasks="text-generation", dataset=["one", "two"])
    kept = {
        name: json.loads((tmp_path / f"{name}_results.json").read_text("utf-8")) for name in ("train", "eval", "all")
    }
    assert kept["all"] == {**kept["train"], **kept["eval"]} == {**found.metrics, **metrics}
    card = (tmp_path / "README.md").read_text("utf-8")
    assert 'base_model: "a/model"' in card
    assert f"| eval_loss | {metrics['eval_loss']:.4f} |".rstrip("0 |") in card
    assert "* `learning_rate`: 0.01" in card
    assert trainer.get_learning_rates() == [0.0, 0.0]
    assert trainer.get_num_trainable_parameters() == sum(p.numel() for p in tagger().parameters())


def test_what_is_not_there_says_so(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    for call in (trainer.hyperparameter_search, trainer.push_to_hub):
        with pytest.raises(NotBuiltError, match="does not support it"):
            call()


def test_what_scripts_ask_of_their_arguments(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, push_to_hub=False, log_level="info")
    assert (args.device.type, args.n_gpu, args.local_rank, args.push_to_hub) == ("cpu", 0, -1, False)
    assert args.parallel_mode.value == "not_parallel"
    assert args.get_process_log_level() == logging.INFO
    assert args.ddp_timeout_delta.total_seconds() == 1800
    with args.main_process_first(desc="tokenizing"):
        (tmp_path / "tokens").touch()
    cls, said = Trainer.get_optimizer_cls_and_kwargs(args)
    assert cls(tagger().parameters(), **said).defaults["lr"] == 5e-5


def prepares_data(folder: str) -> tuple[str, str, int]:
    args = TrainingArguments(**arguments(folder))
    file = Path(folder, "data")
    with args.main_process_first(desc="tokenizing"):
        if not file.exists():
            file.write_text(str(args.process_index), "utf-8")
    mode = args.parallel_mode.value
    trainer = made(folder, cls=OwnLoaders, changes={"average_tokens_across_devices": False})
    trainer.train()
    trainer.evaluate()
    return file.read_text("utf-8"), mode, trainer.state.global_step


class OwnLoaders(Trainer):
    """Makes its loaders by hand, and does not prepare them."""

    def get_train_dataloader(self) -> Any:
        sampler = WeightedRandomSampler([1.0] * 40, 40)
        return DataLoader(self.train_dataset, batch_size=4, sampler=sampler, collate_fn=self.data_collator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return DataLoader(self.eval_dataset, batch_size=4, collate_fn=self.data_collator)


def test_loaders_of_ones_own_and_turns_on_ranks(tmp_path: Path) -> None:
    assert prepares_data(str(tmp_path)) == ("0", "not_parallel", 4)
    (tmp_path / "data").unlink()
    for found in run_on_ranks(2, prepares_data, str(tmp_path)):
        assert found == ("0", "distributed", 4)


class OwnSampler(Trainer):
    """Draws the first half of the samples only."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return WeightedRandomSampler([1.0] * (len(train_dataset) // 2), 20)


def test_a_sampler_of_ones_own(tmp_path: Path) -> None:
    trainer = made(tmp_path, OwnSampler)
    trainer.train_dataset.read.clear()
    trainer.train()
    assert trainer.train_dataset.read
    assert max(trainer.train_dataset.read) < 20


class Takes(Trainer):
    """Takes the labels out of the batch, as many scripts do."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), ignore_index=-100)
        return (loss, outputs) if return_outputs else loss


def test_a_loss_that_takes_the_labels_out(tmp_path: Path) -> None:
    assert made(tmp_path, Takes).evaluate()["eval_loss"] == pytest.approx(
        made(tmp_path).evaluate()["eval_loss"], rel=1e-6
    )


class Sees(TrainerCallback):
    """Notes of what kind the model is that each event brings."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **things: Any) -> None:
        self.seen["init"] = model

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **things: Any) -> None:
        self.seen["evaluate"] = model

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **things: Any) -> None:
        self.seen["log"] = model


def test_callbacks_see_the_model_without_a_training(tmp_path: Path) -> None:
    sees = Sees()
    trainer = made(tmp_path, callbacks=[sees])
    trainer.evaluate()
    assert sees.seen == dict.fromkeys(("init", "evaluate", "log"), trainer.model)


def callbacks_of_transformers(folder: str) -> tuple[bool, int, int]:
    import transformers

    integrations: Any = import_module("transformers.integrations")
    changes = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "save_strategy": "steps"}
    theirs: list[Any] = [transformers.EarlyStoppingCallback(1), integrations.TensorBoardCallback()]
    made(folder, changes=changes, callbacks=theirs).train()
    state = str(Path(folder) / "checkpoint-4" / "trainer_state.json")
    read: Any = transformers.TrainerState.load_from_json(state)
    return (
        bool(list(Path(folder).rglob("events.out*"))),
        read.global_step,
        TrainerState.load_from_json(state).global_step,
    )


def test_callbacks_of_transformers_work(tmp_path: Path) -> None:
    for package in ("transformers", "tensorboard"):
        pytest.importorskip(package, reason=f"pip install 'paceline[{package}]'")
    assert run_on_ranks(1, callbacks_of_transformers, str(tmp_path)) == [(True, 4, 4)]


@pytest.mark.parametrize(
    ("values", "best", "loaded", "said"),
    [
        # What is measured every two steps is saved every four.
        ([1.0, 2.0, 9.0, 3.0], (6, 9.0), "checkpoint-8", "step 6, the best, was not saved"),
        ([float("nan"), 2.0, 1.0, 3.0], (8, 3.0), "checkpoint-8", ""),
        ([float("nan")] * 4, (None, None), None, "no evaluation gave a number"),
    ],
    ids=["not saved", "no number first", "no number"],
)
def test_the_best_that_was_saved(
    values: list[float], best: Any, loaded: str | None, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}
    changes |= {"load_best_model_at_end": True, "metric_for_best_model": "q"}
    drawn = iter(values)
    trainer = made(tmp_path, changes=changes, compute_metrics=lambda _: {"q": next(drawn)})
    trainer.train()
    assert (trainer.state.best_global_step, trainer.state.best_metric) == best
    found = trainer.state.best_model_checkpoint
    assert (found and Path(found).name) == loaded
    assert said in caplog.text


def test_no_number_is_no_improvement(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"max_steps": 20, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "one_q"}
    sets = {"one": Sentences(5, 1), "other": Sentences(5, 2)}
    trainer = made(
        tmp_path,
        changes=changes,
        eval_dataset=sets,
        compute_metrics=lambda _: {"q": float("nan")},
        callbacks=[EarlyStoppingCallback(3)],
    )
    trainer.train()
    assert trainer.state.global_step == 6
    assert "Early stopping" not in caplog.text, "the other set has no such metric, and need not"


def test_names_of_metrics(tmp_path: Path) -> None:
    trainer = made(tmp_path, compute_metrics=lambda _: {"evaluation": 1.0, "eval_x": 2.0, "accuracy": 3.0})
    assert {"eval_evaluation", "eval_x", "eval_accuracy"} <= set(trainer.evaluate())
    assert {"a_evaluation", "a_eval_x", "a_accuracy"} <= set(trainer.evaluate(metric_key_prefix="a"))


def test_what_is_measured_must_have_names(tmp_path: Path) -> None:
    with pytest.raises(PacelineError, match="compute_metrics returned a NoneType"):
        made(tmp_path, compute_metrics=lambda _: None).evaluate()


def test_a_set_without_samples(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="has no samples"):
        made(tmp_path, train_dataset=[]).train()


class Pair(NamedTuple):
    """States beside the logits."""

    one: torch.Tensor
    other: torch.Tensor


class Stateful(nn.Module):
    """Returns named tuples within its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        logits = self.layer(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits, "states": Pair(logits, logits[:, :1])}


def test_named_tuples_in_outputs(tmp_path: Path) -> None:
    logits, states = made(tmp_path, model=Stateful()).predict(ROWS).predictions
    assert isinstance(states, Pair)
    assert (states.one == logits).all()
    assert states.other.shape == (20, 1)


@dataclass(slots=True)
class Slots:
    """What a model may return as well."""

    loss: Any
    logits: Any


class Small(nn.Module):
    """Returns an object without a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.layer(x)
        return Slots(None if labels is None else F.cross_entropy(logits, labels), logits)


ROWS = [{"x": torch.full((3,), float(i)), "labels": i % 2} for i in range(20)]
UNLABELLED = [{"x": row["x"]} for row in ROWS]


def test_outputs_with_slots(tmp_path: Path) -> None:
    trainer = made(tmp_path, model=Small(), train_dataset=ROWS)
    trainer.train()
    assert trainer.predict(ROWS).predictions.shape == (20, 3)


def test_a_function_for_the_loss_needs_no_labels(tmp_path: Path) -> None:
    def spread(outputs: Slots, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        assert labels is None
        loss: torch.Tensor = outputs.logits.square().mean()
        return loss

    both: dict[str, Any] = {"train_dataset": UNLABELLED, "eval_dataset": UNLABELLED}
    trainer = made(tmp_path, model=Small(), compute_loss_func=spread, **both)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_smoothing_needs_labels_and_no_other_loss(tmp_path: Path) -> None:
    changes = {"label_smoothing_factor": 0.1}
    with pytest.raises(PacelineError, match="the batch has no 'labels'"):
        made(tmp_path, changes=changes, model=Small(), train_dataset=UNLABELLED).train()
    with pytest.raises(ConfigError, match="given together with compute_loss_func"):
        made(tmp_path, changes=changes, compute_loss_func=lambda *_, **__: None)


class Stream(IterableDataset[dict[str, torch.Tensor]]):
    """Six samples, without a length."""

    def __iter__(self) -> Any:
        return iter([Sentences(6, 1)[index] for index in range(6)])


class Rows(Trainer):
    """Notes how many rows each micro-batch has."""

    rows: list[int]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.rows = [*getattr(self, "rows", []), len(inputs["labels"])]
        return super().training_step(model, inputs, num_items_in_batch)


def test_streams_leave_out_what_is_incomplete_and_have_no_lengths(tmp_path: Path) -> None:
    trainer = made(tmp_path, Rows, {"dataloader_drop_last": True}, train_dataset=Stream())
    assert isinstance(trainer, Rows)
    trainer.train()
    assert trainer.rows == [4, 4, 4, 4]
    with pytest.raises(DataError, match="A Stream is a stream: it has no length"):
        made(tmp_path, changes={"train_sampling_strategy": "group_by_length"}, train_dataset=Stream()).train()


def test_a_model_that_takes_no_column_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Samples have text, and the model takes input_ids"):
        made(tmp_path, train_dataset=[{"text": "a"}] * 8).train()


def test_an_evaluation_set_that_is_not_there(tmp_path: Path) -> None:
    trainer = made(tmp_path, eval_dataset={"small": Sentences(5, 1)})
    with pytest.raises(PrepareError, match="did you mean small"):
        trainer.evaluate("smal")
    with pytest.raises(PrepareError, match="is not a mapping of several"):
        made(tmp_path).evaluate("small")


def test_each_training_begins_with_a_model_of_its_own(tmp_path: Path) -> None:
    trainer = made(tmp_path, model=None, model_init=lambda trial: tagger())
    firsts = []
    for _ in range(2):
        trainer.train()
        firsts.append(trainer.state.log_history[0]["loss"])
    assert firsts[0] == firsts[1]
    with pytest.raises(PrepareError, match="model_init returned None"):
        made(tmp_path, model=None, model_init=lambda: None)


def test_a_resume_says_what_the_checkpoint_decides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    run(changes, str(tmp_path))
    run(changes, str(tmp_path), resume=str(tmp_path / "checkpoint-2"))
    assert "continues with" not in caplog.text
    run({**changes, "learning_rate": 0.5, "adam_beta1": 0.8}, str(tmp_path), resume=str(tmp_path / "checkpoint-2"))
    assert "learning_rate = 0.01 from the checkpoint, not 0.5" in caplog.text
    assert "betas = (0.9, 0.999) from the checkpoint, not (0.8, 0.999)" in caplog.text
    assert "weight_decay" not in caplog.text


@pytest.mark.parametrize("by_name", [False, True])
def test_weights_alone_are_no_place_to_go_on_from(by_name: bool, tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True, "max_steps": 4}
    run(changes, str(tmp_path))
    with pytest.raises(CheckpointError, match="checkpoint-4 contains only weights"):
        run(changes, str(tmp_path), resume=str(tmp_path / "checkpoint-4") if by_name else True)


def test_something_made_already_takes_no_arguments(tmp_path: Path) -> None:
    model = tagger()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    changes = {"optim_args": "momentum=0.9", "lr_scheduler_kwargs": {"num_cycles": 2}}
    with pytest.raises(ConfigError) as raised:
        made(tmp_path, changes=changes, model=model, optimizers=(optimizer, schedule))
    assert {problem.key for problem in raised.value.problems} == {"optim_args", "lr_scheduler_kwargs"}


def test_betas_reach_every_optimizer_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package: only what it would be told is looked at."""
    names = ("Lion", "AdEMAMix")
    stand_in = SimpleNamespace(**{name: type(name, (), {}) for name in names})
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=stand_in))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", stand_in)
    said = [
        optimizer_class(TrainingArguments(optim=name, adam_beta1=0.8, adam_epsilon=1e-5), torch.device("cpu"))[1]
        for name in ("lion_32bit", "ademamix")
    ]
    assert [part["betas"] for part in said] == [(0.8, 0.999), (0.8, 0.999, 0.9999)]
    assert [part.get("eps") for part in said] == [None, 1e-5]


class Warming(torch.optim.AdamW):
    """Stands in for a schedule-free optimizer."""

    told: Any = None

    def __init__(self, *args: Any, warmup_steps: int = 0, **kwargs: Any) -> None:
        Warming.told = warmup_steps
        super().__init__(*args, **kwargs)


def test_a_share_of_all_steps_is_a_warmup_of_a_schedule_free_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", SimpleNamespace(AdamWScheduleFree=Warming))
    changes = {"optim": "schedule_free_adamw", "warmup_steps": 0.5, "max_steps": -1, "num_train_epochs": 1}
    made(tmp_path, changes=changes).train()
    assert Warming.told == 5, "half of the ten steps of a pass"


class TwoModes(torch.optim.SGD):
    """Has a mode for training and one for evaluation, as schedule-free optimizers do."""

    mode = ""

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


class SavesInto(TrainerCallback):
    """Tries to save the weights in the middle of a training, and notes the mode of the optimizer afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trainer: Trainer
        self.modes: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        with pytest.raises(PacelineError, match="could not be saved"):
            self.trainer.save_model(str(self.folder))
        self.modes.append(things["optimizer"].optimizer.mode)


def test_training_goes_on_with_its_own_weights_after_a_failed_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    model, saves = tagger(), SavesInto(tmp_path / "file")
    optimizers = (TwoModes(model.parameters(), lr=0.01), None)
    saves.trainer = made(tmp_path / "run", model=model, callbacks=[saves], optimizers=optimizers)
    saves.trainer.train()
    assert saves.modes == ["train"] * 4


class EvaluatesAtEnd(TrainerCallback):
    """Evaluates once more when the training has ended."""

    trainer: Trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        self.trainer.evaluate()


def test_averaged_weights_stay_when_a_callback_evaluates_at_the_end(tmp_path: Path) -> None:
    model, evaluates = tagger(), EvaluatesAtEnd()
    optimizer = TwoModes(model.parameters(), lr=0.01)
    evaluates.trainer = made(tmp_path, model=model, callbacks=[evaluates], optimizers=(optimizer, None))
    for _ in range(2):
        evaluates.trainer.train()
        assert optimizer.mode == "eval"


class Foreign(Trainer):
    """A subclass as written for transformers' Trainer."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        raise AssertionError("never called")

    def _prepare_inputs(self, inputs: Any) -> Any:
        return super()._prepare_inputs(inputs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir)


def test_overrides_that_are_not_called_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path, Foreign, {"save_strategy": "steps"})
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "Foreign._save_checkpoint is not called by this Trainer: override save_checkpoint.",
        "Foreign.save_model is not called by a checkpoint: override save_checkpoint as well, or set save_only_model.",
    ]
    caplog.clear()
    made(tmp_path, Foreign, {"save_strategy": "steps", "save_only_model": True})
    made(tmp_path)
    assert ["save_model" in record.getMessage() for record in caplog.records] == [False]


def test_scripts_ask_which_strategy_trains(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    assert (trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled) == (False, False)
