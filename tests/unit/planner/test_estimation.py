"""Traces of steps without memory, and what is made of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paceline.planner import trace
from paceline.planner.estimation import Estimator, Layout, ModelSize, OptimizerCost, layouts
from paceline.planner.repeated_blocks import find_repeated_blocks
from paceline.planner.tensor_memory import TensorMemory
from paceline.planner.trace import trace_inference, trace_training
from tests.ranks.test_estimate import BATCH, BLOCKS, WIDTH, Model, estimator, loss_of


def real_peak(batch: int) -> int:
    model = Model()
    memory = TensorMemory([*model.parameters(), *model.buffers()])
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(memory.add_gradient)  # type: ignore[no-untyped-call]
    with memory:
        loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
    return memory.peak


@pytest.mark.parametrize("batch", [2, 5, 64])
def test_a_trace_of_three_blocks_stands_for_all(batch: int) -> None:
    with torch.device("meta"):
        model = Model()
    assert find_repeated_blocks(model) is not None
    # Each of the two tensors that are no multiple of an allocation may be off by less than one.
    assert trace_training(model, loss_of).peak(batch) == pytest.approx(real_peak(batch), abs=2 * 512)
    assert len(model.blocks) == BLOCKS


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_short_trace_is_the_whole_one(
    monkeypatch: pytest.MonkeyPatch, autocast: torch.dtype | None, checkpointed: bool
) -> None:
    """Under autocast, the cast weights of checkpointed blocks live until the forward ends."""
    with torch.device("meta"):
        model = Model()
    names = [f"blocks.{index}" for index in range(BLOCKS)] if checkpointed else []
    short = trace_training(model, loss_of, autocast=autocast, checkpointed=names)
    monkeypatch.setattr(trace, "find_repeated_blocks", lambda _model: None)
    whole = trace_training(model, loss_of, autocast=autocast, checkpointed=names)
    assert len(short.fixed) == len(whole.fixed)
    for batch in (1, 24, 512):
        assert short.peak(batch) == pytest.approx(whole.peak(batch), rel=0.005)
        assert short.peak(batch, share=0.0) == pytest.approx(whole.peak(batch, share=0.0), rel=0.005)


class Counting(Model):
    """Counts its blocks itself, so that none can be left out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for index in range(BLOCKS):
            x = self.blocks[index](x)
        loss: torch.Tensor = nn.functional.cross_entropy(self.head(x), torch.zeros(len(x), dtype=torch.long))
        return loss


def test_a_model_that_counts_its_blocks_is_traced_as_a_whole() -> None:
    with torch.device("meta"):
        model = Counting()
    assert trace_training(model, loss_of).peak(5) == real_peak(5)


def test_samples_smaller_than_an_allocation_count() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    curve = trace_training(model, lambda module, batch: module(torch.zeros(batch, 32)).mean(), autocast=torch.bfloat16)
    # The backward needs at least the input and the output of the hidden layer in bf16.
    assert curve.peak(1_000_000) - curve.peak(0) >= 1_000_000 * 2 * (32 + 64)


def test_checkpointing_and_inference_take_less() -> None:
    with torch.device("meta"):
        model = Model()
    whole = trace_training(model, loss_of).peak(64, share=0.0)
    names = [f"blocks.{index}" for index in range(BLOCKS)]
    assert trace_training(model, loss_of, checkpointed=names).peak(64, share=0.0) < 0.6 * whole
    assert trace_inference(model, loss_of).peak(64) < 0.4 * whole


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50, bias=False))
    model[1].weight = model[0].weight
    size = ModelSize.of(model, [])
    assert sum(p.numel() for p in size.parameters) == 400


def test_what_an_optimizer_creates_for_all_or_for_one() -> None:
    all_at_once = OptimizerCost.measure(lambda parameters: torch.optim.AdamW(parameters, foreach=True), torch.float32)
    one_by_one = OptimizerCost.measure(lambda parameters: torch.optim.AdamW(parameters, foreach=False), torch.float32)
    assert all_at_once.state == one_by_one.state == 8.0
    assert all_at_once.temporary >= 4.0
    assert one_by_one.temporary == 0.0
    assert one_by_one.for_one >= 4.0


def test_sharding_takes_less_on_more_ranks_and_a_batch_fills_the_memory() -> None:
    found = estimator("no")
    layout = Layout(name="FSDP2", strategy="fsdp")
    peaks = [found.training(layout, ranks, BATCH).peak for ranks in (1, 2, 8)]
    assert peaks == sorted(peaks, reverse=True)
    memory = 64 * 2**20
    batch = found.largest_batch(layout, 2, memory)
    assert found.training(layout, 2, batch).peak <= memory < found.training(layout, 2, batch + 1).peak
    assert found.largest_batch(layout, 2, 1) == 0


def test_every_layout_is_estimated_and_offloading_moves_state_to_the_host() -> None:
    found = estimator("bf16")
    for ranks in (1, 4):
        rows = list(found.rows(ranks, 8))
        assert [row.layout for row in rows] == list(layouts(ranks))
        assert all((row.host > 0) == row.layout.offload for row in rows)
        assert all(row.peak > 0 for row in rows)


def test_without_batches_the_state_is_estimated() -> None:
    plain = estimator("no")
    found = Estimator(plain.model, plain.blocks, None, None, plain.optimizer, None)
    row = found.training(layouts(1)[0], 1, 1)
    elements = sum(p.numel() for p in plain.model.parameters())
    assert row.activations == 0
    assert (row.weights, row.gradients, row.optimizer) == (4 * elements, 4 * elements, 8 * elements)
    assert row.peak > WIDTH * 4
