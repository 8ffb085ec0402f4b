"""Models of transformers: their own hint about blocks, and weights that `from_pretrained` reads."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline import Accelerator
from tests.support.engines import needs_deepspeed
from tests.support.ranks import run_on_ranks

pytest.importorskip("transformers", reason="pip install 'paceline[transformers]'")


def fine_tune(strategy: str, folder: str) -> tuple[list[float], str]:
    from transformers import LlamaConfig, LlamaForCausalLM

    # A run under ZeRO-3 that an earlier test left in a circle makes transformers shard what one rank builds.
    gc.collect()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    accelerator = Accelerator(cpu=True, strategy=strategy)
    model: Any = LlamaForCausalLM(config)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    tokens = torch.randint(0, 99, (4, 8), generator=torch.Generator().manual_seed(3))
    tokens = tokens[accelerator.process_index :: accelerator.num_processes]
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    accelerator.save_model(model, folder, max_shard_size="40KB")
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        config.save_pretrained(folder)
        loaded = LlamaForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in weights.items())
        assert len(list(Path(folder).glob("model-*-of-*.safetensors"))) > 1
    return losses, "\n".join(accelerator.strategy.describe())


@pytest.mark.slow
def test_saved_weights_load_and_training_agrees(tmp_path: Path) -> None:
    single, _ = run_on_ranks(1, fine_tune, "single", str(tmp_path / "single"))[0]
    ddp, _ = run_on_ranks(2, fine_tune, "ddp", str(tmp_path / "ddp"))[0]
    fsdp, told = run_on_ranks(2, fine_tune, "fsdp", str(tmp_path / "fsdp"))[0]
    assert ddp == pytest.approx(single, abs=1e-5)
    assert fsdp == pytest.approx(single, abs=1e-5)
    assert "3 LlamaDecoderLayer + the rest (the model's own _no_split_modules)" in told


def made_by_a_trainer(folder: str) -> tuple[bool, list[int]]:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from paceline import Trainer, TrainingArguments

    gc.collect()
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8
    )
    made: list[Any] = []

    def model_init() -> Any:
        made.append(AutoModelForCausalLM.from_config(config))  # type: ignore[no-untyped-call]
        return made[0]

    stage = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(8)]
    arguments = TrainingArguments(
        output_dir=folder, deepspeed=stage, use_cpu=True, max_steps=2, save_strategy="no", report_to="none",
        per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model_init=model_init, args=arguments, train_dataset=rows)
    sharded = [p.ds_tensor.numel() for p in made[0].parameters()]
    trainer.train()
    return trainer.state.global_step == 2, sharded


@needs_deepspeed
def test_a_model_that_the_trainer_makes_is_built_sharded(tmp_path: Path) -> None:
    for trained, held in run_on_ranks(2, made_by_a_trainer, str(tmp_path)):
        assert trained
        assert 32 * 16 // 2 in held
