"""fp8 on tensor cores: 500 steps on real text against bf16, under one device and FSDP2, and what is refused."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paceline import Accelerator
from paceline.config import FP8Config, FullyShardedDataParallelPlugin
from paceline.errors import PrecisionError
from paceline.strategies.precision.fp8_rounding import Rounding
from tests.support.text import standard_library

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("torchao")
pytestmark = pytest.mark.gpu

STEPS = 500
LENGTH, BATCH = 256, 32
WIDTH, LAYERS, HEADS = 1536, 4, 12
# Of the mean loss of the last 50 steps, and of that of every 25 steps after the first 25.
FINAL_BOUND, BOUND = 0.01, 0.03


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        parts = self.attention(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        out: torch.Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class ByteModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@pytest.fixture(scope="module")
def batches() -> torch.Tensor:
    """[steps, batch, length] of bytes, on the device."""
    text = torch.frombuffer(bytearray(b"".join(standard_library(STEPS * LENGTH * BATCH))), dtype=torch.uint8)
    count = len(text) // LENGTH
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    rows = text[: count * LENGTH].view(count, LENGTH)[order].long()
    needed = STEPS * BATCH
    rows = rows.repeat(-(-needed // count), 1)[:needed]
    return rows.view(STEPS, BATCH, LENGTH).cuda()


def prepared(strategy: str, precision: str, offloads: bool = False, **fp8: Any) -> tuple[Accelerator, Any, Any]:
    settings: dict[str, Any] = {"kwargs_handlers": [FP8Config(**fp8)] if fp8 else []}
    if offloads:
        settings["fsdp_plugin"] = FullyShardedDataParallelPlugin(cpu_offload=True)
    accelerator = Accelerator(strategy=strategy, mixed_precision=precision, **settings)
    model: Any = ByteModel()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    return accelerator, *accelerator.prepare(model, optimizer)


def train(run: tuple[Accelerator, Any, Any], batches: torch.Tensor) -> list[float]:
    accelerator, model, optimizer = run
    losses = []
    for tokens in batches:
        loss = model(tokens)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


_BF16: list[float] = []


def check(losses: list[float], batches: torch.Tensor) -> None:
    if not _BF16:
        _BF16.extend(train(prepared("single", "bf16"), batches))
    final, wanted = statistics.mean(losses[-50:]), statistics.mean(_BF16[-50:])
    parts = [statistics.mean(losses[i : i + 25]) / statistics.mean(_BF16[i : i + 25]) - 1 for i in range(25, STEPS, 25)]
    print(f"final {final:.4f}, bf16 {wanted:.4f}; parts {min(parts):+.4f} to {max(parts):+.4f}", flush=True)
    assert wanted < 2.5, "it has learned something"
    assert abs(final / wanted - 1) < FINAL_BOUND
    assert max(map(abs, parts)) < BOUND


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_500_steps_are_close_to_bf16(recipe: str, batches: torch.Tensor, tmp_path: Path) -> None:
    run = prepared("single", "fp8", recipe=recipe, skip_small_layers=False)
    losses = train(run, batches)
    said = run[0].describe()
    print(said)
    assert "4 attention, 4 out, 4 up, 4 down; in bf16: 1 last" in said
    assert "compiled by inductor from the first step on" in said
    check(losses, batches)
    run[0].save_state(str(tmp_path / "state"))
    run[0].wait_for_everyone()
    other = prepared("single", "bf16")
    other[0].load_state(str(tmp_path / "state"))
    for one, two in zip(run[1].parameters(), other[1].parameters(), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, two)


def test_500_steps_under_fsdp_are_close_to_bf16(batches: torch.Tensor, one_rank: None) -> None:
    run = prepared("fsdp", "fp8", skip_small_layers=False)
    losses = train(run, batches)
    said = run[0].describe()
    print(said)
    assert "weights are gathered in fp8" in said
    assert "compiled by inductor from the first step on" in said
    check(losses, batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tensors_are_rounded_as_each_alone(dtype: torch.dtype) -> None:
    sizes = [(1,), (4096,), (33, 129), (5632, 1024), (0, 16)]
    tensors = [torch.randn(size, device="cuda").to(dtype) for size in sizes]
    tensors[1][:3] = torch.tensor([float("inf"), -1e30, float("nan")])
    scales = [torch.tensor(200.0 + i, device="cuda") for i in range(len(sizes))]
    rounding = Rounding(tensors, torch.float8_e4m3fn)
    rounding(scales)
    kernels = device_kernels(lambda: rounding(scales))
    assert len(kernels) <= 2, f"scales are put together, and all tensors are rounded at once: {kernels}"
    for tensor, scale, found in zip(tensors, scales, rounding(scales), strict=True):
        expected = (tensor.float() * scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    assert rounding.is_for(tensors)
    assert not rounding.is_for([tensor.clone() for tensor in tensors])


def device_kernels(work: Callable[[], object]) -> list[str]:
    """Names of the kernels that ran on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type.name == "CUDA"]


def test_offloaded_weights_are_cast_on_the_device(batches: torch.Tensor, one_rank: None) -> None:
    here = train(prepared("fsdp", "fp8", skip_small_layers=False), batches[:6])
    offloaded = train(prepared("fsdp", "fp8", offloads=True, skip_small_layers=False), batches[:6])
    assert offloaded == pytest.approx(here, rel=BOUND)


def test_odd_numbers_of_tokens_are_padded() -> None:
    run = prepared("single", "fp8", skip_small_layers=False)
    tokens = torch.randint(256, (3, 101), device="cuda")
    assert all(loss > 0 for loss in train(run, torch.stack([tokens] * 3)))


def test_an_older_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(PrecisionError, match=r"8\.9 or higher, and this one has 8\.0"):
        Accelerator(mixed_precision="fp8")
