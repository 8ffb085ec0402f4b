"""Labels that are named and not there, and metrics that would never be called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paceline import Trainer, TrainingArguments
from paceline.errors import ConfigError, DataError
from tests.support.ranks import run_on_ranks
from tests.support.trainer import arguments

NAMED = "label_names=\\['typo'\\], and a batch has x, labels"
UNMEASURED = "compute_metrics was given, and a batch has "


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)

    def forward(self, x: Any, labels: Any = None) -> dict[str, Any]:
        logits = self.inner(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class TwoLabels(Classifier):
    def forward(self, x: Any, labels: Any = None, label_of_pair: Any = None) -> dict[str, Any]:
        return super().forward(x, labels)


class Positional(Classifier):
    def forward(self, x: Any) -> dict[str, Any]:  # type: ignore[override]
        return super().forward(x)


def rows(*names: str, count: int = 6) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    kept = [{"x": torch.randn(2), "labels": index % 3, "label_of_pair": 0} for index in range(count)]
    return [{name: row[name] for name in names} for row in kept]


def made(folder: Path | str, data: Any, model: type[nn.Module] = Classifier, **changes: Any) -> tuple[Trainer, Any]:
    called: list[Any] = []

    def measure(prediction: Any) -> dict[str, float]:
        called.append(prediction)
        return {"acc": 1.0}

    own = {name: changes.pop(name) for name in ("compute_metrics", "data_collator") if name in changes}
    args = TrainingArguments(**arguments(str(folder), **changes))
    return Trainer(model(), args, train_dataset=data, eval_dataset=data, **{"compute_metrics": measure, **own}), called


BOTH = rows("x", "labels")


@pytest.mark.parametrize(
    ("data", "changes", "words"),
    [
        (BOTH, {"label_names": ["typo"]}, NAMED),
        (BOTH, {"label_names": ["typo"], "compute_metrics": None}, NAMED),
        (BOTH, {"label_names": ["labels", "typo"]}, "label_names=\\['labels', 'typo'\\]"),
        (BOTH, {"label_names": []}, UNMEASURED + "x, labels. .* label_names is \\[\\]"),
        (rows("x"), {}, UNMEASURED + "x. It needs labels, and label_names is \\['labels'\\]"),
        (BOTH, {"model": TwoLabels}, "and label_names is \\['labels', 'label_of_pair'\\]"),
        ([(row["x"],) for row in BOTH], {"model": Positional}, UNMEASURED + "1 elements without names"),
    ],
)
def test_metrics_that_would_not_be_called_are_refused(data: Any, changes: Any, words: str, tmp_path: Path) -> None:
    trainer, called = made(tmp_path, data, **changes)
    with pytest.raises(DataError, match=words):
        trainer.evaluate()
    assert not called


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (BOTH, {}),
        (BOTH, {"label_names": ["labels"]}),
        (BOTH, {"model": TwoLabels, "label_names": ["labels"]}),
        (rows("x", "labels", "label_of_pair"), {"model": TwoLabels}),
        ([{"x": row["x"], "label": row["labels"]} for row in BOTH], {}),
    ],
)
def test_metrics_are_called_where_the_labels_are_there(data: Any, changes: Any, tmp_path: Path) -> None:
    trainer, called = made(tmp_path, data, **changes)
    assert trainer.evaluate()["eval_acc"] == 1.0
    labels = called[0].label_ids
    assert (labels[0] if isinstance(labels, tuple) else labels).tolist() == [0, 1, 2, 0, 1, 2]


def test_a_prediction_needs_no_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    both: tuple[dict[str, Any], ...] = ({}, {"label_names": ["labels"]})
    for changes in both:
        trainer, called = made(tmp_path, BOTH, **changes)
        assert trainer.predict(rows("x", count=9)).predictions.shape == (9, 3)
        assert not called
        assert caplog.text.count(f"{UNMEASURED}x: it is not called") == 1
        caplog.clear()
    trainer, _ = made(tmp_path, BOTH, label_names=["typo"])
    with pytest.raises(DataError, match=NAMED):
        trainer.predict(BOTH)


def test_a_loss_without_labels_is_still_measured(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(inputs["x"])
            loss = outputs["logits"].square().mean()
            return (loss, outputs) if return_outputs else loss

    args = TrainingArguments(**arguments(str(tmp_path), label_names=[]))
    assert Own(Classifier(), args, eval_dataset=rows("x")).evaluate()["eval_loss"] > 0


def test_the_first_training_batch_shows_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = made(tmp_path, BOTH, label_names=["typo"], max_steps=2)
    trainer.train()
    assert caplog.text.count("label_names has typo, and the first training batch has x, labels") == 1
    caplog.clear()
    made(tmp_path, BOTH, label_names=["labels"], max_steps=2)[0].train()
    assert "first training batch" not in caplog.text


def test_only_the_loss_and_metrics_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prediction_loss_only: given together with compute_metrics"):
        made(tmp_path, BOTH, prediction_loss_only=True)


def refused_on_a_rank(folder: str) -> str:
    trainer, _ = made(folder, rows("x", "labels", count=5), label_names=["typo"])
    with pytest.raises(DataError) as error:
        trainer.evaluate()
    return str(error.value)


def test_every_rank_refuses(tmp_path: Path) -> None:
    for words in run_on_ranks(2, refused_on_a_rank, str(tmp_path)):
        assert "label_names=['typo'], and a batch has x, labels" in words
