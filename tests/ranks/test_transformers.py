"""Models of transformers: their own hint about blocks, and weights that `from_pretrained` reads."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline import Accelerator
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


def test_saved_weights_load_and_training_agrees(tmp_path: Path) -> None:
    single, _ = run_on_ranks(1, fine_tune, "single", str(tmp_path / "single"))[0]
    ddp, _ = run_on_ranks(2, fine_tune, "ddp", str(tmp_path / "ddp"))[0]
    fsdp, told = run_on_ranks(2, fine_tune, "fsdp", str(tmp_path / "fsdp"))[0]
    assert ddp == pytest.approx(single, abs=1e-5)
    assert fsdp == pytest.approx(single, abs=1e-5)
    assert "3 LlamaDecoderLayer + the rest (the model's own _no_split_modules)" in told
