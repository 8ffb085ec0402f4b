"""A step of the default run makes the host wait for nothing on the device: torch raises where it would."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from paceline import Accelerator
from paceline.trainer import Trainer, TrainerCallback, TrainingArguments
from tests.support.models import TinyTransformer, make_tokens, token_losses

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    # "a prototype feature"
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

# The first steps allocate, are timed, and compile; what holds for the steps after them holds for the run.
FREE, WATCHED = 26, 20


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Raise an error where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Samples(Dataset[dict[str, torch.Tensor]]):
    """Tokens, and a part that makes a batch large enough to be pinned and copied by threads."""

    def __init__(self, large: bool) -> None:
        self.large = large

    def __len__(self) -> int:
        return 4 * (FREE + WATCHED + 4)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        found = {"tokens": make_tokens(1, seed=index)[0]}
        if self.large:
            found["image"] = torch.full((3, 512, 512), float(index))
        return found


def run(strategy: str, precision: str, large: bool, **settings: Any) -> list[torch.Tensor]:
    accelerator = Accelerator(strategy=strategy, mixed_precision=precision, gradient_accumulation_steps=2, **settings)
    model: Any = TinyTransformer(width=64)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule: Any = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=1000)
    loader: Any = DataLoader(Samples(large), batch_size=2)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    losses = []
    batches = iter(loader)

    def steps(count: int) -> None:
        for _ in range(2 * count):
            batch = next(batches)
            with accelerator.accumulate(model):
                loss = token_losses(model(batch["tokens"]), batch["tokens"]).mean()
                if large:
                    loss = loss + 0 * batch["image"].mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.detach())

    steps(FREE)
    with watched():
        steps(WATCHED)
    print(accelerator.describe())
    return losses


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_loop_waits_for_nothing(precision: str, large: bool) -> None:
    losses = run("single", precision, large)
    assert float(losses[-1]) < float(losses[0])


@pytest.mark.parametrize("large", [False, True])
def test_the_loop_under_fsdp_waits_for_nothing(large: bool, one_rank: None) -> None:
    losses = run("fsdp", "bf16", large)
    assert float(losses[-1]) < float(losses[0])


def test_fp8_waits_for_nothing(one_rank: None) -> None:
    pytest.importorskip("torchao")
    from paceline.config import FP8Config

    run("fsdp", "fp8", False, kwargs_handlers=[FP8Config(skip_small_layers=False)])


def test_a_model_of_transformers_waits_for_nothing(one_rank: None) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 2_000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    accelerator = Accelerator(strategy="fsdp", mixed_precision="bf16")
    model: Any = transformers.LlamaForCausalLM(config)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    tokens = make_tokens(2, 64).to(accelerator.device)

    def steps(count: int) -> None:
        for _ in range(count):
            accelerator.backward(model(input_ids=tokens, labels=tokens, use_cache=False).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    steps(FREE)
    with watched():
        steps(WATCHED)


def test_a_wait_is_noticed() -> None:
    with watched(), pytest.raises(RuntimeError, match="synchron"):
        torch.ones(1, device="cuda").item()


class Watch(TrainerCallback):
    """Turns the check on in the middle of a training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        if state.global_step == FREE:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        elif state.global_step == FREE + WATCHED:
            torch.cuda.set_sync_debug_mode("default")


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyTransformer(width=64)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": token_losses(self.inner(tokens), labels).mean()}


class Labelled(Samples):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = super().__getitem__(index)["tokens"]
        return {"tokens": tokens, "labels": tokens}


@pytest.mark.parametrize("kind", ["own", "transformers"])
def test_the_trainer_waits_for_nothing(kind: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        bf16=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=FREE + WATCHED + 2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model: nn.Module = WithLoss()
    data: Any = Labelled(large=False)
    if kind == "transformers":
        transformers = pytest.importorskip("transformers")
        sizes = {"vocab_size": 20_000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        )
        data = [{"input_ids": row, "labels": row} for row in make_tokens(len(data), 64)]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Watch()])
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == FREE + WATCHED + 2
