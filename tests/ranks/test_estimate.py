"""What `paceline estimate` says, against the tensors that exist in runs on CPU ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from paceline import Accelerator
from paceline.config import FullyShardedDataParallelPlugin, TorchDynamoPlugin
from paceline.planner.estimation import Estimator, Layout, OptimizerCost
from paceline.planner.tensor_memory import TensorMemory
from tests.support.ranks import run_on_ranks

WIDTH, CLASSES, BLOCKS, BATCH = 128, 96, 6, 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        loss: torch.Tensor = nn.functional.cross_entropy(self.head(x), torch.zeros(len(x), dtype=torch.long))
        return loss


def loss_of(model: nn.Module, batch: int) -> torch.Tensor:
    loss: torch.Tensor = model(torch.zeros(batch, WIDTH))
    return loss


def estimator(precision: str) -> Estimator:
    with torch.device("meta"):
        model = Model()
    return Estimator(
        model=model,
        blocks=tuple(f"blocks.{index}" for index in reversed(range(BLOCKS))),
        loss_of=loss_of,
        call=loss_of,
        optimizer=OptimizerCost.measure(lambda parameters: torch.optim.AdamW(parameters, foreach=False), torch.float32),
        compute={"no": None, "bf16": torch.bfloat16}[precision],
        progress=lambda _line: None,
    )


class ResizedMemory(TensorMemory):  # type: ignore[no-untyped-call]
    """FSDP2 frees gathered weights by resizing their storages, which no operation does."""

    def __init__(self, known: Any) -> None:
        super().__init__(known, granularity=1)
        self._resize: Any = torch.UntypedStorage.resize_

    def __enter__(self) -> Any:
        def resize(storage: Any, size: int) -> Any:
            result = self._resize(storage, size)
            key = storage._cdata
            if key in self._references:
                self._alive += size - self._sizes[key]
                self._sizes[key] = size
                self._note()
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *details: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*details)  # type: ignore[no-untyped-call]


def local(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return found


def num_bytes(tensors: Any) -> int:
    return sum(local(tensor).numel() * local(tensor).element_size() for tensor in tensors)


def measured(strategy: str, precision: str, checkpointing: bool) -> dict[str, int]:
    """Take two steps, and count in the second one what exists."""
    settings: dict[str, Any] = {"strategy": strategy}
    if strategy == "fsdp":
        settings["fsdp_plugin"] = FullyShardedDataParallelPlugin(activation_checkpointing=checkpointing)
    accelerator = Accelerator(
        cpu=True, mixed_precision=precision, dynamo_plugin=TorchDynamoPlugin(backend="no"), **settings
    )
    model: Any = Model()
    optimizer: Any = torch.optim.AdamW(model.parameters(), foreach=False)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step() -> None:
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.zeros(BATCH, WIDTH)))
            optimizer.step()

    step()
    state = [value for each in optimizer.state.values() for value in each.values() if local(value).numel() > 1]
    counted = {
        "weights": num_bytes(model.parameters()),
        "gradients": num_bytes(p.grad for p in model.parameters()),
        "optimizer": num_bytes(state),
    }
    optimizer.zero_grad()
    known = [local(tensor) for tensor in (*model.parameters(), *state)]
    with ResizedMemory(known) as memory:
        step()
    return {**counted, "peak": counted["weights"] + counted["optimizer"] + memory.peak}


def check_ranks(strategy: str, precision: str, checkpointing: bool) -> dict[str, int]:
    return measured(strategy, precision, checkpointing)


@pytest.mark.parametrize(
    ("strategy", "ranks", "precision", "checkpointing"),
    [
        ("single", 1, "no", False),
        ("single", 1, "bf16", False),
        ("ddp", 2, "no", False),
        ("fsdp", 2, "no", False),
        ("fsdp", 2, "bf16", False),
        ("fsdp", 2, "bf16", True),
    ],
)
def test_state_is_exact_and_the_peak_within_ten_percent(
    strategy: str, ranks: int, precision: str, checkpointing: bool
) -> None:
    layout = Layout(name=strategy, strategy=strategy, checkpointing=checkpointing)
    estimated = estimator(precision).training(layout, ranks, BATCH)
    found = (
        measured(strategy, precision, checkpointing)
        if ranks == 1
        else run_on_ranks(ranks, check_ranks, strategy, precision, checkpointing)[0]
    )
    assert (estimated.weights, estimated.gradients, estimated.optimizer) == (
        found["weights"],
        found["gradients"],
        found["optimizer"],
    )
    assert estimated.peak == pytest.approx(found["peak"], rel=0.1)
