"""The small training of `paceline test`, with paceline and in plain PyTorch."""

from __future__ import annotations

import contextlib
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline import Accelerator

__all__ = ["STEPS", "SmallTraining", "Trained", "checksums", "make_model", "prepare", "train", "train_in_plain_torch"]

STEPS = 4
BATCH_SIZE = 4
"""Samples in a rank's micro-batch."""
_FEATURES, _WIDTH = 16, 32


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.inner = nn.Linear(_WIDTH, 2 * _WIDTH)
        self.outer = nn.Linear(2 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = x + self.outer(F.gelu(self.inner(self.norm(x))))
        return changed


def make_model(block_names: Sequence[str] = ()) -> nn.Sequential:
    """Build a model of two blocks, the same everywhere.

    Args:
        block_names: Class names for its blocks: those that the configuration shards by.
    """
    names = list(block_names) or [_Block.__name__]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [type(names[i % len(names)], (_Block,), {})() for i in range(max(2, len(names)))]
        return nn.Sequential(nn.Linear(_FEATURES, _WIDTH), *blocks, nn.Linear(_WIDTH, 1))


def make_data(samples: int) -> tuple[Tensor, Tensor]:
    """Return inputs [samples, features] and targets [samples, 1], the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, _FEATURES, generator=generator), torch.randn(samples, 1, generator=generator)


@dataclass(slots=True)
class Trained:
    """Losses over the global batch and gradient norms, step by step, and the type that a layer computed in."""

    losses: list[float]
    norms: list[float]
    dtype: torch.dtype | None = None


@dataclass(slots=True)
class SmallTraining:
    """A prepared model, optimizer and loader."""

    accelerator: Accelerator
    model: Any
    optimizer: Any
    loader: Any


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # A large eps: Adam divides rounding by rounding where a gradient is almost zero.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def prepare(accelerator: Accelerator, ranks: int, accumulation: int, block_names: Sequence[str] = ()) -> SmallTraining:
    """Prepare the model and data of which `ranks` ranks train on `BATCH_SIZE` samples each in a micro-batch.

    Collective: every rank must call it.
    """
    model = make_model(block_names)
    batch_size = BATCH_SIZE * ranks // accelerator.num_processes
    samples = 2 * STEPS * BATCH_SIZE * ranks * accumulation
    loader = DataLoader(TensorDataset(*make_data(samples)), batch_size=batch_size)
    return SmallTraining(accelerator, *accelerator.prepare(model, _optimizer(model), loader))


def train(run: SmallTraining, steps: int = STEPS) -> Trained:
    """Take some steps; the next call continues. Collective: every rank must call it."""
    accelerator, trained, window = run.accelerator, Trained([], []), []
    layer = next(module for module in run.model.modules() if isinstance(module, nn.Linear))

    def note(_: object, __: object, output: Tensor) -> None:
        trained.dtype = output.dtype

    hook = layer.register_forward_hook(note)
    for x, y in run.loader:
        with accelerator.accumulate(run.model):
            loss = F.mse_loss(run.model(x).float(), y)
            accelerator.backward(loss)
            window.append(loss.detach())
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(run.model.parameters(), 1.0)
                trained.norms.append(float(norm))
                trained.losses.append(float(accelerator.reduce(torch.stack(window).mean(), "mean")))
                window.clear()
            run.optimizer.step()
            run.optimizer.zero_grad()
        if len(trained.losses) == steps:
            break
    hook.remove()
    return trained


def train_in_plain_torch(device: torch.device, samples: int, precision: str) -> Trained:
    """Train the same in plain PyTorch, on one device with the whole global batch."""
    model = make_model().to(device)
    optimizer, trained = _optimizer(model), Trained([], [])
    inputs, wanted = (t.to(device) for t in make_data(2 * STEPS * samples))
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    for x, y in list(zip(torch.split(inputs, samples), torch.split(wanted, samples), strict=True))[:STEPS]:
        with torch.autocast(device.type, half) if half else contextlib.nullcontext():
            output = model(x)
        loss = F.mse_loss(output.float(), y)
        loss.backward()  # type: ignore[no-untyped-call]
        trained.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        trained.losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return trained


def checksums(weights: dict[str, Tensor]) -> dict[str, int]:
    """Return a checksum of the bytes of each tensor."""
    return {name: zlib.crc32(w.contiguous().view(torch.uint8).numpy().tobytes()) for name, w in weights.items()}
