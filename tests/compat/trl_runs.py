"""TRL's trainers, with and without LoRA; the names are "TRAINER", "TRAINER lora", and ", STRATEGY" behind them."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tests.compat.texts import VOCABULARY, llama, pieces, saved_weights
from tests.compat.trainer_runs import _numbers, _of_strategy

TRAINERS = ("sft", "dpo", "reward", "grpo")
RUNS = tuple(f"{trainer}{lora}" for trainer in TRAINERS for lora in ("", " lora"))
RUNS_SHARDED = {strategy: tuple(f"{run}, {strategy}" for run in RUNS) for strategy in ("fsdp", "zero2", "zero3")}
# More of what each trainer can do.
MORE: dict[str, dict[str, Any]] = {
    "sft packed": {"packing": True, "packing_strategy": "wrapped"},
    "sft path": {"model_init_kwargs": {"dtype": "float32"}},
    "sft resumed": {"save_strategy": "steps", "save_steps": 2},
    "dpo synchronized": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    "grpo path": {"beta": 0.04, "model_init_kwargs": {"dtype": "float32"}},
    "grpo iterations": {"num_iterations": 2, "steps_per_generation": 2},
    "grpo scorer": {},
    "rloo": {},
}


def run(name: str, folder: str) -> dict[str, Any]:
    """Train once."""
    kind, _, strategy = name.partition(", ")
    if os.environ["COMPAT_SIDE"] == "real":
        # On the CPU it trains replicas where it should shard with FSDP.
        strategy = strategy.removeprefix("fsdp")
    trainer_name = kind.partition(" ")[0]
    trainer = _trainer(kind, strategy, folder)
    trainer.train()
    if kind.endswith("resumed"):
        trainer = _trainer(kind, strategy, folder)
        trainer.train(resume_from_checkpoint=str(Path(folder, "checkpoint-2")))
    _check_spread(trainer, strategy)
    found: dict[str, Any] = {"log": [_numbers(entry) for entry in trainer.state.log_history]}
    found["random"] = float(torch.rand(()))
    if trainer_name not in ("grpo", "rloo"):
        found["after"] = _numbers(trainer.evaluate())
    trainer.save_model(str(Path(folder, "final")))
    trainer.accelerator.wait_for_everyone()
    found["weights"] = saved_weights(str(Path(folder, "final")))
    return found


def _check_spread(trainer: Any, strategy: str) -> None:
    """Make sure that the strategy was used: numbers alone would not show it."""
    if strategy == "fsdp":
        assert any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    elif strategy:
        assert trainer.model_wrapped.zero_optimization_stage() == int(strategy[-1])
        assert trainer.accelerator.num_processes == torch.distributed.get_world_size()


def _trainer(kind: str, strategy: str, folder: str) -> Any:
    trl: Any = importlib.import_module("trl")
    from peft import LoraConfig

    name, _, way = kind.partition(" ")
    lora = way == "lora"
    # Before the arguments: under ZeRO-3 transformers would shard the part that it makes inside, and fail on the rest.
    scorer = _scorer() if "reward" in kind or "scorer" in kind else None
    model = _saved(folder) if way == "path" else llama()
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
        **MORE.get(kind, {}),
    }
    adapters = LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]) if lora else None
    shared: dict[str, Any] = {"processing_class": _tokenizer(), "peft_config": adapters}
    match name:
        case "sft":
            arguments = trl.SFTConfig(max_length=24, **common)
            return trl.SFTTrainer(model, arguments, **shared, **_sets(20, _text))
        case "dpo":
            arguments = trl.DPOConfig(max_length=32, **common)
            reference = None if lora else llama()
            return trl.DPOTrainer(model, reference, arguments, **shared, **_sets(20, _preference))
        case "reward":
            arguments = trl.RewardConfig(max_length=32, **common)
            return trl.RewardTrainer(scorer, args=arguments, **shared, **_sets(20, _preference))
    sampling = {"num_generations": 2, "max_completion_length": 6, "temperature": 1.0}
    sampling["beta"] = common.pop("beta", 0.04 if lora else 0.0)
    shared["train_dataset"] = _sets(20, _prompt)["train_dataset"]
    rewards = _vowels if scorer is None else scorer
    if name == "rloo":
        return trl.RLOOTrainer(model, reward_funcs=rewards, args=trl.RLOOConfig(**sampling, **common), **shared)
    if scorer is not None:
        shared["reward_processing_classes"] = _tokenizer()
    return trl.GRPOTrainer(model, reward_funcs=rewards, args=trl.GRPOConfig(**sampling, **common), **shared)


def _saved(folder: str) -> str:
    """A folder with the model, for this rank: `save_pretrained` writes on one rank alone."""
    from safetensors.torch import save_file

    place = Path(folder, f"first{os.environ.get('RANK', '0')}")
    place.mkdir()
    model = llama()
    model.config.architectures = [type(model).__name__]
    Path(place, "config.json").write_text(model.config.to_json_string(use_diff=False))
    save_file(model.state_dict(), Path(place, "model.safetensors"), {"format": "pt"})
    return str(place)


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
