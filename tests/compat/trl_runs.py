"""TRL's trainers, with and without LoRA; the names are "TRAINER", "TRAINER lora", and ", STRATEGY" behind them."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch

from tests.compat.texts import VOCABULARY, llama, pieces, saved_weights
from tests.compat.trainer_runs import _numbers, _of_strategy, join_ranks_of_deepspeed

TRAINERS = ("sft", "dpo", "reward", "grpo")
RUNS = tuple(f"{trainer}{lora}" for trainer in TRAINERS for lora in ("", " lora"))
RUNS_SHARDED = {strategy: tuple(f"{run}, {strategy}" for run in RUNS) for strategy in ("fsdp", "zero2", "zero3")}


def run(name: str, folder: str) -> dict[str, Any]:
    """Train once."""
    kind, _, strategy = name.partition(", ")
    if os.environ["COMPAT_SIDE"] == "real":
        # On the CPU it trains replicas where it should shard with FSDP.
        strategy = strategy.removeprefix("fsdp")
        if strategy:
            join_ranks_of_deepspeed()
    trainer_name, _, lora = kind.partition(" ")
    trainer = _trainer(trainer_name, bool(lora), strategy, folder)
    trainer.train()
    found: dict[str, Any] = {"log": [_numbers(entry) for entry in trainer.state.log_history]}
    found["random"] = float(torch.rand(()))
    if trainer_name != "grpo":
        found["after"] = _numbers(trainer.evaluate())
    trainer.save_model(str(Path(folder, "final")))
    trainer.accelerator.wait_for_everyone()
    found["weights"] = saved_weights(str(Path(folder, "final")))
    return found


def _trainer(name: str, lora: bool, strategy: str, folder: str) -> Any:
    trl: Any = importlib.import_module("trl")
    from peft import LoraConfig

    common: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 3,
        **_of_strategy(strategy),
    }
    adapters = LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]) if lora else None
    shared: dict[str, Any] = {"processing_class": _tokenizer(), "peft_config": adapters}
    match name:
        case "sft":
            arguments = trl.SFTConfig(max_length=24, **common)
            return trl.SFTTrainer(llama(), arguments, **shared, **_sets(20, _text))
        case "dpo":
            arguments = trl.DPOConfig(max_length=32, **common)
            reference = None if lora else llama()
            return trl.DPOTrainer(llama(), reference, arguments, **shared, **_sets(20, _preference))
        case "reward":
            arguments = trl.RewardConfig(max_length=32, **common)
            return trl.RewardTrainer(_scorer(), args=arguments, **shared, **_sets(20, _preference))
    arguments = trl.GRPOConfig(
        num_generations=2, max_completion_length=6, temperature=1.0, beta=0.04 if lora else 0.0, **common
    )
    sets = {"train_dataset": _sets(20, _prompt)["train_dataset"]}
    return trl.GRPOTrainer(llama(), reward_funcs=_vowels, args=arguments, **shared, **sets)


def _vowels(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in completion)) for completion in completions]


def _scorer() -> Any:
    import transformers

    scorer: Any = transformers.LlamaForSequenceClassification
    config = llama().config
    config.num_labels = 1
    torch.manual_seed(0)
    return scorer(config)


def _tokenizer() -> Any:
    """One token for each byte."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    fast: Any = transformers.PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", *alphabet]
    assert len(tokens) <= VOCABULARY
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left")


def _sets(count: int, row: Any) -> dict[str, Any]:
    from datasets import Dataset

    texts = [bytes(token - 3 for token in tokens).decode(errors="replace") for tokens in pieces(count + 8, seed=4)]
    rows = [row(text, other) for text, other in zip(texts, reversed(texts), strict=True)]
    return {"train_dataset": Dataset.from_list(rows[:count]), "eval_dataset": Dataset.from_list(rows[count + 1 :])}


def _text(text: str, _: str) -> dict[str, str]:
    return {"text": text}


def _prompt(text: str, _: str) -> dict[str, str]:
    return {"prompt": text[:8]}


def _preference(text: str, other: str) -> dict[str, str]:
    return {"prompt": text[:6], "chosen": text[6:] + "!", "rejected": other[:10] + "?"}
