"""One process: events and flags, what is measured, and models of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paceline import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from paceline.errors import ConfigError, PacelineError, PrepareError
from paceline.trainer.callbacks.base import EVENTS
from tests.support.trainer import Sentences, Tagger, accuracy, arguments, run, tagger


class Notes(TrainerCallback):
    """Writes down every event."""

    def __init__(self) -> None:
        self.events: list[str] = []


def _note(name: str) -> Any:
    def event(self: Notes, args: Any, state: Any, control: Any, **things: Any) -> None:
        self.events.append(name)
        assert name == "on_init_end" or things["model"] is not None

    return event


for _name in EVENTS:
    setattr(Notes, _name, _note(_name))


def test_events_come_in_order(tmp_path: Path) -> None:
    notes = Notes()
    changes = {"max_steps": 2, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run({**changes, "save_strategy": "steps", "save_steps": 2}, str(tmp_path), callbacks=[notes])
    step = ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"]
    evaluation = ["on_prediction_step"] * 6 + ["on_log", "on_evaluate"]
    start = ["on_init_end", "on_train_begin", "on_epoch_begin"]
    assert notes.events == [*start, *step, *step, *evaluation, "on_save", "on_epoch_end", "on_log", "on_train_end"]


class Stops(TrainerCallback):
    """Uses the flags."""

    def on_step_end(self, args: Any, state: Any, control: Any, **things: Any) -> Any:
        control.should_epoch_stop = state.global_step == 3
        control.should_training_stop = state.global_step == 8
        control.should_evaluate = state.global_step == 5
        return control


def test_flags_are_obeyed(tmp_path: Path) -> None:
    log, trainer = run({"max_steps": 30}, str(tmp_path), callbacks=[Stops])
    # Twelve steps make a pass; the first was left after three.
    assert [entry["epoch"] for entry in log if "loss" in entry][:5] == pytest.approx(
        [1 / 12, 2 / 12, 3 / 12, 13 / 12, 14 / 12], abs=1e-6
    )
    assert trainer.state.global_step == 8
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [5]


def test_early_stopping(tmp_path: Path) -> None:
    changes = {"max_steps": 60, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    _, trainer = run({**changes, "learning_rate": 3.0}, str(tmp_path), callbacks=[stopping])
    assert trainer.state.global_step < 60
    with pytest.raises(ConfigError, match="metric_for_best_model"):
        run({"max_steps": 2}, str(tmp_path), callbacks=[EarlyStoppingCallback()])


def test_the_log_is_a_file_of_lines(tmp_path: Path) -> None:
    log, _ = run({"max_steps": 3}, str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert [line["loss"] for line in lines[:3]] == [entry["loss"] for entry in log[:3]]
    assert [line["tokens_seen"] for line in lines[:3]] == [32, 64, 96]
    assert [line["samples_seen"] for line in lines[:3]] == [4, 8, 12]
    assert lines[0]["time"] > 1e9


def test_arguments_and_their_origins_are_kept_once(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("learning_rate: 0.01\nweight_decay: 0.5\n", encoding="utf-8")
    words = [str(file), "--weight_decay", "0.1", "--max_steps", "2", "--torch_compile_backend", "eager"]
    (args,) = TrainingArguments.parse(argv=words)
    origins = args.origins()
    assert origins["learning_rate"] == f"{file}:1"
    assert origins["weight_decay"] == "--weight_decay"
    assert origins["torch_compile"] == "other arguments"
    assert TrainingArguments(seed=42).origins() == {"seed": "TrainingArguments(…)"}
    assert TrainingArguments.from_file(file, weight_decay=0.2).origins()["weight_decay"] == "TrainingArguments(…)"

    _, trainer = run({"max_steps": 2, "project": "p", "run_name": "n", "label_names": ["labels"]}, str(tmp_path))
    trainer.evaluate()
    trainer.end()
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert (record["project"], record["run_name"], len(record["starts"])) == ("p", "n", 1)
    assert record["settings"]["weight_decay"] == 0.1
    assert record["settings"]["origins"]["weight_decay"] == "TrainingArguments(…)"
    assert record["parameters"] == sum(p.numel() for p in tagger().parameters())


def test_report_to_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"report_to: 'wandbb' is unknown; did you mean wandb\?"):
        run({"report_to": "wandbb"}, str(tmp_path))
    _, trainer = run({"report_to": ["console", "jsonl"], "max_steps": 1}, str(tmp_path))
    assert trainer.accelerator.log_with == ("jsonl",)


def test_a_log_entry_is_the_mean_of_its_steps(tmp_path: Path) -> None:
    each, _ = run({"max_steps": 12}, str(tmp_path))
    some, _ = run({"max_steps": 12, "logging_steps": 4}, str(tmp_path))
    losses = [entry["loss"] for entry in each if "loss" in entry]
    means = [sum(losses[at : at + 4]) / 4 for at in range(0, 12, 4)]
    assert [entry["loss"] for entry in some if "loss" in entry] == pytest.approx(means, abs=1e-6)


def test_a_window_of_the_whole_batch_is_the_whole_batch(tmp_path: Path) -> None:
    whole, _ = run({"per_device_train_batch_size": 8, "max_steps": 9}, str(tmp_path))
    parts, _ = run({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 9}, str(tmp_path))
    for one, other in zip(whole, parts, strict=True):
        assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), abs=1e-5)
        assert one.get("grad_norm", 0) == pytest.approx(other.get("grad_norm", 0), abs=1e-5)


class Output(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


class Many(nn.Module):
    """Returns its loss in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.layer(x)
        if labels is None:
            return logits
        loss = F.cross_entropy(logits, labels)
        ways = {"mapping": {"loss": loss, "logits": logits}, "tuple": (loss, logits), "only": loss}
        return ways.get(self.way, Output(loss, logits))


ROWS = [{"x": torch.randn(3, generator=torch.Generator().manual_seed(i)), "labels": i % 2} for i in range(22)]


@pytest.mark.parametrize("way", ["mapping", "tuple", "attribute", "only"])
def test_models_that_return_a_loss(way: str, tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(str(tmp_path), max_steps=5, train_sampling_strategy="sequential"))
    torch.manual_seed(0)
    trainer = Trainer(Many(way), args, train_dataset=ROWS, eval_dataset=ROWS)
    assert trainer.train().global_step == 5
    assert set(trainer.evaluate()) >= {"eval_loss", "eval_runtime"}
    if way != "only":
        found = trainer.predict(ROWS)
        assert found.predictions.shape == (22, 2)
        assert found.label_ids.tolist() == [i % 2 for i in range(22)]


def test_pairs_and_a_function_for_the_loss(tmp_path: Path) -> None:
    pairs = [(row["x"], row["labels"]) for row in ROWS]
    seen: list[float] = []

    def loss(outputs: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        if num_items_in_batch is not None:
            seen.append(float(num_items_in_batch))
            total: torch.Tensor = F.cross_entropy(outputs, labels, reduction="sum") / num_items_in_batch
            return total
        return F.cross_entropy(outputs, labels)

    logs = []
    for change in ({}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}):
        torch.manual_seed(0)
        args = TrainingArguments(**arguments(str(tmp_path), max_steps=5, **change))
        trainer = Trainer(nn.Linear(3, 2), args, train_dataset=pairs, eval_dataset=pairs, compute_loss_func=loss)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert trainer.predict(pairs).predictions.shape == (22, 2)
    assert logs[0] == pytest.approx(logs[1], abs=1e-6)
    assert {2.0, 4.0} <= set(seen)


def test_a_model_without_a_loss_is_told(tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(str(tmp_path)))
    trainer = Trainer(Many("mapping"), args, train_dataset=[{"x": row["x"]} for row in ROWS])
    with pytest.raises(PacelineError, match="no loss"):
        trainer.train()


class Right:
    """A metric that keeps two numbers."""

    def __init__(self) -> None:
        self.right = self.seen = 0

    def update(self, prediction: Any) -> None:
        there = prediction.label_ids != -100
        self.right += int((prediction.predictions.argmax(-1) == prediction.label_ids)[there].sum())
        self.seen += int(there.sum())

    def compute(self) -> dict[str, float]:
        return {"accuracy": self.right / self.seen}


def test_streamed_metrics_keep_nothing(tmp_path: Path) -> None:
    args = arguments(str(tmp_path))
    data = Sentences(21, 2)
    whole = Trainer(tagger(), TrainingArguments(**args), eval_dataset=data, compute_metrics=accuracy).evaluate()
    streamed = Trainer(tagger(), TrainingArguments(**args), eval_dataset=data, compute_metrics=Right()).evaluate()
    counter = Right()

    def by_batch(prediction: Any, compute_result: bool) -> dict[str, float]:
        counter.update(prediction)
        return counter.compute() if compute_result else {}

    changed = TrainingArguments(**args, batch_eval_metrics=True)
    batched = Trainer(tagger(), changed, eval_dataset=data, compute_metrics=by_batch).evaluate()
    assert whole["eval_accuracy"] == pytest.approx(streamed["eval_accuracy"])
    assert whole["eval_accuracy"] == pytest.approx(batched["eval_accuracy"])
    assert whole["eval_loss"] == streamed["eval_loss"]


def test_several_evaluation_sets(tmp_path: Path) -> None:
    sets = {"small": Sentences(5, 1), "large": Sentences(9, 2)}
    args = TrainingArguments(**arguments(str(tmp_path)))
    found = Trainer(tagger(), args, eval_dataset=sets, compute_metrics=accuracy).evaluate()
    assert (found["eval_small_samples"], found["eval_large_samples"]) == (5.0, 9.0)


def test_label_smoothing(tmp_path: Path) -> None:
    log, _ = run({"max_steps": 2, "label_smoothing_factor": 0.2}, str(tmp_path))
    plain, _ = run({"max_steps": 2}, str(tmp_path))
    assert log[0]["loss"] != pytest.approx(plain[0]["loss"], abs=1e-4)


def test_a_budget_of_tokens(tmp_path: Path) -> None:
    # 4 rows of 8 tokens a step.
    log, trainer = run({"max_steps": 50, "max_tokens": 300}, str(tmp_path))
    assert trainer.state.global_step == 10
    assert trainer.state.num_input_tokens_seen == 320
    assert log[0]["num_input_tokens_seen"] == 32


def test_tokens_without_padding_are_counted(tmp_path: Path) -> None:
    log, _ = run({"max_steps": 2, "include_num_input_tokens_seen": True}, str(tmp_path))
    assert [entry.get("num_input_tokens_seen") for entry in log[:2]] == [32, 64]


class Hungry(Tagger):
    """Has memory for three rows only."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.calls = getattr(self, "calls", 0) + 1
        if self.training and len(input_ids) > 3 and self.calls > 2:
            raise torch.OutOfMemoryError("out of memory: there is none")
        return super().forward(input_ids, labels)


def hungry() -> nn.Module:
    torch.manual_seed(3)
    return Hungry()


def test_memory_that_runs_out_changes_nothing_but_the_split(tmp_path: Path) -> None:
    changes = {"max_steps": 5, "per_device_train_batch_size": 8}
    plain, _ = run(changes, str(tmp_path))
    found, trainer = run({**changes, "auto_find_batch_size": True}, str(tmp_path), make=hungry)
    assert trainer.accelerator.gradient_accumulation_steps == 4
    for one, other in zip(plain, found, strict=True):
        assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), abs=1e-5)
    with pytest.raises(torch.OutOfMemoryError):
        run(changes, str(tmp_path), make=hungry)


def test_a_sharded_model_cannot_go_on_by_itself(tmp_path: Path) -> None:
    changes = {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 1000}}
    with pytest.raises(ConfigError, match=r"for 1 rank\(s\) under fsdp, but the launcher does not restart ranks"):
        run({**changes, "auto_find_batch_size": True}, str(tmp_path), make=hungry)


def test_memory_that_runs_out_elsewhere_is_no_matter_of_the_batch(tmp_path: Path) -> None:
    def measured(prediction: Any) -> dict[str, float]:
        raise torch.OutOfMemoryError("out of memory: there is none")

    changes = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "auto_find_batch_size": True}
    args = TrainingArguments(**arguments(str(tmp_path), **changes))
    trainer = Trainer(
        tagger(), args, train_dataset=Sentences(9, 1), eval_dataset=Sentences(9, 1), compute_metrics=measured
    )
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert trainer.state.train_batch_size == trainer.get_total_train_batch_size() == 4


def test_a_window_of_steps_is_profiled(tmp_path: Path) -> None:
    run({"max_steps": 4, "profile_steps": "2:3"}, str(tmp_path))
    assert (tmp_path / "profile" / "profile_0.json").stat().st_size > 1000


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    plain, _ = run({"max_steps": 3}, str(tmp_path))
    again, _ = run({"max_steps": 3, "activation_checkpointing": True}, str(tmp_path))
    assert plain == again


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({}, PrepareError, "neither model nor model_init"),
        ({"model": Tagger(), "args": {"eval_strategy": "steps"}}, ConfigError, "without an eval_dataset"),
    ],
    ids=["no model", "no data"],
)
def test_what_a_trainer_refuses(more: dict[str, Any], error: type[Exception], said: str, tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(str(tmp_path), **more.get("args", {})))
    with pytest.raises(error, match=said):
        Trainer(more.get("model"), args, train_dataset=Sentences(4, 1))


def test_a_second_training_begins_anew_with_the_same_model(tmp_path: Path) -> None:
    _, trainer = run({"max_steps": 6}, str(tmp_path))
    first = trainer.state.log_history[0]["loss"]
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.state.log_history[0]["loss"] < first


def test_peak_memory_is_measured_when_asked(tmp_path: Path) -> None:
    log, _ = run({"max_steps": 1, "skip_memory_metrics": False}, str(tmp_path))
    assert log[-1]["peak_memory_bytes"] > 1e6
