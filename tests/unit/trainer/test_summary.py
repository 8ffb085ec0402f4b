"""What a training says before it begins."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import IterableDataset

from paceline import Trainer, TrainingArguments
from tests.support.engines import needs_deepspeed
from tests.support.ranks import run_on_ranks
from tests.support.trainer import Sentences, arguments, tagger


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        rows = Sentences(8, 1)
        return (rows[index] for index in range(8))


def said(folder: str, changes: dict[str, Any], data: Any = None, resume: bool = False) -> dict[str, str]:
    model = tagger()
    next(model.parameters()).requires_grad_(False)
    args = TrainingArguments(**arguments(folder, **changes))
    trainer = Trainer(model, args, train_dataset=data or Sentences(50, 1))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        trainer.train(resume_from_checkpoint=resume or None)
    text = printed.getvalue()
    assert text.count("Training\n") == int(trainer.is_world_process_zero() and changes.get("log_level") != "warning")
    lines = text.partition("Training\n")[2].splitlines()[:5]
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}


def test_one_rank_says_what_it_is_about_to_do(tmp_path: Path) -> None:
    found = said(str(tmp_path), {"max_steps": 2, "gradient_accumulation_steps": 2})
    assert found == {
        "strategy": "single: there is one process; 1 rank on cpu",
        "parameters": "3,245 trained of 4,221 (76.9 %)",
        "steps": "2, 0.3077 epochs of 7 steps, 50 samples an epoch",
        "batch": "8 samples = 1 rank x 2 micro-batches x 4 samples",
        "precision": "float32 throughout",
    }


def test_data_without_a_length(tmp_path: Path) -> None:
    assert said(str(tmp_path), {"max_steps": 2}, Stream())["steps"] == "2, over data of unknown length"


def test_a_resume_says_from_where(tmp_path: Path) -> None:
    said(str(tmp_path), {"max_steps": 3, "save_strategy": "steps", "save_steps": 3})
    found = said(str(tmp_path), {"max_steps": 5, "save_strategy": "no"}, resume=True)
    assert found["steps"].endswith("resumed after step 3")


def test_who_asks_for_warnings_alone_gets_none_of_it(tmp_path: Path) -> None:
    assert said(str(tmp_path), {"max_steps": 1, "log_level": "warning"}) == {}


FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Block"]}, "bf16": True}
STRATEGIES = [
    ({"strategy": "ddp"}, "ddp: set by TrainingArguments(strategy=…)", "float32 throughout"),
    (FSDP, "fsdp: set by TrainingArguments(fsdp=…)", "bf16 mixed precision, weights float32"),
    pytest.param(
        {"deepspeed": {"zero_optimization": {"stage": 3}}},
        "deepspeed: set by TrainingArguments(deepspeed=…)",
        "float32 throughout",
        marks=needs_deepspeed,
    ),
]


@pytest.mark.parametrize(("changes", "reason", "precision"), STRATEGIES)
def test_two_ranks_say_it_once(changes: dict[str, Any], reason: str, precision: str, tmp_path: Path) -> None:
    first, second = run_on_ranks(2, said, str(tmp_path), {"max_steps": 2, **changes})
    assert second == {}
    assert first == {
        "strategy": f"{reason}; 2 ranks on cpu",
        "parameters": "3,245 trained of 4,221 (76.9 %)",
        "steps": "2, 0.2857 epochs of 7 steps, 50 samples an epoch",
        "batch": "8 samples = 2 ranks x 1 micro-batch x 4 samples",
        "precision": precision,
    }


def test_a_model_that_is_trained_as_a_whole(tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(str(tmp_path), max_steps=1))
    trainer = Trainer(tagger(), args, train_dataset=Sentences(4, 1))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        trainer.train()
    assert "4,221 trained of 4,221\n" in printed.getvalue()
    assert "1 epoch of 1 step, 4 samples an epoch" in printed.getvalue()
