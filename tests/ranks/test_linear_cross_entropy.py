"""The loss without logits under every strategy: N ranks train as one does with all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paceline import Accelerator
from paceline.errors import PacelineError
from paceline.nn import LinearCrossEntropy, linear_cross_entropy
from tests.support.engines import make, with_deepspeed
from tests.support.models import VOCABULARY, Block, make_tokens
from tests.support.ranks import run_on_ranks

WIDTH = 16


class Language(nn.Module):
    """A language model that returns its summed loss, with a z-loss."""

    def __init__(self, chunked: bool, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(2))
        self.head = LinearCrossEntropy(WIDTH, VOCABULARY, z_loss=1e-3, reduction="sum", chunk_tokens=5)
        self.chunked = chunked
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        hidden, targets = hidden[:, :-1], tokens[:, 1:]
        if self.chunked:
            loss: Tensor = self.head(hidden, targets)
            return loss
        logits = self.head(hidden).float().flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), reduction="sum")
        total: Tensor = loss + 1e-3 * logits.logsumexp(-1).square().sum()
        return total


def train(strategy: str, chunked: bool, tied: bool, precision: str) -> list[float]:
    accelerator = make(strategy, mixed_precision=precision)
    model: Any = Language(chunked, tied)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    found = []
    for i in range(3):
        tokens = make_tokens(4, seed=i)[accelerator.process_index :: accelerator.num_processes]
        loss = model(tokens)
        accelerator.backward(loss, weight=tokens[:, 1:].numel())
        found.append(float(accelerator.clip_grad_norm_(model.parameters(), 100.0)))
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(accelerator.reduce(loss.detach().float(), "sum")))
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", *with_deepspeed(["zero2", "zero3"])])
def test_ranks_train_as_one_does_with_all_logits(strategy: str, tied: bool) -> None:
    dense = run_on_ranks(1, train, "single", False, tied, "no")[0]
    chunked = run_on_ranks(2, train, strategy, True, tied, "no")[0]
    assert chunked == pytest.approx(dense, rel=2e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bf16_stays_as_near_as_the_dense_loss(strategy: str) -> None:
    dense, chunked = (run_on_ranks(2, train, strategy, choice, False, "bf16")[0] for choice in (False, True))
    assert chunked == pytest.approx(dense, rel=5e-3)


def outside() -> None:
    accelerator = Accelerator(cpu=True, strategy="fsdp")
    model: Any = accelerator.prepare(Language(True, False))
    with pytest.raises(PacelineError, match="called with a sharded weight"):
        linear_cross_entropy(torch.zeros(3, WIDTH), model.head.weight, torch.zeros(3, dtype=torch.int64))


def test_a_sharded_weight_is_refused_by_name() -> None:
    run_on_ranks(2, outside)
