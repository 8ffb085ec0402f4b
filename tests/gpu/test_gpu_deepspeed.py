"""ZeRO on two accelerators: parity with plain PyTorch, half precision, skipped steps, offload, states in and out."""

from __future__ import annotations

from ctypes.util import find_library
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LinearLR

from paceline import Accelerator, DeepSpeedPlugin
from tests.ranks.test_deepspeed_nvme import optimizer_on_disk, parameters_on_disk, plain_losses
from tests.ranks.test_state import load_and_go_on, run_and_save
from tests.support.engines import needs_deepspeed
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks
from tests.support.state import assert_same_state
from tests.support.training import (
    FSDP,
    SINGLE,
    ZERO,
    ZERO_OFFLOADED,
    ZERO_PARAMETERS_OFFLOADED,
    Layout,
    Trained,
    assert_close,
    train,
    train_plainly,
)

pytestmark = [pytest.mark.gpus2, needs_deepspeed]
ALL = [*ZERO, *ZERO_OFFLOADED, ZERO_PARAMETERS_OFFLOADED]


@pytest.fixture(scope="module")
def plain() -> Trained:
    trained: Trained = run_on_ranks(1, train_plainly, "cuda", device="cuda")[0]
    return trained


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("layout", ALL, ids=str)
def test_every_stage_equals_plain_pytorch(plain: Trained, layout: Layout, accumulation: int) -> None:
    for trained in run_on_ranks(2, train, layout, accumulation, "no", "cuda", device="cuda"):
        assert_close(trained.losses, plain.losses, 1e-5)
        assert_close(trained.norms, plain.norms, 1e-5)


@pytest.mark.parametrize("layout", ZERO, ids=str)
def test_a_wrong_scale_is_noticed(plain: Trained, layout: Layout) -> None:
    trained = run_on_ranks(2, train, layout, 4, "no", "cuda", 1.01, device="cuda")[0]
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(trained.norms, plain.norms, 1e-5)


@pytest.mark.parametrize(
    ("layout", "precision"),
    # DeepSpeed scales the loss in its sharded optimizers only.
    [(layout, kind) for layout in ALL for kind in ("bf16", "fp16") if kind == "bf16" or layout != ZERO[0]],
    ids=str,
)
def test_low_precision_stays_near_fp32(plain: Trained, layout: Layout, precision: str) -> None:
    trained = run_on_ranks(2, train, layout, 1, precision, "cuda", device="cuda")[0]
    assert_close(trained.losses, plain.losses, 0.05)
    assert all(value.dtype == torch.float32 for value in trained.weights.values())


def overflow(stage: int, offload: bool) -> list[tuple[bool, float, bool]]:
    """In step 1 the gradient of the last rank alone overflows."""
    described: dict[str, Any] = {
        "zero_optimization": {"stage": stage},
        "fp16": {"enabled": True, "initial_scale_power": 8},
    }
    if offload:
        described["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    accelerator = Accelerator(mixed_precision="fp16", deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=described))
    model: Any = TinyTransformer()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler: Any = LinearLR(optimizer, start_factor=1.0, end_factor=0.5, total_iters=10)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    tokens = make_tokens(2).to(accelerator.device)
    seen = []
    for step in range(3):
        before = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}
        broken = step == 1 and accelerator.is_last_process
        loss = token_losses(model(tokens), tokens).mean()
        accelerator.backward(loss * (float("inf") if broken else 1.0))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        after = accelerator.get_state_dict(model)
        moved = any(not torch.equal(before[name], after[name]) for name in before)
        seen.append((accelerator.optimizer_step_was_skipped, scheduler.get_last_lr()[0], moved))
    return seen


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "offloaded"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_on_one_rank_skips_the_step_on_all(stage: int, offload: bool) -> None:
    results = run_on_ranks(2, overflow, stage, offload, device="cuda")
    for seen in results:
        assert [skipped for skipped, *_ in seen] == [False, True, False]
        assert [rate for _, rate, _ in seen] == pytest.approx([0.0095, 0.0095, 0.009])
    assert [moved for *_, moved in results[0]] == [True, False, True]


@pytest.mark.parametrize("layout", ALL, ids=str)
def test_a_state_moves_into_every_stage_and_out_again(layout: Layout) -> None:
    state, losses = run_on_ranks(1, run_and_save, SINGLE, "adamw", "cuda", device="cuda")[0]
    for got, went_on in run_on_ranks(2, load_and_go_on, layout, state, "adamw", "cuda", device="cuda"):
        assert_same_state(got, state)
        assert went_on == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("one", [ZERO[2], ZERO[3]], ids=str)
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("other", [FSDP, ZERO[1]], ids=str)
def test_layouts_exchange_their_states(one: Layout, precision: str, other: Layout) -> None:
    """The fp32 values and moments of a run in any precision go on in fp32 elsewhere."""
    state, losses = run_on_ranks(2, run_and_save, one, "adamw", "cuda", precision, device="cuda")[0]
    tolerance = 1e-5 if precision == "no" else 0.05
    for got, went_on in run_on_ranks(2, load_and_go_on, other, state, "adamw", "cuda", device="cuda"):
        assert_same_state(got, state)
        assert went_on == pytest.approx(losses, abs=tolerance)


@pytest.mark.skipif(find_library("aio") is None, reason="libaio is not installed")
@pytest.mark.parametrize("parts", [["param"], ["optimizer"], ["param", "optimizer"]], ids="+".join)
def test_what_lies_on_a_disk_trains_and_resumes(parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    wanted = plain_losses(5)
    ways = (parameters_on_disk, (str(tmp_path), "cuda")) if parts == ["param"] else (
        optimizer_on_disk, (parts, "no", str(tmp_path), "cuda"))  # fmt: skip
    for first, went_on, again, swapped, *same in run_on_ranks(2, ways[0], *ways[1], device="cuda", timeout=900.0):
        assert [*first, *went_on] == pytest.approx(wanted, rel=1e-3)
        assert again == went_on
        assert all(same)
        assert len(swapped) >= 4, "nothing went to the disk"
