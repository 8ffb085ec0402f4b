"""Which loader ends a window, and what a window takes, on two ranks and under each strategy."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from paceline import GradScalerKwargs, Trainer, TrainingArguments
from paceline.errors import PacelineError, PrepareError, SteppingError
from tests.support.engines import make, with_deepspeed
from tests.support.ranks import run_on_ranks

LAYOUTS = [(1, "single"), (2, "ddp"), (2, "fsdp"), *with_deepspeed([(2, "zero2")])]
LOOPS = ["zip(a, cycle(b))", "zip(cycle(b), a)", "zip(a, itertools.cycle(b))", "evaluation"]


class Stream(IterableDataset[torch.Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(torch.ones(self.count, 1))


def loader(samples: int, kind: str = "map") -> Any:
    data: Any = Stream(samples) if kind == "stream" else TensorDataset(torch.ones(samples, 1))
    return DataLoader(data, batch_size=1)


def cycle(data: Any) -> Any:
    while True:
        yield from data


def loop(name: str, a: Any, b: Any) -> Any:
    match name:
        case "zip(a, cycle(b))":
            return zip(a, cycle(b), strict=False)
        case "zip(cycle(b), a)":
            return zip(cycle(b), a, strict=False)
        case "zip(a, itertools.cycle(b))":
            return zip(a, itertools.cycle(b), strict=False)
    return ((x, list(b)) for x in a)


def windows(strategy: str, kind: str) -> dict[str, tuple[list[int], list[float]]]:
    """For each loop: where windows end, and the norm of their gradients; ten micro-batches on each rank."""
    accelerator = make(strategy, gradient_accumulation_steps=4)
    ranks = accelerator.num_processes
    model: Any = nn.Linear(2, 1, bias=False)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer, a, b = accelerator.prepare(model, optimizer, loader(10 * ranks, kind), loader(3 * ranks, kind))
    found = {}
    for name in LOOPS:
        ends, norms = [], []
        for index, _ in enumerate(loop(name, a, b)):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.tensor([[float(index), 0.0]])).mean())
                if accelerator.sync_gradients:
                    ends.append(index)
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), float("inf"))))
                optimizer.step()
                optimizer.zero_grad()
        found[name] = ends, norms
    return found


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_a_window_ends_with_the_loop(ranks: int, strategy: str, kind: str) -> None:
    for found in run_on_ranks(ranks, windows, strategy, kind):
        for name, (ends, norms) in found.items():
            assert ends == [3, 7, 9], name
            assert norms == pytest.approx([1.5, 5.5, 8.5]), name


def vector_loss(strategy: str, weighted: bool) -> str:
    accelerator = make(strategy, gradient_accumulation_steps=2)
    model: Any = nn.Linear(2, 1)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    more: Any = {"weight": 4} if weighted else {}
    with accelerator.accumulate(model), pytest.raises(SteppingError) as caught:
        accelerator.backward(model(torch.ones(4, 2))[:, 0], **more)
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 2))[0], **more)
    return str(caught.value)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_a_loss_is_one_number_under_every_strategy(ranks: int, strategy: str, weighted: bool) -> None:
    for text in run_on_ranks(ranks, vector_loss, strategy, weighted):
        assert "shape [4]" in text


class PerSample(nn.Module):
    """Returns a loss for each sample, as for DataParallel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.linear(x)[:, 0] - labels) ** 2}


def trained_by_sample(folder: str, accumulation: int) -> str:
    model = PerSample()
    before = model.linear.weight.detach().clone()
    arguments = TrainingArguments(
        output_dir=folder, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    data = [{"x": torch.ones(3), "labels": 1.0}] * 8
    with pytest.raises(PacelineError) as caught:
        Trainer(model, arguments, train_dataset=data).train()
    assert torch.equal(model.linear.weight, before)
    return str(caught.value)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_trainer_takes_no_step_with_a_loss_for_each_sample(ranks: int, accumulation: int, tmp_path: Path) -> None:
    for text in run_on_ranks(ranks, trained_by_sample, str(tmp_path), accumulation):
        assert "loss of shape [2]" in text


def half_weights(strategy: str) -> str:
    accelerator = make(strategy, mixed_precision="fp16")
    model = nn.Linear(2, 2).half()
    with pytest.raises(PrepareError) as caught:
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return str(caught.value)


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS[:3])
def test_fp16_weights_say_what_to_do_under_every_strategy(ranks: int, strategy: str) -> None:
    for text in run_on_ranks(ranks, half_weights, strategy):
        assert "2 of the optimizer's 2 parameters are fp16 (weight, bias)" in text
        assert "model.float()" in text


def metrics_after_skipped_steps(strategy: str) -> tuple[int, bool]:
    accelerator = make(strategy, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=8.0)])
    model: Any = nn.Linear(2, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, plateau = accelerator.prepare(model, inner, ReduceLROnPlateau(inner, patience=0))
    for _ in range(3):
        accelerator.backward(model(torch.full((1, 2), float("inf"))).float().sum())
        optimizer.step()
        plateau.step(1.0)
    return plateau.scheduler.last_epoch, accelerator.optimizer_step_was_skipped


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS[:3])
def test_a_metric_moves_its_schedule_after_a_skipped_step(ranks: int, strategy: str) -> None:
    assert run_on_ranks(ranks, metrics_after_skipped_steps, strategy) == [(3, True)] * ranks


def gradients_inside_no_sync(strategy: str) -> list[list[float]]:
    """This rank's gradient at each step: two windows inside `no_sync`, and one after it."""
    accelerator = make(strategy, gradient_accumulation_steps=2)
    model: Any = nn.Linear(1, 1, bias=False)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    found: list[list[float]] = []

    def window() -> None:
        for _ in range(2):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.tensor([[1.0 + accelerator.process_index]])).mean())
                if accelerator.sync_gradients:
                    found.append([round(float(p.grad), 4) for p in model.parameters()])
                optimizer.step()
                optimizer.zero_grad()

    with accelerator.no_sync(model):
        window()
        window()
    window()
    return found


def test_a_window_inside_no_sync_exchanges_nothing() -> None:
    assert run_on_ranks(2, gradients_inside_no_sync, "ddp") == [[[1.0], [1.0], [1.5]], [[2.0], [2.0], [1.5]]]
