"""The parity, weighting, overflow and evaluation tests of the CPU ranks, on accelerators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from paceline import Accelerator, GradScalerKwargs
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks
from tests.support.training import (
    DDP,
    FSDP,
    SINGLE,
    TWO_RANKS,
    Layout,
    Trained,
    assert_close,
    train,
    train_plainly,
)

ONE = [SINGLE, Layout("fsdp1", 1, "fsdp")]
MARKS = {1: pytest.mark.gpu, 2: pytest.mark.gpus2}


def layouts(*chosen: Layout) -> list[Any]:
    return [pytest.param(layout, marks=MARKS[layout.ranks], id=layout.name) for layout in chosen]


@pytest.fixture(scope="module")
def plain() -> Trained:
    trained: Trained = run_on_ranks(1, train_plainly, "cuda", device="cuda")[0]
    return trained


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("layout", layouts(*ONE, *TWO_RANKS))
def test_every_layout_equals_plain_pytorch(plain: Trained, layout: Layout, accumulation: int) -> None:
    for trained in run_on_ranks(layout.ranks, train, layout, accumulation, "no", "cuda", device="cuda"):
        assert_close(trained.losses, plain.losses, 1e-5)
        assert_close(trained.norms, plain.norms, 1e-5)


@pytest.mark.parametrize("layout", layouts(SINGLE, DDP, FSDP))
def test_a_wrong_scale_is_noticed(plain: Trained, layout: Layout) -> None:
    trained = run_on_ranks(layout.ranks, train, layout, 4, "no", "cuda", 1.01, device="cuda")[0]
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(trained.norms, plain.norms, 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("layout", layouts(SINGLE, DDP, FSDP))
def test_low_precision_stays_near_fp32(plain: Trained, layout: Layout, precision: str) -> None:
    trained = run_on_ranks(layout.ranks, train, layout, 1, precision, "cuda", device="cuda")[0]
    assert_close(trained.losses, plain.losses, {"bf16": 0.05, "fp16": 0.01}[precision])
    assert all(value.dtype == torch.float32 for value in trained.weights.values())


def overflow(strategy: str) -> list[tuple[bool, bool]]:
    """In step 1 the gradient of the last rank alone overflows."""
    handler = GradScalerKwargs(init_scale=1024.0)
    accelerator = Accelerator(strategy=strategy, mixed_precision="fp16", kwargs_handlers=[handler])
    model: Any = TinyTransformer()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True))
    tokens = make_tokens(2).to(accelerator.device)
    seen = []
    for step in range(3):
        before = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}
        broken = step == 1 and accelerator.is_last_process
        loss = token_losses(model(tokens), tokens).mean()
        accelerator.backward(loss * (float("inf") if broken else 1.0))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after = accelerator.get_state_dict(model)
        moved = any(not torch.equal(before[name], after[name]) for name in before)
        seen.append((accelerator.optimizer_step_was_skipped, moved))
    return seen


@pytest.mark.parametrize("layout", layouts(SINGLE, DDP, FSDP))
def test_an_overflow_on_one_rank_skips_the_step_on_all(layout: Layout) -> None:
    results = run_on_ranks(layout.ranks, overflow, layout.strategy, device="cuda")
    for seen in results:
        assert [skipped for skipped, _ in seen] == [False, True, False]
    assert [moved for _, moved in results[0]] == [True, False, True]


def evaluate() -> tuple[int, list[int]]:
    accelerator = Accelerator(strategy="ddp")
    loader: Any = accelerator.prepare(DataLoader(torch.arange(10_007), batch_size=64, num_workers=2))  # type: ignore[arg-type]
    ids = [accelerator.gather_for_metrics(batch) for batch in loader]
    assert all(batch.device == accelerator.device for batch in ids)
    together = torch.cat(ids).tolist()
    return len(together), sorted(together)


@pytest.mark.gpus2
def test_every_sample_is_evaluated_once() -> None:
    for count, ids in run_on_ranks(2, evaluate, device="cuda"):
        assert count == 10_007
        assert ids == list(range(10_007))


def no_waiting(strategy: str) -> None:
    """A training step must not make the host wait for the device; torch raises where one does."""
    accelerator = Accelerator(strategy=strategy, mixed_precision="bf16", gradient_accumulation_steps=2)
    model: Any = TinyTransformer()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scheduler: Any = torch.optim.lr_scheduler.ConstantLR(optimizer)
    loader: Any = DataLoader(make_tokens(16 * accelerator.num_processes), batch_size=2)  # type: ignore[arg-type]
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    for index, batch in enumerate(loader):
        torch.cuda.set_sync_debug_mode("error" if index >= 4 else "default")
        with accelerator.accumulate(model):
            losses = token_losses(model(batch), batch)
            accelerator.backward(losses.sum(), weight=losses.numel())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", layouts(SINGLE, DDP, FSDP))
def test_a_step_never_waits_for_the_device(layout: Layout) -> None:
    run_on_ranks(layout.ranks, no_waiting, layout.strategy, device="cuda")
