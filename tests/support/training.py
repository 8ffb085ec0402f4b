"""One small training, the same under every strategy and on every device; what parity tests compare."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from paceline import (
    Accelerator,
    DeepSpeedPlugin,
    FullyShardedDataParallelPlugin,
    GradScalerKwargs,
    ParallelismConfig,
)
from tests.support.models import TinyTransformer, make_tokens, token_losses

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
DDP = Layout("ddp2", 2, "ddp")
FSDP = Layout("fsdp2", 2, "fsdp")
FSDP_OFFLOADED = Layout("fsdp2-offloaded", 2, "fsdp", {"cpu_offload": True})
FSDP_FOUR = Layout("fsdp4", 4, "fsdp")
HSDP = Layout("hsdp2x2", 4, "fsdp", None, 2)
TWO_RANKS = [
    DDP,
    FSDP,
    Layout("fsdp2-kept", 2, "fsdp", {"reshard_after_forward": False}),
    Layout("fsdp2-checkpointed", 2, "fsdp", {"activation_checkpointing": True}),
    FSDP_OFFLOADED,
    Layout(
        "fsdp2-activations-offloaded",
        2,
        "fsdp",
        {"activation_checkpointing": True, "activation_checkpointing_offload": True},
    ),
]
FOUR_RANKS = [
    FSDP_FOUR,
    Layout("fsdp4-resharded-to-2", 4, "fsdp", {"reshard_after_forward": 2}),
    HSDP,
]


OFFLOAD = {"offload_optimizer_device": "cpu"}
ZERO = [Layout(f"zero{stage}", 2, "deepspeed", {"zero_stage": stage}) for stage in range(4)]
ZERO_OFFLOADED = [
    Layout(f"zero{stage}-offloaded", 2, "deepspeed", {"zero_stage": stage, **OFFLOAD}) for stage in (1, 2, 3)
]
ZERO_PARAMETERS_OFFLOADED = Layout(
    "zero3-all-offloaded", 2, "deepspeed", {"zero_stage": 3, "offload_param_device": "cpu", **OFFLOAD}
)
ZERO_FOUR = [Layout(f"zero{stage}x4", 4, "deepspeed", {"zero_stage": stage}) for stage in (2, 3)]


@dataclass(frozen=True)
class Trained:
    """What a training came to: losses over the global batch, gradient norms, final weights (rank 0)."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with a large eps.

    Adam divides rounding noise by rounding noise where a gradient is zero in theory (the bias of attention keys).
    """
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def build(layout: Layout, device: str, **arguments: Any) -> Accelerator:
    if layout.strategy == "fsdp":
        arguments["fsdp_plugin"] = FullyShardedDataParallelPlugin(**(layout.plugin or {}))
    if layout.strategy == "deepspeed":
        arguments["deepspeed_plugin"] = DeepSpeedPlugin(**(layout.plugin or {}))
    if layout.replicas > 1:
        arguments["parallelism_config"] = ParallelismConfig(
            dp_replicate_size=layout.replicas, dp_shard_size=layout.ranks // layout.replicas
        )
    return Accelerator(cpu=device == "cpu", strategy=layout.strategy, **arguments)


def train(
    layout: Layout, accumulation: int = 1, precision: str = "no", device: str = "cpu", wrong: float = 1.0
) -> Trained:
    """Train for 20 optimizer steps; `wrong` scales the loss, as a bug would."""
    arguments: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "mixed_precision": precision}
    # Low enough that fp16 starts without a skipped step: a skipped one is no parity.
    if layout.strategy != "deepspeed":
        arguments["kwargs_handlers"] = [GradScalerKwargs(init_scale=256.0)]
    elif precision == "fp16":
        layout = with_small_scale(layout)
    accelerator = build(layout, device, **arguments)
    tokens = make_tokens(STEPS * GLOBAL_BATCH)
    model: Any = TinyTransformer(seed=accelerator.process_index)  # rank 0's values must win
    optimizer: Any = make_optimizer(model)
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
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
                losses.append(float(accelerator.reduce(torch.stack(window).mean(), "mean")))
                window.clear()
            optimizer.step()
            optimizer.zero_grad()
    weights = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}
    return Trained(losses, norms, weights)


def with_small_scale(layout: Layout) -> Layout:
    """A layout of DeepSpeed that starts fp16 without a skipped step."""
    plugin = layout.plugin or {}
    fp16 = {"enabled": True, "initial_scale_power": 8}
    described = {"zero_optimization": {"stage": plugin["zero_stage"]}, "fp16": fp16}
    return replace(layout, plugin={**plugin, "hf_ds_config": described})


def train_plainly(device: str = "cpu") -> Trained:
    """The same training in plain PyTorch, with nothing of paceline in it."""
    tokens = make_tokens(STEPS * GLOBAL_BATCH).to(device)
    model = TinyTransformer(seed=0).to(device)
    optimizer = make_optimizer(model)
    losses, norms = [], []
    for batch in torch.split(tokens, GLOBAL_BATCH):
        loss = token_losses(model(batch), batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return Trained(losses, norms, {name: value.cpu() for name, value in model.state_dict().items()})


def assert_close(got: list[float], wanted: list[float], tolerance: float) -> None:
    assert len(got) == len(wanted) == STEPS
    worst = max(abs(a - b) for a, b in zip(got, wanted, strict=True))
    assert worst <= tolerance, f"differs by {worst:.2e}"
