"""A guard of the cost of a step: how many functions it calls, compared with the same loop written by hand.

Times depend on the machine and on what else it does; these counts do not. The bounds leave room for a third more than
there is. A step that walks the model, or does something for each parameter, goes far beyond them.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from paceline import Accelerator
from paceline.trainer import Trainer, TrainerCallback, TrainingArguments
from tests.support.calls import count_calls
from tests.support.ranks import run_on_ranks

STEPS = 12
# Calls of a step beyond those of the loop by hand; 23 on one process and 73 under DDP.
BOUNDS = {"single": 31, "ddp": 97}


class Data(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((8,), float(index))


def make(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))


def by_hand(strategy: str, layers: int) -> int:
    model: Any = make(layers)
    if strategy == "ddp":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=1000)
    parameters = list(model.parameters())
    batches = iter(DataLoader(Data(), batch_size=4))

    def step() -> None:
        loss = model(next(batches)).pow(2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return [count_calls(step) for _ in range(STEPS)][-1]


def through_paceline(strategy: str, layers: int) -> int:
    accelerator = Accelerator(cpu=True, strategy=strategy)
    model: Any = make(layers)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule: Any = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=1000)
    loader: Any = DataLoader(Data(), batch_size=4)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    parameters = list(model.parameters())
    batches = iter(loader)

    def step() -> None:
        batch = next(batches)
        with accelerator.accumulate(model):
            loss = model(batch).pow(2).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    return [count_calls(step) for _ in range(STEPS)][-1]


def on_rank(strategy: str) -> dict[int, tuple[int, int]]:
    return {layers: (by_hand(strategy, layers), through_paceline(strategy, layers)) for layers in (3, 30)}


@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("ddp", 2)])
def test_a_step_calls_few_functions_more_than_a_loop_by_hand(strategy: str, ranks: int) -> None:
    counts = run_on_ranks(ranks, on_rank, strategy)[0]
    extra = {layers: found - plain for layers, (plain, found) in counts.items()}
    assert max(extra.values()) < BOUNDS[strategy], counts
    assert abs(extra[30] - extra[3]) < 30, f"no more for a model of ten times as many layers: {counts}"


class Counts(TrainerCallback):
    """Counts the calls from the begin of one step to that of the next."""

    def __init__(self) -> None:
        self.marks: list[int] = []
        self.count = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        self.marks.append(self.count)


class WithLoss(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.inner = make(layers)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.inner(x).pow(2).mean()}


def in_trainer(layers: int, folder: str) -> int:
    import sys

    counts = Counts()
    arguments = TrainingArguments(
        output_dir=folder, max_steps=STEPS, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
        optim="sgd", per_device_train_batch_size=4,
    )  # fmt: skip
    data: Any = [{"x": row} for row in torch.ones(64, 8)]
    trainer = Trainer(WithLoss(layers), arguments, train_dataset=data, callbacks=[counts])

    def note(_frame: Any, event: str, _argument: Any) -> None:
        counts.count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    finally:
        sys.setprofile(None)
    return counts.marks[-1] - counts.marks[-2]


def test_a_step_of_the_trainer_calls_few_functions_more(tmp_path: Any) -> None:
    extra = {n: in_trainer(n, str(tmp_path / str(n))) - by_hand("single", n) for n in (3, 30)}
    assert max(extra.values()) < 197, extra
    assert abs(extra[30] - extra[3]) < 40, extra
