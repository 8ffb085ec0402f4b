"""What evaluations give to loss functions and `compute_metrics`, as scripts for transformers' Trainer expect it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paceline import Trainer, TrainingArguments
from paceline.errors import PacelineError
from tests.support.ranks import run_on_ranks
from tests.support.trainer import Sentences, Tagger, accuracy, arguments, tagger


class Scorer(Tagger):
    """One whose forward takes no labels, and computes no loss."""

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(input_ids)


def scorer() -> nn.Module:
    torch.manual_seed(3)
    return Scorer()


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """A loss as scripts write it that are right for accumulation in transformers."""
    total = F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / num_items_in_batch


class Summed(Trainer):
    """The same loss, in a subclass."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        assert num_items_in_batch is not None
        outputs = model(inputs["input_ids"])
        loss = summed(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("cls", [Trainer, Summed])
def test_a_loss_divided_by_the_number_of_items_is_the_same_in_evaluations(tmp_path: Path, cls: type[Trainer]) -> None:
    data: dict[str, Any] = {"train_dataset": Sentences(40, 1), "eval_dataset": Sentences(21, 2)}
    args = TrainingArguments(**arguments(str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1))
    reference = Trainer(tagger(), args, **data)
    reference.train()
    more: dict[str, Any] = {"compute_loss_func": summed} if cls is Trainer else {}
    trainer = cls(scorer(), args, **data, **more)
    trainer.train()
    for entry, expected in zip(trainer.state.log_history, reference.state.log_history, strict=True):
        assert {name: entry[name] for name in ("loss", "eval_loss") if name in entry} == pytest.approx(
            {name: expected[name] for name in ("loss", "eval_loss") if name in expected}
        )


def test_a_loss_function_gets_the_number_of_items_where_losses_are_not_weighted(tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(str(tmp_path), max_steps=2, average_tokens_across_devices=False))
    trainer = Trainer(scorer(), args, train_dataset=Sentences(40, 1), compute_loss_func=summed)
    assert trainer.train().training_loss < 5


def test_a_model_that_takes_no_labels_predicts_for_a_set_that_has_some(tmp_path: Path) -> None:
    args, data = TrainingArguments(**arguments(str(tmp_path), max_steps=2)), Sentences(21, 2)
    found = Trainer(scorer(), args, compute_metrics=accuracy).predict(data)
    expected = Trainer(tagger(), args, compute_metrics=accuracy).predict(data)
    assert (found.predictions == expected.predictions).all()
    assert found.metrics["test_accuracy"] == expected.metrics["test_accuracy"]
    assert "test_loss" not in found.metrics
    with pytest.raises(PacelineError, match="It contains no loss to train on"):
        Trainer(scorer(), args, train_dataset=data).train()


def test_batch_metrics_get_tensors_and_leave_predictions_to_predict(tmp_path: Path) -> None:
    counts = [0, 0]

    def by_batch(prediction: Any, compute_result: bool) -> dict[str, float]:
        there = torch.ne(prediction.label_ids, -100)
        counts[0] += int(torch.eq(prediction.predictions.argmax(dim=-1), prediction.label_ids)[there].sum())
        counts[1] += int(there.sum())
        if not compute_result:
            return {}
        share, counts[:] = counts[0] / counts[1], [0, 0]
        return {"accuracy": share}

    data = Sentences(21, 2)
    args = TrainingArguments(**arguments(str(tmp_path), batch_eval_metrics=True))
    batched = Trainer(tagger(), args, eval_dataset=data, compute_metrics=by_batch)
    whole = Trainer(
        tagger(), TrainingArguments(**arguments(str(tmp_path))), eval_dataset=data, compute_metrics=accuracy
    )
    assert batched.evaluate()["eval_accuracy"] == pytest.approx(whole.evaluate()["eval_accuracy"])
    found, expected = batched.predict(data), whole.predict(data)
    assert (found.predictions == expected.predictions).all()
    assert (found.label_ids == expected.label_ids).all()
    assert found.metrics["test_accuracy"] == pytest.approx(expected.metrics["test_accuracy"])


class Sometimes(Tagger):
    """One whose loss is NaN for batches that begin with certain tokens."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = super().forward(input_ids, labels)
        if labels is not None and (self.everywhere or input_ids[0, 0] % 2):
            outputs["loss"] = outputs["loss"] * math.nan
        return outputs

    everywhere = False


def test_batches_without_a_finite_loss_are_left_out_of_the_evaluation_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Sentences(21, 2)

    def loss_of(model: nn.Module, **changes: Any) -> float:
        args = TrainingArguments(**arguments(str(tmp_path), per_device_eval_batch_size=1, **changes))
        return Trainer(model, args, eval_dataset=data).evaluate()["eval_loss"]

    torch.manual_seed(3)
    model = Sometimes()
    data.tokens[0, 0] = 1
    data.tokens[1, 0] = 2
    kept = [n for n in range(len(data)) if data.tokens[n, 0] % 2 == 0]
    assert math.isnan(loss_of(model, logging_nan_inf_filter=False))
    assert "no finite loss" not in caplog.text
    filtered = loss_of(model)
    assert f"{len(data) - len(kept)} batches of the evaluation have no finite loss" in caplog.text
    data.tokens, data.known = data.tokens[kept], data.known[kept]
    assert filtered == pytest.approx(loss_of(model, logging_nan_inf_filter=False))
    model.everywhere = True
    assert math.isnan(loss_of(model))


class OwnLoss(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:  # type: ignore[override]
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


def test_a_loss_that_was_written_for_evaluations_need_not_take_a_count(tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(str(tmp_path)))
    own, usual = (kind(tagger(), args, eval_dataset=Sentences(21, 2)).evaluate() for kind in (OwnLoss, Trainer))
    assert own["eval_loss"] == pytest.approx(usual["eval_loss"])


def losses_of_gpt2(folder: str) -> list[tuple[float, float]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    rows = [{"input_ids": tokens, "labels": tokens} for tokens in Sentences(8, 1).tokens]
    tokens = torch.stack([row["input_ids"] for row in rows])
    found = []
    for smoothing in (0.0, 0.2):
        torch.manual_seed(0)
        config: Any = GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1, n_positions=8)
        model: Any = GPT2LMHeadModel(config)
        model.eval()
        with torch.no_grad():
            logits = model(tokens).logits[:, :-1].flatten(0, 1)
        expected = F.cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=smoothing)
        args = TrainingArguments(**arguments(folder, label_smoothing_factor=smoothing))
        found.append((Trainer(model, args, eval_dataset=rows).evaluate()["eval_loss"], float(expected)))
    return found


def test_a_language_model_without_a_loss_type_predicts_the_next_token_as_well(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="pip install 'paceline[transformers]'")
    for loss, expected in run_on_ranks(1, losses_of_gpt2, str(tmp_path))[0]:
        assert loss == pytest.approx(expected, rel=1e-5)
