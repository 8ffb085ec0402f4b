"""Compares a run on one process with a run on several: the first difference, and its usual cause."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["BASES", "Difference", "Step", "Training", "compare", "explain"]

Notes = dict[int, list[dict[str, Any]]]

BASES = {"no": 1e-5, "tf32": 1e-3, "fp16": 1e-2, "bf16": 2e-2, "fp8": 1e-1}
"""The relative difference between two losses at the first step that rounding explains, by precision."""

_NORM_FACTOR = 10.0
"""Gradient norms may differ by this factor more than losses."""

_GROWTH = 0.5
"""Tolerances grow by this share of the first one per step: each step starts from rounded weights."""


@dataclass(slots=True)
class Step:
    """One optimizer step of a run.

    Attributes:
        losses: The loss of each micro-batch, over the global batch.
        samples: The checksums of the samples of each micro-batch, by rank; empty if unknown.
        shapes: The shapes of the samples of each micro-batch, by rank.
        positions: The position after each micro-batch: epoch and samples used.
        labels: The number of labels in the loss of each micro-batch, by rank; empty if there are none.
        weighted: Whether losses are sums with a weight.
        norms: Gradient norms by optimizer.
        rates: Learning rates by optimizer and parameter group.
    """

    losses: list[float] = field(default_factory=list)
    samples: list[list[list[int]]] = field(default_factory=list)
    shapes: list[list[Any]] = field(default_factory=list)
    positions: list[tuple[Any, Any]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    weighted: bool = False
    norms: dict[int, float] = field(default_factory=dict)
    rates: dict[int, list[float]] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The mean over the micro-batches."""
        if self.losses:
            return sum(self.losses) / len(self.losses)
        return math.nan


@dataclass(slots=True)
class Training:
    """The notes of all ranks of a run, as one training."""

    ranks: int
    steps: list[Step]
    weights: Mapping[str, int]
    batch_norms: Sequence[str]
    dropout: bool
    seeded: bool
    matmul: str
    schedules: Sequence[tuple[str, int]] = ()

    @classmethod
    def read(cls, notes: Notes) -> Training:
        """Combine the notes of all ranks; each rank's are a list of lines."""
        first = notes[min(notes)]
        steps = _losses_by_step(notes)
        for line in first:
            if line["kind"] == "step" and line["step"] in steps:
                steps[line["step"]].norms[line["optimizer"]] = line["norm"]
                steps[line["step"]].rates[line["optimizer"]] = line["rates"]
        start = next(line for line in first if line["kind"] == "start")
        model: dict[str, Any] = next((line for line in first if line["kind"] == "model"), {})
        return cls(
            ranks=start["ranks"],
            # The run may have ended before its last step was taken.
            steps=[steps[number] for number in sorted(steps) if steps[number].norms],
            weights=model.get("weights", {}),
            batch_norms=model.get("batch_norms", []),
            dropout=any(line["kind"] == "dropout" for line in first),
            seeded=start["seeded"],
            matmul=start["matmul"],
            schedules=_planned(first),
        )


def _planned(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """The prepared schedules, with the steps that each was made for."""
    return [(line["name"], line["steps"]) for line in lines if line["kind"] == "schedule"]


def _losses_by_step(notes: Notes) -> dict[int, Step]:
    """Combine the losses of all ranks, micro-batch by micro-batch."""
    losses: dict[tuple[int, int], dict[int, dict[str, Any]]] = {}
    for rank, lines in notes.items():
        for line in lines:
            if line["kind"] == "loss":
                losses.setdefault((line["step"], line["micro"]), {})[rank] = line
    steps: dict[int, Step] = {}
    for (number, _), by_rank in sorted(losses.items()):
        _add_losses(steps.setdefault(number, Step()), [by_rank[rank] for rank in sorted(by_rank)])
    return steps


def _add_losses(step: Step, lines: Sequence[Mapping[str, Any]]) -> None:
    weights = [line["weight"] for line in lines]
    losses = [line["loss"] for line in lines]
    if None in weights:
        step.losses.append(sum(losses) / len(losses))
    else:
        step.weighted = True
        step.losses.append(sum(losses) / sum(weights) if sum(weights) else 0.0)
    step.samples.append([line.get("rows") or [] for line in lines])
    step.shapes.append([line.get("shapes") for line in lines])
    step.positions.append((lines[0].get("epoch"), lines[0].get("samples")))
    step.labels.append([line["labels"] for line in lines if line.get("labels") is not None])


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference in a step.

    Attributes:
        kind: "weights", "schedule", "count", "samples", "loss", "norm" or "rate".
        step: The optimizer step, from 0; -1 before the first.
        one: The value on one process.
        several: The value on several processes.
        what: What differs, in words.
    """

    kind: str
    step: int
    one: float
    several: float
    what: str

    @property
    def ratio(self) -> float:
        """The value on several processes over that on one."""
        return self.several / self.one if self.one else math.inf


def compare(one: Training, several: Training, base: float) -> list[list[Difference]]:
    """Compare two trainings.

    Args:
        one: The training on one process.
        several: The training on several processes.
        base: The relative difference of losses allowed at the first step.

    Returns:
        The differences before the first step, then those in each step.
    """
    pairs = zip(one.steps, several.steps, strict=False)
    by_step = [[*_weights(one, several), *_schedules(one, several)]]
    for number, (a, b) in enumerate(pairs):
        allowed = base * (1 + _GROWTH * number)
        by_step.append([*_samples(number, a, b), *_numbers(number, a, b, allowed)])
    if len(one.steps) != len(several.steps):
        short = min((len(one.steps), len(several.steps)))
        by_step.append([Difference("count", short, len(one.steps), len(several.steps), "optimizer steps taken")])
    return by_step


def _weights(one: Training, several: Training) -> Iterator[Difference]:
    names = [name for name, value in one.weights.items() if several.weights.get(name) != value]
    if names:
        shown = ", ".join(name.partition(".")[2] for name in names[:3])
        total = len(one.weights)
        yield Difference(
            "weights",
            -1,
            0.0,
            float(len(names)),
            f"{len(names)} of {total} tensors of the model before step 1: {shown}",
        )


def _schedules(one: Training, several: Training) -> Iterator[Difference]:
    for (name, steps), (_, also) in zip(one.schedules, several.schedules, strict=False):
        if steps != also:
            yield Difference("schedule", -1, steps, also, f"the optimizer steps that {name} was made for")


def _samples(number: int, one: Step, several: Step) -> Iterator[Difference]:
    if len(one.losses) != len(several.losses):
        yield Difference("count", number, len(one.losses), len(several.losses), "backward passes in the step")
        return
    has_checksums = any(rank for ranks in several.samples for rank in ranks)
    if not has_checksums and several.positions[0][1] is None:
        yield Difference("samples", number, 0, 0, "the batches came from no prepared loader")
        return
    for micro, (a, b) in enumerate(zip(one.samples, several.samples, strict=True)):
        left, right = list(chain.from_iterable(a)), list(chain.from_iterable(b))
        if len(left) != len(right):
            yield Difference("samples", number, len(left), len(right), f"samples in micro-batch {micro + 1}")
        elif Counter(left) != Counter(right) and _same_shapes(one.shapes[micro], several.shapes[micro]):
            alike = (Counter(left) & Counter(right)).total()
            what = f"samples of micro-batch {micro + 1} that are the same"
            yield Difference("samples", number, len(left), alike, what)


def _same_shapes(one: Sequence[Any], several: Sequence[Any]) -> bool:
    """Whether the samples can be compared: padded to other lengths they differ and may still be the same."""
    return all(shape == one[0] for shape in (*one, *several))


def _numbers(number: int, one: Step, several: Step, allowed: float) -> Iterator[Difference]:
    if not _close(one.loss, several.loss, allowed):
        yield Difference("loss", number, one.loss, several.loss, "the loss")
    for index, norm in one.norms.items():
        other = several.norms.get(index, math.nan)
        if not _close(norm, other, allowed * _NORM_FACTOR):
            yield Difference("norm", number, norm, other, f"the gradient norm{_numbered(index, one.norms)}")
    for index, rates in one.rates.items():
        for group, (rate, also) in enumerate(zip(rates, several.rates.get(index, []), strict=False)):
            if not math.isclose(rate, also, rel_tol=1e-9, abs_tol=0.0):
                what = f"the learning rate{_numbered(index, one.rates)}{_numbered(group, rates, 'group')}"
                yield Difference("rate", number, rate, also, what)


def _close(one: float, other: float, allowed: float) -> bool:
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return abs(one - other) <= allowed * max(abs(one), abs(other), 1e-8)


def _numbered(index: int, among: Any, noun: str = "optimizer") -> str:
    if len(among) > 1:
        return f" of {noun} {index}"
    return ""


# The usual causes


def explain(several: Training, differences: Sequence[Difference], *, dropout_kept: bool) -> list[str]:
    """Return the usual causes of the first differences, the likeliest first."""
    kinds = {difference.kind: difference for difference in reversed(differences)}
    causes = list(_reasons(several, kinds))
    if dropout_kept and several.dropout and "samples" not in kinds:
        causes.append("dropout: each rank draws its own mask (run without --keep_dropout)")
    return causes or [
        "no known cause was found; check what depends on the rank or the number of processes in the script "
        "(accelerator.process_index, num_processes), and its random numbers"
    ]


def _reasons(several: Training, kinds: Mapping[str, Difference]) -> Iterator[str]:
    size = several.ranks
    if "weights" in kinds:
        yield "the models start from different weights: seed with paceline.set_seed(...) before building the model"
        return
    if "schedule" in kinds:
        yield (
            "the length of the schedule comes from a loader before prepare, where len(loader) counts the batches of "
            "all ranks, or was multiplied by the number of processes: prepare the loader first, and make the schedule "
            "for the optimizer steps of one rank, such as epochs * len(loader)"
        )
        return
    if "samples" in kinds or "count" in kinds:
        yield from _data_reasons(several, kinds)
        return
    if "rate" in kinds:
        yield _rate_reason(kinds["rate"], size)
        if kinds["rate"].step <= min(d.step for d in kinds.values()):
            return
    if "loss" in kinds:
        yield from _loss_reasons(several, kinds["loss"], size)
    elif "norm" in kinds:
        yield from _norm_reasons(kinds["norm"], size)


def _data_reasons(several: Training, kinds: Mapping[str, Difference]) -> Iterator[str]:
    if "samples" not in kinds:
        yield "the runs have different batches: the loader's length depends on the number of processes"
        return
    step = several.steps[kinds["samples"].step]
    if step.positions[0][1] is None:
        yield (
            "the batches came from no prepared loader, so each rank trains on the same samples, or on a share that the "
            "script makes itself: pass the loader to accelerator.prepare(...), which divides the samples"
        )
    elif any(len(ranks) > 1 and ranks[0] and all(rank == ranks[0] for rank in ranks) for ranks in step.samples):
        yield "all ranks train on the same samples: pass the loader to accelerator.prepare(...), which divides them"
    elif kinds["samples"].step and kinds["samples"].ratio > 1:
        yield (
            "the last batch of a stream, which several processes fill with samples from its start and one process does "
            "not: set drop_last=True on the loader for this check"
        )
    elif kinds["samples"].what.endswith("the same"):
        yield (
            "the same indices of the dataset gave other values: random numbers in __getitem__ or the collate "
            "function (augmentation), or a dataset that the script shards before prepare shards it again"
        )
    else:
        yield "the data is sharded twice: pass prepare a loader over the whole dataset, without a distributed sampler"


def _rate_reason(rate: Difference, size: int) -> str:
    if _near(rate.ratio, size) or _near(rate.ratio, 1 / size):
        return (
            f"the learning rate is {rate.ratio:g} times as high on {size} processes: the script multiplies or divides "
            "it by the number of processes, and the global batch is the same here"
        )
    if rate.step:
        return (
            "the schedule depends on the number of processes: it should count optimizer steps (paceline steps a "
            "prepared scheduler once for each), not batches of a rank"
        )
    return "the learning rate depends on the number of processes"


def _loss_reasons(several: Training, loss: Difference, size: int) -> Iterator[str]:
    step = several.steps[loss.step]
    if _near(loss.ratio, 1 / size) and not step.weighted:
        yield (
            f"the loss is 1/{size} on {size} processes: it is a sum over the samples (reduction='sum'), or is divided "
            "by the number of processes; pass a mean, or backward(loss_sum, weight=number_of_samples)"
        )
        return
    if _near(loss.ratio, size):
        yield f"the loss is {size} times as high on {size} processes: the script multiplies it by their number"
        return
    if several.batch_norms:
        names = ", ".join(several.batch_norms[:3])
        yield (
            f"batch normalisation ({names}) computes its statistics on each rank's own samples: use "
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) (on GPUs), or a norm over single samples"
        )
    uneven = any(len(set(labels)) > 1 for labels in step.labels)
    padded = any(not _same_shapes(shapes, shapes) for shapes in step.shapes)
    if (uneven or padded) and not step.weighted:
        yield (
            "ranks have different numbers of tokens, and the loss is a mean over each rank's own tokens: pass "
            "backward(loss_sum, weight=num_tokens) to weight all tokens equally"
        )
    if loss.step and not several.batch_norms:
        yield (
            "the first steps agree, so losses and gradients are right; later differences come from the update: an "
            "optimizer, schedule or buffer that depends on the rank, or rounding that grows (see --tolerance)"
        )


def _norm_reasons(norm: Difference, size: int) -> Iterator[str]:
    if _near(norm.ratio, size) or _near(norm.ratio, 1 / size):
        yield (
            f"the loss agrees and the gradient is {norm.ratio:g} times as large: something scales gradients by the "
            "number of processes, such as a hook, or a loss that gathers outputs of all ranks"
        )
    else:
        yield (
            "the loss agrees and the gradient does not: a part of the model gets its gradient outside of the prepared "
            "model's forward (a submodule called directly, model.module(...)), so that ranks do not average it"
        )


def _near(ratio: float, wanted: float) -> bool:
    return math.isclose(ratio, wanted, rel_tol=0.02)
