"""Each sample once, whatever a batch looks like: gathered, evaluated and trained on, on one rank and on several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from paceline import Accelerator, DataLoaderConfiguration, Trainer, TrainingArguments
from paceline.errors import CollectiveError, PacelineError
from tests.support.batches import BY_SAMPLE, WHOLE, Numbered, as_targets, parts, repeated
from tests.support.engines import slowly
from tests.support.ranks import run_on_ranks
from tests.support.trainer import batch_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

EVERY = {**BY_SAMPLE, **WHOLE}


def gathered(
    name: str, samples: int, batch: int, fill: bool, as_objects: bool = False, more: Mapping[str, Any] | None = None
) -> tuple[list[int], list[int]]:
    """The samples that one pass gathers, and how many batches each rank had."""
    collate, tell = EVERY[name]
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**(more or {})))
    loader = accelerator.prepare(DataLoader(Numbered(samples), batch, collate_fn=collate))
    loader.fill_batches = fill
    told: list[int] = []
    batches = 0
    for one in loader:
        told += tell(accelerator.gather_for_metrics(one, as_objects, pad_index=-100))
        batches += 1
    return told, accelerator.gather_object([batches])


@pytest.mark.parametrize("fill", [True, False], ids=["filled up", "short"])
@pytest.mark.parametrize("name", BY_SAMPLE)
def test_what_belongs_to_a_sample_is_gathered_once(name: str, fill: bool) -> None:
    # 11 of 4: rank 0 has three samples at last, and rank 1 none.
    for ranks, samples, batch in ((1, 11, 4), (2, 11, 4), (3, 16, 3), (2, 3, 1)):
        for told, batches in run_on_ranks(ranks, gathered, name, samples, batch, fill):
            assert sorted(told) == list(range(samples))
            assert len(set(batches)) == 1


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_cut_is_gathered_once_where_nothing_is_filled_up(name: str) -> None:
    for ranks, samples, batch in ((1, 11, 4), (2, 11, 4), (3, 16, 3), (2, 3, 1), (2, 9, 2)):
        for told, _ in run_on_ranks(ranks, gathered, name, samples, batch, False):
            assert sorted(told) == list(range(samples))


@pytest.mark.parametrize("name", ["targets", "ragged", "strings", "arrays"])
def test_objects_are_gathered_once(name: str) -> None:
    for told, _ in run_on_ranks(2, gathered, name, 11, 4, True, True):
        assert sorted(told) == list(range(11))


@pytest.mark.parametrize("more", [{"split_batches": True}, {"dispatch_batches": True}], ids=str)
@pytest.mark.parametrize("name", ["targets", "packed"])
def test_short_batches_in_every_way_of_reading(name: str, more: dict[str, Any]) -> None:
    for told, batches in run_on_ranks(2, gathered, name, 11, 4, False, False, more):
        assert sorted(told) == list(range(11))
        assert len(set(batches)) == 1


def refused(name: str) -> str:
    collate, _ = WHOLE[name]
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(Numbered(11), 4, collate_fn=collate))
    seen = 0
    try:
        for one in loader:
            accelerator.gather_for_metrics({"out": one}, pad_index=-100)
            seen += 1
    except CollectiveError as error:
        # All ranks at once, so that the group goes on.
        assert accelerator.gather_object([seen]) == [1, 1]
        return str(error)
    raise AssertionError("a batch that is filled up was cut")


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_cut_is_refused_by_name(name: str) -> None:
    for text in run_on_ranks(2, refused, name):
        assert "data['out']" in text
        assert "only 3 of those of rank 0 are its own" in text
        assert "Set fill_batches = False on the prepared loader" in text


class Uneven(BatchSampler):
    """Batches of different sizes."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__(SequentialSampler(range(sum(sizes))), max(sizes), False)
        self.sizes = sizes

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for size in self.sizes:
            yield list(range(start, start + size))
            start += size

    def __len__(self) -> int:
        return len(self.sizes)


def gathered_unevenly(name: str, sizes: list[int]) -> list[int]:
    collate, tell = EVERY[name]
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(Numbered(sum(sizes)), batch_sampler=Uneven(sizes), collate_fn=collate))
    return [n for one in loader for n in tell(accelerator.gather_for_metrics(one, pad_index=-100))]


@pytest.mark.parametrize("name", EVERY)
def test_batches_of_different_sizes_are_gathered_once(name: str) -> None:
    for told in run_on_ranks(2, gathered_unevenly, name, [3, 1, 4, 2, 5]):
        assert sorted(told) == list(range(15))


# The Trainer


class Detector(nn.Module):
    """Its loss is a mean over boxes, as that of matching detectors; targets are a list of one entry a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, labels: Any) -> dict[str, Any]:
        assert len(x) == len(labels), "a target was cut off from its sample"
        out = self.head(x)
        pairs = zip(out, labels, strict=True)
        total = torch.stack([((one - target["boxes"]) ** 2).mean(1).sum() for one, target in pairs]).sum()
        return {"loss": total / sum(len(target["cls"]) for target in labels), "logits": out}


def detections(samples: list[int]) -> dict[str, Any]:
    return {"x": torch.tensor(samples).float()[:, None].repeat(1, 3), "labels": as_targets(samples)}


class PackedTagger(nn.Module):
    """One row of all tokens of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.tokens(input_ids))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def packed(samples: list[int]) -> dict[str, torch.Tensor]:
    tokens = torch.cat([repeated(i) for i in samples])[None]
    return {"input_ids": tokens % 7, "labels": tokens * tokens % 5}


class Contrastive(nn.Module):
    """Two views of each sample, and logits [2B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 3)

    def forward(self, views: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(views)
        # A number beside them is a value of the batch.
        return {
            "loss": F.cross_entropy(logits, labels.repeat(2)),
            "logits": logits,
            "count": logits.new_tensor(len(labels)),
        }


def views(samples: list[int]) -> dict[str, torch.Tensor]:
    rows = torch.tensor([[i, view] for view in range(2) for i in samples]).float() / 10
    return {"views": rows, "labels": torch.tensor(samples) % 3}


class GraphModel(nn.Module):
    """A number for each graph, from nodes of all graphs in one tensor and edges [2, E]."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)

    def forward(
        self, x: torch.Tensor, edge_index: torch.Tensor, graph: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        assert edge_index.shape[0] == 2
        assert edge_index.max() < len(x)
        nodes = self.head(x)[:, 0]
        out = torch.zeros(len(labels)).index_add(0, graph, nodes)
        return {"loss": F.mse_loss(out, labels), "logits": out, "nodes": nodes}


def graphs(samples: list[int]) -> dict[str, torch.Tensor]:
    sizes = torch.tensor([parts(i) + 1 for i in samples])
    starts = sizes.cumsum(0) - sizes
    x = torch.repeat_interleave(torch.tensor(samples).float(), sizes)[:, None] / 10
    return {
        "x": x,
        "edge_index": torch.stack([starts, starts + 1]),
        "graph": torch.repeat_interleave(torch.arange(len(samples)), sizes),
        "labels": torch.tensor(samples).float(),
    }


MODELS: dict[str, tuple[type[nn.Module], Callable[[list[int]], Any]]] = {
    "detection": (Detector, detections),
    "packed": (PackedTagger, packed),
    "views": (Contrastive, views),
    "graphs": (GraphModel, graphs),
}
FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Linear"], "fsdp_version": 2}}
COMMON: dict[str, Any] = {
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "optim": "sgd",
    "learning_rate": 1e-3,
}


def trainer_of(name: str, folder: str, samples: int, changes: dict[str, Any], **more: Any) -> Trainer:
    kind, collate = MODELS[name]
    torch.manual_seed(0)
    data = Numbered(samples)
    args = TrainingArguments(output_dir=folder, **{**COMMON, **changes})
    return Trainer(kind(), args, train_dataset=data, eval_dataset=data, data_collator=collate, **more)


def right_loss(name: str, samples: int) -> float:
    """Batches of four in order, weighted by targets where labels are a tensor, else by samples."""
    kind, collate = MODELS[name]
    torch.manual_seed(0)
    model = kind()
    total = weight = 0.0
    for start in range(0, samples, 4):
        ids = list(range(start, min(samples, start + 4)))
        batch = collate(ids)
        share = batch["labels"].numel() if isinstance(batch["labels"], torch.Tensor) else len(ids)
        total += model(**batch)["loss"].item() * share
        weight += share
    return total / weight


def evaluated(name: str, folder: str, samples: int, changes: dict[str, Any]) -> tuple[float, int, str]:
    trainer = trainer_of(name, folder, samples, {"eval_do_concat_batches": False, **changes})
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), prediction_loss_only=False)
    assert output.num_samples == samples
    kept = output.label_ids
    if name == "packed":
        rows = sum(int((row != -100).sum()) for part in kept for row in part)
        assert rows == sum(map(parts, range(samples)))
    else:
        assert sum(map(len, kept)) == samples
    if name == "detection":
        assert [int(t["cls"][0]) for part in kept for t in part] == list(range(samples))
        assert [len(t["cls"]) for part in kept for t in part] == [parts(i) for i in range(samples)]
    if name == "views":
        assert sum(len(part[0]) for part in output.predictions) == 2 * samples
        assert sum(int(part[1].sum()) for part in output.predictions) == samples
    if name == "graphs":
        assert sum(len(part[1]) for part in output.predictions) == sum(parts(i) + 1 for i in range(samples))
    return output.metrics["eval_loss"], trainer.accelerator.num_processes, trainer.accelerator.strategy.name


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_same_evaluation_on_every_layout(name: str, tmp_path: Path) -> None:
    right = right_loss(name, 11)
    for ranks, changes, strategy in (
        (1, {}, "single"),
        (2, {}, "ddp"),
        (2, FSDP, "fsdp"),
        (2, {"accelerator_config": {"even_batches": False}}, "ddp"),
        (2, {"accelerator_config": {"dispatch_batches": True}}, "ddp"),
    ):
        for loss, *here in run_on_ranks(ranks, evaluated, name, str(tmp_path), 11, changes):
            assert loss == pytest.approx(right, rel=1e-5)
            assert here == [ranks, strategy]


@pytest.mark.parametrize("samples", [1, 9, 12])
def test_the_same_evaluation_of_other_numbers(samples: int, tmp_path: Path) -> None:
    for name in ("detection", "packed"):
        for loss, *_ in run_on_ranks(3, evaluated, name, str(tmp_path), samples, {}):
            assert loss == pytest.approx(right_loss(name, samples), rel=1e-5)


class Streamed(IterableDataset[int]):
    """The same samples as a stream."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(11))


class Collated(IterableDataset[Any]):
    """A stream of batches that are packed already."""

    def __iter__(self) -> Iterator[Any]:
        return (packed(list(range(start, min(11, start + 4)))) for start in range(0, 11, 4))


class OwnLoader(Trainer):
    """Reads batches that nobody can count."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return DataLoader(Collated(), batch_size=None)


def evaluated_stream(folder: str, own: bool) -> tuple[float, int]:
    torch.manual_seed(0)
    args = TrainingArguments(output_dir=folder, **COMMON)
    kind = OwnLoader if own else Trainer
    trainer = kind(PackedTagger(), args, eval_dataset=Streamed(), data_collator=packed)
    output = trainer.evaluation_loop(
        trainer.accelerator.prepare(trainer.get_eval_dataloader()), prediction_loss_only=False
    )
    return output.metrics["eval_loss"], int((output.label_ids != -100).sum())


@pytest.mark.parametrize("own", [False, True], ids=["samples", "batches"])
def test_a_stream_is_evaluated_once(own: bool, tmp_path: Path) -> None:
    for ranks in (1, 2):
        for loss, tokens in run_on_ranks(ranks, evaluated_stream, str(tmp_path), own):
            assert loss == pytest.approx(right_loss("packed", 11), rel=1e-5)
            assert tokens == sum(map(parts, range(11)))


def trained(name: str, folder: str, changes: dict[str, Any]) -> tuple[list[float], list[float]]:
    trainer = trainer_of(name, folder, 11, {"global_batch_size": 8, "num_train_epochs": 2, **changes})
    trainer.train()
    log = trainer.state.log_history
    return [e["loss"] for e in log if "loss" in e], [e["grad_norm"] for e in log if "grad_norm" in e]


@pytest.mark.parametrize("name", ["packed", "views", "graphs", *slowly(["detection"])])
def test_the_same_steps_of_a_global_batch_on_every_layout(name: str, tmp_path: Path) -> None:
    """Eleven samples in steps of eight: the second step has three, which one rank alone has."""
    (losses, norms), *_ = run_on_ranks(1, trained, name, str(tmp_path), {})
    assert len(losses) == len(norms) == 4
    # The loss of a detector is a mean over the boxes of a micro-batch, so that micro-batches must be the same.
    smaller = [] if name == "detection" else [(1, {"per_device_train_batch_size": 2})]
    for ranks, changes in ((2, {}), (2, FSDP), *smaller):
        for other, others in run_on_ranks(ranks, trained, name, str(tmp_path), changes):
            assert other == pytest.approx(losses, rel=1e-5)
            assert others == pytest.approx(norms, rel=1e-4)


class Hungry(PackedTagger):
    """Has memory for a few tokens only."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training and input_ids.shape[1] > 5:
            raise MemoryError("out of memory")
        return super().forward(input_ids, labels)


def halved(folder: str, name: str) -> tuple[list[float], int]:
    trainer = trainer_of(name, folder, 11, {"global_batch_size": 8, "auto_find_batch_size": True})
    trainer.train()
    return [e["loss"] for e in trainer.state.log_history if "loss" in e], batch_plan(trainer)[0]


def test_smaller_micro_batches_hold_whole_samples(tmp_path: Path) -> None:
    """A packed row is made anew of fewer samples, not cut."""
    [(losses, micro)] = run_on_ranks(1, halved, str(tmp_path), "packed")
    [(again, smaller)] = run_on_ranks(1, halved, str(tmp_path), "hungry")
    assert (micro, smaller) == (4, 1)
    assert again == pytest.approx(losses, rel=1e-5)


# One structure of all batches


def concatenated(name: str, folder: str, samples: int, as_objects: bool) -> tuple[Any, Any]:
    trainer = trainer_of(name, folder, samples, {"eval_use_gather_object": as_objects})
    output = trainer.predict(Numbered(samples))
    return output.predictions, output.label_ids


@pytest.mark.parametrize("as_objects", [False, True], ids=["tensors", "objects"])
@pytest.mark.parametrize("samples", [11, 12])
def test_targets_of_samples_are_never_merged(samples: int, as_objects: bool, tmp_path: Path) -> None:
    [(right, _)] = run_on_ranks(1, concatenated, "detection", str(tmp_path), samples, False)
    assert right.shape == (samples, 4)
    for ranks in (1, 2):
        for predictions, labels in run_on_ranks(ranks, concatenated, "detection", str(tmp_path), samples, as_objects):
            assert predictions == pytest.approx(right)
            assert [target["cls"].tolist() for target in labels] == [[i] * parts(i) for i in range(samples)]
            assert [target["boxes"].shape for target in labels] == [(parts(i), 4) for i in range(samples)]


@pytest.mark.parametrize("as_objects", [False, True], ids=["tensors", "objects"])
def test_packed_batches_become_one(as_objects: bool, tmp_path: Path) -> None:
    for ranks in (1, 2):
        for predictions, labels in run_on_ranks(ranks, concatenated, "packed", str(tmp_path), 11, as_objects):
            assert predictions.shape == (3, 8, 5)
            assert (labels != -100).sum() == (predictions[..., 0] != -100).sum() == sum(map(parts, range(11)))


class Segmenter(nn.Module):
    """Takes masks as a list of tensors, one a sample, or as a tuple."""

    def forward(self, x: torch.Tensor, labels: Any) -> dict[str, torch.Tensor]:
        return {"loss": x.mean(), "logits": x}


def masks(samples: list[int]) -> dict[str, Any]:
    return {"x": torch.tensor(samples).float(), "labels": [torch.full((parts(i), 2, 2), i) for i in samples]}


def stacked_scores(samples: list[int]) -> dict[str, Any]:
    return {"x": torch.tensor(samples).float(), "labels": [torch.tensor(i) for i in samples]}


def mask_tuple(samples: list[int]) -> dict[str, Any]:
    return {**masks(samples), "labels": tuple(masks(samples)["labels"])}


MODELS |= {
    "hungry": (Hungry, packed),
    "masks": (Segmenter, masks),
    "mask tuple": (Segmenter, mask_tuple),
    "scores": (Segmenter, stacked_scores),
}


def test_lists_of_tensors_are_one_entry_a_sample(tmp_path: Path) -> None:
    for ranks in (1, 2):
        for as_objects in (False, True):
            for predictions, labels in run_on_ranks(ranks, concatenated, "masks", str(tmp_path), 11, as_objects):
                assert predictions.tolist() == list(range(11))
                assert [mask.shape for mask in labels] == [(parts(i), 2, 2) for i in range(11)]
                assert [int(mask[0, 0, 0]) for mask in labels] == list(range(11))


def refused_by_predict(name: str, folder: str, batch: int) -> str:
    trainer = trainer_of(name, folder, 8, {"per_device_eval_batch_size": batch})
    with pytest.raises(PacelineError) as caught:
        trainer.predict(Numbered(8))
    return str(caught.value)


def test_lists_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    [alone] = run_on_ranks(1, refused_by_predict, "mask tuple", str(tmp_path), 4)
    assert "label_ids is a tuple of 4 tensors in each batch" in alone
    assert "eval_do_concat_batches=False" in alone
    for name in ("scores", "mask tuple"):
        for text in run_on_ranks(2, refused_by_predict, name, str(tmp_path), 4):
            assert "data['label_ids'] is a" in text


def columns_gathered(batch: int) -> list[list[float]]:
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(Numbered(5), batch, collate_fn=as_rows))
    told = []
    for x in loader:
        first, second = accelerator.gather_for_metrics((x[:, 0], x[:, 1]))
        told += torch.stack([first, second], 1).tolist()
    return told


def as_rows(samples: list[int]) -> torch.Tensor:
    return torch.tensor([[float(i), i + 0.5] for i in samples])


@pytest.mark.parametrize("batch", [1, 2])
def test_a_column_of_one_row_is_gathered_like_any(batch: int) -> None:
    # predictions[:, 0] of a batch of one sample keeps the stride of the whole.
    for told in run_on_ranks(2, columns_gathered, batch):
        assert sorted(told) == [[float(i), i + 0.5] for i in range(5)]
