"""What subclasses of the Trainer hand over as loaders, on one rank and on two."""

from __future__ import annotations

import contextlib
import io
import logging
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from paceline import Accelerator, DataLoaderConfiguration, Trainer, TrainingArguments
from paceline.errors import DataError
from tests.support.engines import needs_deepspeed
from tests.support.ranks import run_on_ranks
from tests.support.trainer import Sentences, accuracy, arguments, farthest, tagger, timeless

SAMPLES, BATCH = 24, 4


class Batches:
    """No `DataLoader`: it has a length and can be iterated; of several ranks, each may have its own part."""

    def __init__(self, data: Any, rank: int, size: int, step: int) -> None:
        self._data, self._rank, self._size, self._step = data, rank, size, step

    def __len__(self) -> int:
        return len(range(self._rank * self._step, len(self._data), self._size * self._step))

    def __iter__(self) -> Any:
        for start in range(self._rank * self._step, len(self._data), self._size * self._step):
            rows = [self._data[index] for index in range(start, min(start + self._step, len(self._data)))]
            yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class OwnLoop(DataLoader[Any]):
    """A `DataLoader` with an iteration of its own."""

    def __iter__(self) -> Any:
        yield from super().__iter__()


class Handing(Trainer):
    """Hands over what `kind` names."""

    kind = "plain"

    def _made(self, data: Any) -> Any:
        accelerator = self.accelerator
        sharded = accelerator.dataloader_config.streams_are_sharded
        rank, size = (accelerator.process_index, accelerator.num_processes) if sharded else (0, 1)
        plain = Batches(data, rank, size, self.args.per_device_train_batch_size)
        match self.kind:
            case "list":
                return [*plain]
            case "generator":
                return (batch for batch in plain)
            case "own loop":
                return OwnLoop(data, BATCH)
            case "unprepared":
                return DataLoader(data, BATCH)
            case "batch sampler":
                return DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), BATCH, False))
        return plain

    def get_train_dataloader(self) -> Any:
        return self._made(self.train_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._made(self.eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return self._made(test_dataset)


def made(kind: str, folder: str, samples: int = SAMPLES, **changes: Any) -> Handing:
    trainer = Handing(
        tagger(),
        TrainingArguments(**arguments(folder, num_train_epochs=2, max_steps=-1, **changes)),
        train_dataset=Sentences(samples, 1),
        eval_dataset=Sentences(21, 2),
        compute_metrics=accuracy,
    )
    trainer.kind = kind
    return trainer


def trained(kind: str, folder: str, changes: dict[str, Any]) -> tuple[list[dict[str, Any]], float | None, int]:
    trainer = made(kind, folder, **changes)
    output = trainer.train()
    trainer.evaluate()
    rate = output.metrics.get("train_samples_per_second")
    samples = None if rate is None else rate * output.metrics["train_runtime"]
    predicted = trainer.predict(Sentences(21, 2)).predictions
    return [timeless(entry) for entry in trainer.state.log_history], samples, len(predicted)


def plain(folder: Path) -> Any:
    return run_on_ranks(1, trained, "unprepared", str(folder), {})[0]


@pytest.mark.parametrize("kind", ["plain", "list", "own loop", "batch sampler"])
def test_one_rank_trains_and_evaluates_on_it(kind: str, tmp_path: Path) -> None:
    expected, _, _ = plain(tmp_path / "plain")
    found, samples, predicted = run_on_ranks(1, trained, kind, str(tmp_path / "own"), {})[0]
    assert farthest(expected, found) < 1e-6
    assert found[-1]["eval_samples"] == predicted == 21
    # What a loader batches by itself cannot be counted in training.
    assert samples == (pytest.approx(2 * SAMPLES) if kind == "batch sampler" else None)


FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Block"], "fsdp_version": 2}}
ZERO: Any = {"deepspeed": {"zero_optimization": {"stage": 2}}}


@pytest.mark.parametrize(
    "strategy", [{}, FSDP, pytest.param(ZERO, marks=needs_deepspeed)], ids=["ddp", "fsdp", "deepspeed"]
)
@pytest.mark.parametrize("how", ["dispatch_batches", "streams_are_sharded"])
def test_two_ranks_share_it_as_they_are_told(how: str, strategy: dict[str, Any], tmp_path: Path) -> None:
    # Twice the micro-batch on one rank, in the same order.
    expected = run_on_ranks(1, trained_in_pairs, str(tmp_path / "plain"))[0]
    changes = {**strategy, "accelerator_config": {how: True}}
    for found, samples, predicted in run_on_ranks(2, trained, "plain", str(tmp_path / "own"), changes):
        assert farthest(expected, found) < 1e-5
        assert found[-1]["eval_samples"] == predicted == 21
        assert samples is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_sample_counts_once(ranks: int, tmp_path: Path) -> None:
    # Neither fills the last batch nor the last window of a pass.
    changes = {"gradient_accumulation_steps": 3}
    for _, samples, _ in run_on_ranks(ranks, trained, "unprepared", str(tmp_path), changes):
        assert samples == pytest.approx(2 * SAMPLES)


def trained_in_pairs(folder: str) -> list[dict[str, Any]]:
    return trained("plain", folder, {"per_device_train_batch_size": 2 * BATCH})[0]


def refused(kind: str, folder: str) -> tuple[str, str]:
    trainer = made(kind, folder)
    words = []
    for call in (trainer.train, trainer.evaluate):
        with pytest.raises(DataError) as error:
            call()
        words.append(str(error.value))
    return words[0], words[1]


@pytest.mark.parametrize(
    ("kind", "name"), [("plain", "Batches"), ("list", "list"), ("generator", "generator"), ("own loop", "OwnLoop")]
)
def test_two_ranks_that_are_not_told_refuse_it(kind: str, name: str, tmp_path: Path) -> None:
    for both in run_on_ranks(2, refused, kind, str(tmp_path)):
        for words in both:
            assert f"The loader {name} has its own __iter__" in words
            assert "dispatch_batches=True" in words
            assert "accelerator_config of the Trainer" in words


def once(folder: str) -> tuple[int, str]:
    trainer = made("generator", folder)
    trainer.args.max_steps = 4
    steps = trainer.train().global_step
    trainer = made("generator", folder)
    trainer.args.max_steps = 9
    with pytest.raises(DataError) as error:
        trainer.train()
    return steps, str(error.value)


def test_a_generator_lasts_for_one_pass(tmp_path: Path) -> None:
    steps, words = run_on_ranks(1, once, str(tmp_path))[0]
    assert steps == 4
    assert "A second epoch was begun over a generator" in words


class OfEpoch(Dataset[Any]):
    """Each sample holds the epoch that it was read in."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        tokens = torch.full((4,), self.epoch)
        return {"input_ids": tokens, "labels": tokens}


class Noting(Trainer):
    """Notes which epochs its micro-batches hold."""

    noted: list[int]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.noted = [*getattr(self, "noted", []), *inputs["input_ids"].unique().tolist()]
        return super().training_step(model, inputs, num_items_in_batch)


def epochs_read(folder: str, inside: bool) -> list[int]:
    told = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "num_train_epochs": 3, "max_steps": -1}
    data: Any = OfEpoch()
    data = torch.utils.data.Subset(data, range(8)) if inside else data
    trainer = Noting(tagger(), TrainingArguments(**arguments(folder, **told)), train_dataset=data)
    trainer.train()
    return trainer.noted


@pytest.mark.parametrize("inside", [False, True])
def test_persistent_workers_read_the_epoch_of_the_pass(inside: bool, tmp_path: Path) -> None:
    assert run_on_ranks(2, epochs_read, str(tmp_path), inside) == [[0, 1, 2]] * 2


def by_the_facade(how: str | None) -> Any:
    config = DataLoaderConfiguration(**({} if how is None else {how: True}))
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    rank, size = accelerator.process_index, accelerator.num_processes
    rows = [{"x": torch.tensor([index])} for index in range(7)]
    given: Any = rows[rank::size] if how == "streams_are_sharded" else rows
    if how is None:
        with pytest.raises(DataError) as error:
            accelerator.prepare(given)
        return str(error.value)
    loader = accelerator.prepare(given)
    return [accelerator.gather_for_metrics(batch["x"]).tolist() for batch in loader], len(loader)


def test_the_facade_never_lets_all_ranks_read_the_same() -> None:
    assert all("The loader list has" in words for words in run_on_ranks(2, by_the_facade, None))
    for how in ("dispatch_batches", "streams_are_sharded"):
        for batches, length in run_on_ranks(2, by_the_facade, how):
            assert sorted(chain.from_iterable(batches)) == list(range(7)), how
            if how == "streams_are_sharded":
                assert length == 4


class Numbered(IterableDataset[dict[str, torch.Tensor]]):
    """Rows that say where in the stream they are."""

    def __iter__(self) -> Any:
        return iter([{"input_ids": torch.tensor([row, row]), "labels": torch.tensor([row, row])} for row in range(21)])


def predicted(folder: str) -> list[int]:
    args = TrainingArguments(**arguments(folder, per_device_eval_batch_size=4))
    trainer = Trainer(tagger(), args)
    with contextlib.redirect_stdout(io.StringIO()):
        labels: list[int] = trainer.predict(Numbered()).label_ids[:, 0].tolist()
    return labels


def test_predictions_for_a_stream_are_in_its_order(tmp_path: Path) -> None:
    assert run_on_ranks(2, predicted, str(tmp_path)) == [list(range(21))] * 2


class Numbers(IterableDataset[dict[str, torch.Tensor]]):
    """A stream of rows whose labels are their position."""

    def __iter__(self) -> Any:
        for row in range(13):
            yield {"input_ids": torch.full((4,), row), "labels": torch.full((4,), row)}


def predicted_order(folder: str, shares: bool | None) -> tuple[list[int], list[str]]:
    changes = {"accelerator_config": {"dispatch_batches": shares}, "per_device_eval_batch_size": 2}
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("paceline").addHandler(handler)
    try:
        trainer = Trainer(tagger(), TrainingArguments(**arguments(folder, **changes)))
        return trainer.predict(Numbers()).label_ids[:, 0].tolist(), messages
    finally:
        logging.getLogger("paceline").removeHandler(handler)


def test_predictions_for_a_stream_that_ranks_share_out_lose_its_order(tmp_path: Path) -> None:
    order, messages = run_on_ranks(2, predicted_order, str(tmp_path), None)[0]
    assert order == list(range(13))
    assert messages == []
    order, messages = run_on_ranks(2, predicted_order, str(tmp_path), False)[0]
    assert sorted(order) == list(range(13))
    assert any("share out the items of the stream Numbers" in message for message in messages)
