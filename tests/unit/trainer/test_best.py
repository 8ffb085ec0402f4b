"""Which checkpoint is the best: the best that was saved, in every order of evaluations and saves."""

from __future__ import annotations

import contextlib
import io
import math
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from paceline import Trainer, TrainerCallback, TrainingArguments
from tests.support.engines import slowly
from tests.support.trainer import Counted, Sentences, arguments, tagger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEPS = 12
METRIC = {"metric_for_best_model": "q", "greater_is_better": True, "logging_strategy": "no"}


class Course(TrainerCallback):
    """Evaluates and saves at given steps, whatever the arguments say; each before the other, as asked."""

    def __init__(self, evaluations: set[int], saves: set[int], saves_first: set[int]) -> None:
        self.evaluations, self.saves, self.saves_first = evaluations, saves, saves_first
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        if state.global_step in self.saves_first & self.saves:
            self.trainer.save_checkpoint()
        control.should_evaluate = state.global_step in self.evaluations
        control.should_save = state.global_step in self.saves - self.saves_first


def trainer_of(
    folder: Path, course: Course | None, value: Callable[[int], float], **changes: Any
) -> tuple[Trainer, list[int]]:
    measured: list[int] = []

    def metrics(_: Any) -> dict[str, float]:
        measured.append(trainer.state.global_step)
        return {"q": value(trainer.state.global_step)}

    said = {"max_steps": STEPS, "save_strategy": "no", **METRIC, **changes}
    trainer = Trainer(
        tagger(),
        TrainingArguments(**arguments(str(folder), **said)),
        train_dataset=Sentences(24, 1),
        eval_dataset=Sentences(4, 2),
        compute_metrics=metrics,
        callbacks=[] if course is None else [course],
    )
    if course is not None:
        course.trainer = trainer
    return trainer, measured


def train(trainer: Trainer, resume: str | None = None) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(resume_from_checkpoint=resume)


def is_loaded(trainer: Trainer, folder: str) -> bool:
    held = load_file(Path(folder) / "model.safetensors")
    return torch.equal(held["head.weight"], trainer.model.state_dict()["head.weight"])


def draws(seed: int) -> Iterator[tuple[Course, dict[int, float], int | None]]:
    """Courses with ties and values that are no numbers."""
    draw = random.Random(seed)
    for _ in range(4):
        evaluations, saves, first = (set(draw.sample(range(1, STEPS + 1), draw.randint(1, 8))) for _ in range(3))
        values = {step: draw.choice([0.1, 0.2, 0.3, 0.4, math.nan]) for step in evaluations}
        yield Course(evaluations, saves, first), values, draw.choice([None, 1, 2])


@pytest.mark.parametrize("seed", [0, *slowly([1, 2])])
def test_the_best_is_the_best_of_what_was_saved(seed: int, tmp_path: Path) -> None:
    for number, (course, values, limit) in enumerate(draws(seed)):
        folder = tmp_path / str(number)
        trainer, _ = trainer_of(folder, course, values.__getitem__, save_total_limit=limit)
        train(trainer)
        both = [step for step in sorted(course.saves & course.evaluations) if not math.isnan(values[step])]
        # The first of several that are as good.
        step = max(both, key=lambda step: (values[step], -step), default=None)
        expected = None if step is None else str(folder / f"checkpoint-{step}")
        assert trainer.state.best_model_checkpoint == expected
        assert expected is None or Path(expected).is_dir(), "a limit never removes the best"
        left = {int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")}
        kept = course.saves if limit is None else set(sorted(course.saves)[-limit:])
        assert kept >= left - {step}
        assert len(left) <= len(kept) + 1


@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize(
    ("values", "best"),
    [((0.5, 0.1, 0.9, 0.3, 0.2), 8), ((0.5, 0.6, 0.1, 0.3, 0.2), 4), ((0.1, 0.6, 0.9, 0.6, 0.2), 4)],
    ids=["a better step was not saved", "the first", "a tie"],
)
def test_the_best_that_was_saved_is_loaded(
    values: tuple[float, ...], best: int, limit: int | None, weights_only: bool, tmp_path: Path
) -> None:
    steps = {"max_steps": 10, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}
    more = {"load_best_model_at_end": True, "save_total_limit": limit, "save_only_model": weights_only}
    trainer, _ = trainer_of(tmp_path, None, lambda step: values[step // 2 - 1], **steps, **more)
    train(trainer)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert is_loaded(trainer, trainer.state.best_model_checkpoint)


class Counting(TrainerCallback):
    """Counts steps, and notes the count of the end."""

    def __init__(self) -> None:
        self.steps = 0
        self.at_end = 0

    def on_step_end(self, *_: Any, **things: Any) -> None:
        self.steps += 1

    def on_train_end(self, *_: Any, **things: Any) -> None:
        self.at_end = self.steps


def test_loading_the_best_weights_sets_nothing_else_back(tmp_path: Path) -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    more = {"load_best_model_at_end": True, "include_num_input_tokens_seen": "all"}
    trainer, _ = trainer_of(tmp_path, None, lambda step: -abs(step - 4), **steps, **more)
    trainer.add_callback(counting := Counting())
    train(trainer)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert is_loaded(trainer, trainer.state.best_model_checkpoint)
    assert (counting.steps, counting.at_end, trainer.state.global_step) == (STEPS, STEPS, STEPS)


def test_saved_at_the_last_step_of_a_pass_and_measured_at_its_end(tmp_path: Path) -> None:
    """Six steps a pass: what is saved at step 6 by steps is measured afterwards, by passes."""
    said = {"max_steps": 18, "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 6, "save_total_limit": 1}
    trainer, measured = trainer_of(tmp_path, None, lambda step: {6: 0.2, 12: 0.9, 18: 0.5}[step], **said)
    train(trainer)
    assert measured == [6, 12, 18]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-12")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-18"]


@pytest.mark.parametrize("moved", [False, True])
def test_a_resumed_run_knows_the_best(moved: bool, tmp_path: Path) -> None:
    course = Course({2, 4, 6, 8, 10, 12}, {4, 8, 12}, set())
    values = {2: 0.9, 4: 0.7, 6: 0.8, 8: 0.1, 10: 0.2, 12: 0.6}
    folder = tmp_path / "run"
    train(trainer_of(folder, course, values.__getitem__)[0])
    shutil.rmtree(folder / "checkpoint-12")
    if moved:
        folder = folder.rename(tmp_path / "moved")
    trainer, measured = trainer_of(folder, course, values.__getitem__, save_total_limit=1)
    train(trainer, str(folder / "checkpoint-8"))
    assert measured == [2, 4, 6, 8, 10, 12], "with those before the checkpoint"
    assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-4")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-4"]


def test_a_best_that_is_gone_is_no_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    course = Course({4, 8, 12}, {4, 8, 12}, set())
    train(trainer_of(tmp_path, course, {4: 0.7, 8: 0.1, 12: 0.6}.__getitem__)[0])
    shutil.rmtree(tmp_path / "checkpoint-4")
    trainer, _ = trainer_of(tmp_path, course, {12: 0.6}.__getitem__)
    train(trainer, str(tmp_path / "checkpoint-8"))
    assert "checkpoint-4 (0.7), no longer exists" in caplog.text
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-12")


def test_another_metric_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    course = Course({4, 8, 12}, {4, 8, 12}, set())
    train(trainer_of(tmp_path, course, {4: 0.7, 8: 0.1, 12: 0.6}.__getitem__)[0])
    trainer, _ = trainer_of(tmp_path, course, {12: 0.6}.__getitem__, greater_is_better=False)
    train(trainer, str(tmp_path / "checkpoint-8"))
    assert "the search for the best checkpoint starts over" in caplog.text
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-12")
    assert trainer.state.best_metric == 0.6


def test_later_checkpoints_of_a_run_that_went_back_go_first(tmp_path: Path) -> None:
    steps = Course(set(), {2, 4, 6, 8, 10, 12}, set())
    train(trainer_of(tmp_path, steps, float)[0])
    trainer, _ = trainer_of(tmp_path, Course(set(), {5, 6}, set()), float, save_total_limit=2, max_steps=6)
    train(trainer, str(tmp_path / "checkpoint-4"))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_a_checkpoint_that_was_moved_and_linked_is_not_lost(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    train(trainer_of(folder, Course(set(), {2, 4}, set()), float, max_steps=4)[0])
    (folder / "checkpoint-2").rename(elsewhere)
    (folder / "checkpoint-2").symlink_to(elsewhere)
    trainer, _ = trainer_of(folder, Course(set(), {6}, set()), float, save_total_limit=1, max_steps=6)
    train(trainer, str(folder / "checkpoint-4"))
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]
    assert any(elsewhere.iterdir())


def test_the_best_only_and_what_a_callback_asks_for(tmp_path: Path) -> None:
    class Asks(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **things: Any) -> None:
            control.should_save |= state.global_step == 6

    said = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best"}
    values = {2: 0.5, 4: 0.6, 6: 0.1, 8: 0.2}
    trainer, _ = trainer_of(tmp_path, None, values.__getitem__, **said)
    trainer.add_callback(Asks())
    train(trainer)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 4, 6)]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")


def test_only_the_weights_go_back_to_the_best_step(tmp_path: Path) -> None:
    """What a run that does not load the best has at its end: schedule, generators, position, registered objects."""
    ends = []
    for loads_best in (False, True):
        each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
        changes = {**METRIC, **each, "load_best_model_at_end": loads_best}
        args = TrainingArguments(**arguments(str(tmp_path / str(loads_best)), **changes))
        counted = Counted()
        course = Falls(counted)
        trainer = Trainer(
            tagger(),
            args,
            train_dataset=Sentences(48, 1),
            eval_dataset=Sentences(4, 2),
            compute_metrics=lambda prediction, course=course: {"q": -course.value},
            callbacks=[course],
        )
        trainer.accelerator.register_for_checkpointing(counted)
        trainer.train()
        assert trainer.state.best_global_step == 1
        position = course.loader.state_dict()
        generators = (torch.rand(1).item(), random.random())
        ends.append((counted.value, trainer.lr_scheduler.state_dict(), position, generators))
        weights = load_file(tmp_path / str(loads_best) / f"checkpoint-{1 if loads_best else 4}" / "model.safetensors")
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, weights[name])
    assert ends[0] == ends[1]


class Falls(TrainerCallback):
    """Counts steps, and draws from the generators in each; keeps the loader."""

    def __init__(self, counted: Counted) -> None:
        self.counted = counted
        self.value = 0
        self.loader: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        self.value = self.counted.value = state.global_step
        self.loader = things["train_dataloader"]
        torch.rand(1)
        random.random()
