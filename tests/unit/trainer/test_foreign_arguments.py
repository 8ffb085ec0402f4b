"""Arguments of one library in the hands of the other's Trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from paceline import Trainer, TrainingArguments
from paceline.errors import PrepareError
from tests.support.trainer import Sentences, tagger


@dataclass
class Further(TrainingArguments):
    beta: float = 0.1


def test_arguments_of_transformers_are_named_as_such(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install 'paceline[transformers]'")
    theirs = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    inherited = type("OwnArguments", (transformers.TrainingArguments,), {})(output_dir=str(tmp_path), use_cpu=True)
    for args in (theirs, inherited):
        with pytest.raises(PrepareError, match=r"for transformers' Trainer.* from paceline import Training"):
            Trainer(tagger(), args, train_dataset=Sentences(8, 1))


def test_the_trainer_of_transformers_is_told_whose_arguments_it_got(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install 'paceline[transformers]'")
    ours = Further(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(PrepareError, match=r"transformers' Trainer got paceline's Further.*from paceline import"):
        transformers.Trainer(tagger(), ours, train_dataset=Sentences(8, 1))
    assert ours.get_process_log_level() > 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max_steps": 1}, r"TrainingArguments\(\*\*args\)"),
        ("out", r"builtins.str as args.*TrainingArguments\(output_"),
    ],
)
def test_what_are_no_arguments(args: Any, words: str) -> None:
    with pytest.raises(PrepareError, match=words):
        Trainer(tagger(), args)


def test_arguments_with_further_fields_are_taken(tmp_path: Path) -> None:
    assert Trainer(tagger(), Further(output_dir=str(tmp_path), use_cpu=True)).args.output_dir == str(tmp_path)
