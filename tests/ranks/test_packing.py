"""Packed training equals training on the same sequences one by one, under every strategy, also after a resume."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from paceline.trainer import Trainer, TrainingArguments
from tests.ranks.test_trainer_chunked_loss import CLASSES, LAYOUTS, llama
from tests.support.engines import with_deepspeed
from tests.support.ranks import run_on_ranks

pytest.importorskip("transformers", reason="pip install 'paceline[transformers]'")

LENGTH, COUNT = 24, 40
COLUMNS = ("input_ids", "labels")


def tokens_of(index: int) -> torch.Tensor:
    length = 2 + (index * 7) % 19
    return torch.randint(0, CLASSES, (length,), generator=torch.Generator().manual_seed(index))


class Sequences(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = tokens_of(index)
        labels = tokens.clone()
        labels[: index % 3] = -100
        return {"input_ids": tokens, "labels": labels}


class Streamed(IterableDataset[dict[str, torch.Tensor]]):
    """The same, with a state."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        start, self.at = self.at, 0
        for index in range(start, COUNT):
            self.at = index + 1
            yield Sequences()[index]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class OneByOne(Trainer):
    """Gets packed batches, and trains on their sequences padded in rows of their own."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        positions = inputs["position_ids"].reshape(-1)
        starts = [*torch.nonzero(positions == 0).reshape(-1).tolist(), len(positions)]
        rows = {name: torch.full((len(starts) - 1, LENGTH), 0 if name == "input_ids" else -100) for name in COLUMNS}
        mask = torch.zeros(len(starts) - 1, LENGTH, dtype=torch.long)
        for i, (start, end) in enumerate(itertools.pairwise(starts)):
            mask[i, : end - start] = 1
            for name, row in rows.items():
                row[i, : end - start] = inputs[name].reshape(-1)[start:end]
        return super().compute_loss(
            model, {**rows, "attention_mask": mask}, return_outputs, num_items_in_batch=num_items_in_batch
        )


def train(folder: str, kind: type[Trainer] = Trainer, data: Any = None, **settings: Any) -> list[float]:
    """Losses and gradient norms."""
    resume = settings.pop("resume", None)
    attention = settings.pop("attention", "sdpa")
    arguments = TrainingArguments(
        **{
            "output_dir": folder,
            "use_cpu": True,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 5,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "packing": True,
            "packing_length": LENGTH,
            **settings,
        }
    )
    model = llama(tie_word_embeddings=False)
    model.set_attn_implementation(attention)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer = kind(model, arguments, train_dataset=Sequences() if data is None else data)
        trainer.train(resume_from_checkpoint=resume)
    if data is None and trainer.accelerator.is_main_process:
        assert f"Packed {COUNT} samples into" in printed.getvalue()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry[name] for entry in log for name in ("loss", "grad_norm")]


def on_rank(folder: str, layout: dict[str, Any], chunked: bool) -> None:
    packed = train(os.path.join(folder, "packed"), chunked_loss=chunked, **layout)  # noqa: PTH118
    apart = train(os.path.join(folder, "apart"), OneByOne, chunked_loss=False, **layout)  # noqa: PTH118
    assert len(packed) == 10
    assert packed == pytest.approx(apart, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("layout", ["ddp", "fsdp", *with_deepspeed(["zero2", "zero3"])])
def test_packed_training_equals_training_one_by_one(layout: str, tmp_path: Path) -> None:
    run_on_ranks(2, on_rank, str(tmp_path), LAYOUTS[layout], layout in ("ddp", "fsdp"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_kinds_of_attention_on_one_process(attention: str, tmp_path: Path) -> None:
    packed = train(str(tmp_path / "packed"), attention=attention)
    apart = train(str(tmp_path / "apart"), OneByOne, attention=attention)
    assert packed == pytest.approx(apart, rel=1e-5, abs=1e-5)


class WithoutPositions(Trainer):
    """Knowingly wrong: the sequences of a row see each other."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        rows = {name: inputs[name] for name in COLUMNS}
        return super().compute_loss(model, rows, return_outputs, num_items_in_batch=num_items_in_batch)


def test_without_a_mask_of_blocks_the_numbers_differ(tmp_path: Path) -> None:
    packed = train(str(tmp_path / "packed"), chunked_loss=False)
    wrong = train(str(tmp_path / "wrong"), WithoutPositions, chunked_loss=False)
    assert max(abs(one - other) for one, other in zip(packed, wrong, strict=True)) > 1e-3


def resumed(folder: str, streams: bool) -> None:
    data = Streamed if streams else Sequences
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7}
    whole = train(os.path.join(folder, "whole"), data=data(), **settings)  # noqa: PTH118
    again = train(
        os.path.join(folder, "again"),  # noqa: PTH118
        data=data(),
        resume=os.path.join(folder, "whole", "checkpoint-4"),  # noqa: PTH118
        **settings,
    )
    assert again[-6:] == whole[-6:]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_training_goes_on_with_the_same_rows(streams: bool, ranks: int, tmp_path: Path) -> None:
    run_on_ranks(ranks, resumed, str(tmp_path), streams)


def test_a_loader_of_a_subclass_is_not_packed(tmp_path: Path) -> None:
    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader([{"input_ids": torch.arange(5), "labels": torch.arange(5)}] * 20, batch_size=2)  # type: ignore[arg-type]

    assert len(train(str(tmp_path), Own, data=Sequences(), max_steps=2)) == 4
