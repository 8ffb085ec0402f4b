"""N ranks with b samples each equal one rank with N·b, under every strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from paceline import (
    Accelerator,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
)
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks

STEPS = 20
GLOBAL_BATCH = 16


@dataclass(frozen=True)
class Layout:
    """One way to train."""

    name: str
    ranks: int
    strategy: str
    plugin: dict[str, Any] | None = None
    replicas: int = 1

    def __str__(self) -> str:
        return self.name


SINGLE = Layout("single", 1, "single")
LAYOUTS = [
    Layout("ddp2", 2, "ddp"),
    Layout("fsdp2", 2, "fsdp"),
    Layout("fsdp2-kept", 2, "fsdp", {"reshard_after_forward": False}),
    Layout("fsdp2-checkpointed", 2, "fsdp", {"activation_checkpointing": True}),
    Layout("fsdp2-offloaded", 2, "fsdp", {"cpu_offload": True}),
    Layout("fsdp4", 4, "fsdp"),
    Layout("fsdp4-resharded-to-2", 4, "fsdp", {"reshard_after_forward": 2}),
    Layout("hsdp2x2", 4, "fsdp", None, 2),
]


def build(layout: Layout, **arguments: Any) -> Accelerator:
    if layout.strategy == "fsdp":
        arguments["fsdp_plugin"] = FullyShardedDataParallelPlugin(**(layout.plugin or {}))
    if layout.replicas > 1:
        arguments["parallelism_config"] = ParallelismConfig(
            dp_replicate_size=layout.replicas, dp_shard_size=layout.ranks // layout.replicas
        )
    return Accelerator(cpu=True, strategy=layout.strategy, **arguments)


def train(
    layout: Layout, accumulation: int, mixed_precision: str = "no", wrong: float = 1.0, clip: float = 0.5
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train for 20 optimizer steps; losses over the global batch, gradient norms, final weights."""
    accelerator = build(layout, gradient_accumulation_steps=accumulation, mixed_precision=mixed_precision)
    tokens = make_tokens(STEPS * GLOBAL_BATCH)
    model: Any = TinyTransformer(seed=accelerator.process_index)  # rank 0's values must win
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    micro = GLOBAL_BATCH // accumulation // accelerator.num_processes
    loader: Any = DataLoader(TensorDataset(tokens), batch_size=micro)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, norms, window = [], [], []
    for (batch,) in loader:
        with accelerator.accumulate(model):
            loss = token_losses(model(batch), batch).mean()
            accelerator.backward(loss * wrong)
            window.append(loss.detach())
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), clip)))
                mean = torch.stack(window).mean()
                losses.append(float(accelerator.reduce(mean, "mean")))
                window.clear()
            optimizer.step()
            optimizer.zero_grad()
    return losses, norms, accelerator.get_state_dict(model)


def reference(accumulation: int = 1, mixed_precision: str = "no") -> Any:
    return run_on_ranks(1, train, SINGLE, accumulation, mixed_precision)[0]


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], list[float]]:
    """The same training in plain PyTorch, with nothing of paceline in it."""
    tokens = make_tokens(STEPS * GLOBAL_BATCH)
    model = TinyTransformer(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    losses, norms = [], []
    for batch in torch.split(tokens, GLOBAL_BATCH):
        loss = token_losses(model(batch), batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms


def assert_close(got: list[float], wanted: list[float], tolerance: float) -> None:
    assert len(got) == len(wanted) == STEPS
    worst = max(abs(a - b) for a, b in zip(got, wanted, strict=True))
    assert worst <= tolerance, f"differs by {worst:.2e}"


@pytest.mark.parametrize("accumulation", [1, 4])
def test_one_rank_equals_plain_pytorch(plain: Any, accumulation: int) -> None:
    losses, norms, _ = reference(accumulation)
    assert_close(losses, plain[0], 1e-5)
    assert_close(norms, plain[1], 1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_many_ranks_equal_plain_pytorch(plain: Any, layout: Layout, accumulation: int) -> None:
    results = run_on_ranks(layout.ranks, train, layout, accumulation)
    for losses, norms, _ in results:
        assert_close(losses, plain[0], 1e-5)
        assert_close(norms, plain[1], 1e-5)


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[1]], ids=str)
def test_a_wrong_scale_is_noticed(plain: Any, layout: Layout) -> None:
    _, norms, _ = run_on_ranks(layout.ranks, train, layout, 4, "no", 1.01)[0]
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(norms, plain[1], 1e-5)


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[1]], ids=str)
def test_weights_are_the_same_under_their_own_names(layout: Layout) -> None:
    wanted = reference()[2]
    state = run_on_ranks(layout.ranks, train, layout, 1)[0][2]
    assert state.keys() == wanted.keys()
    for name, value in state.items():
        assert torch.allclose(value, wanted[name], atol=2e-5), name
    assert torch.equal(state["head.weight"], state["tokens.weight"])


@pytest.mark.parametrize("layout", [SINGLE, LAYOUTS[0], LAYOUTS[1]], ids=str)
def test_bf16_stays_near_fp32(plain: Any, layout: Layout) -> None:
    losses, _, state = run_on_ranks(layout.ranks, train, layout, 1, "bf16")[0]
    assert_close(losses, plain[0], 0.05)
    assert all(value.dtype == torch.float32 for value in state.values())
    assert max(abs(a - b) for a, b in zip(losses, plain[0], strict=True)) > 0, "bf16 was not used"
