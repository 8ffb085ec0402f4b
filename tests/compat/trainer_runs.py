"""transformers' Trainer, in many ways; the names are "WAY" or "WAY, STRATEGY"."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.compat.texts import Pieces, PieceStream, llama, padded, padded_evenly, saved_weights

WAYS: dict[str, dict[str, Any]] = {
    "shuffle": {},
    "sequential": {"train_sampling_strategy": "sequential"},
    "dropout": {},
    "accumulation": {"gradient_accumulation_steps": 3, "num_train_epochs": 2},
    "bf16": {"bf16": True},
    "bf16 accumulation": {"bf16": True, "gradient_accumulation_steps": 3, "num_train_epochs": 2},
    "evaluate first": {},
    "predict first": {},
    "train twice": {},
    "train anew": {},
    "ragged": {"eval_strategy": "epoch", "num_train_epochs": 2},
    "batch_rebalance": {"train_sampling_strategy": "batch_rebalance"},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "neftune": {"neftune_noise_alpha": 5.0},
    "gather objects": {"eval_strategy": "epoch", "eval_use_gather_object": True},
    "resume": {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2},
    # The first one is the best: a choice that no rounding changes.
    "best": {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True, "max_steps": 6,
    },
    "find batch size": {"auto_find_batch_size": True, "per_device_train_batch_size": 5},
    "split batches": {"accelerator_config": {"split_batches": True}},
    "dispatch": {"accelerator_config": {"dispatch_batches": True}},
    "unseeded sampler": {"accelerator_config": {"use_seedable_sampler": False}, "num_train_epochs": 2},
    "uneven batches": {"accelerator_config": {"even_batches": False}, "eval_strategy": "epoch"},
    "stream": {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3},
    "drop last": {"dataloader_drop_last": True},
    "workers": {"dataloader_num_workers": 1},
    "token counts": {"include_num_input_tokens_seen": "all", "average_tokens_across_devices": False},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "activation checkpointing": {"gradient_checkpointing": True},
    "batch metrics": {"eval_strategy": "epoch", "batch_eval_metrics": True, "eval_accumulation_steps": 1},
    "no clipping": {"max_grad_norm": 0.0, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "own optimizer": {},
    "lora": {},
    "lora resume": {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2},
}  # fmt: skip
SHORT = ("dropout", "accumulation", "ragged", "resume")
STRATEGIES = ("fsdp", "zero2", "zero3")
SHARDED = (
    "shuffle", "dropout", "accumulation", "evaluate first", "train twice", "ragged", "batch_rebalance",
    "group_by_length", "resume", "best", "gather objects", "lora",
)  # fmt: skip
RUNS = tuple(WAYS)
RUNS_SHARDED = {
    "fsdp": tuple(f"{way}, fsdp" for way in (*SHARDED, "no clipping")),
    # Evaluating before training is refused by transformers below stage 3. A second `train()` of one Trainer is an error
    # under both: transformers frees the engine after the first, and prepares what is left of it. "train anew" does
    # before it what our message says.
    "zero2": tuple(f"{way}, zero2" for way in SHARDED if way not in ("evaluate first", "train twice")),
    "zero3": tuple(f"{way}, zero3" for way in SHARDED if way != "train twice"),
}


def run(name: str, folder: str) -> dict[str, Any]:
    """Train in one way."""
    way, _, strategy = name.partition(", ")
    # On the CPU the real Accelerate does not shard, and under DeepSpeed takes each rank for the only one: DDP gives
    # what it should give, but for the names of files.
    if strategy.startswith("zero") and "RANK" not in os.environ:
        # Without them DeepSpeed asks MPI.
        one_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(one_rank)
    sharded = strategy == "fsdp" or (strategy != "" and int(os.environ.get("WORLD_SIZE", "1")) > 1)
    if sharded and os.environ["COMPAT_SIDE"] == "real":
        strategy = ""
    found = Run(way, strategy, folder).result()
    if sharded:
        found.pop("files", None)
    return found


class Run:
    """One way of training."""

    def __init__(self, way: str, strategy: str, folder: str) -> None:
        self.way = way
        self.strategy = strategy
        self.folder = folder

    def trainer(self) -> Any:
        """A new Trainer, with a new model."""
        from transformers import Trainer, TrainingArguments

        settings: dict[str, Any] = {
            "output_dir": self.folder,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": 3,
            **_of_strategy(self.strategy),
            **({"use_cpu": True} if self.way.startswith("bf16") else {}),
            **WAYS[self.way],
        }
        model = llama(dropout=0.1 if self.way == "dropout" else 0.0)
        if self.way.startswith("bf16") and self.strategy.startswith("zero"):
            # Accelerate's engine begins with rounded weights, paceline's with the exact ones: here they are the same.
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16().float()
        more: dict[str, Any] = {}
        if self.way.startswith("lora"):
            model = with_lora(model)
        if self.way == "own optimizer":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            more["optimizers"] = (optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5))
        if self.way == "stream":
            data: dict[str, Any] = {"train_dataset": PieceStream(26), "eval_dataset": PieceStream(13, seed=1)}
        else:
            data = {"train_dataset": Pieces(26), "eval_dataset": Pieces(13, seed=1)}
        metrics = BatchMetrics() if self.way == "batch metrics" else right
        kind = OutOfMemory if self.way == "find batch size" else Plain
        trainer_class = type("Trained", (kind, Trainer), {})
        collate = padded_evenly if self.way in ("dispatch", "stream") else padded
        arguments = TrainingArguments(**settings)
        return trainer_class(
            model=model, args=arguments, data_collator=collate, compute_metrics=metrics, **data, **more
        )

    def result(self) -> dict[str, Any]:
        """All numbers of the run."""
        trainer = self.trainer()
        found: dict[str, Any] = {}
        if self.way in ("evaluate first", "predict first"):
            found["before"] = _numbers(trainer.evaluate())
        if self.way == "predict first":
            found["predicted"] = _numbers(trainer.predict(Pieces(11, seed=2)).metrics)
        trainer.train()
        found["log"] = [_numbers(entry) for entry in trainer.state.log_history]
        if self.way == "train anew":
            # Without them the Trainer prepares what is left of the first training.
            trainer.model_wrapped = trainer.model
            trainer.optimizer = None
        if self.way in ("train twice", "train anew"):
            trainer.train()
            found["log again"] = [_numbers(entry) for entry in trainer.state.log_history]
        if "resume" in self.way:
            found["files"] = sorted(path.name for path in Path(self.folder, "checkpoint-3").iterdir())
            again = self.trainer()
            again.train(resume_from_checkpoint=str(Path(self.folder, "checkpoint-3")))
            found["log resumed"] = [_numbers(entry) for entry in again.state.log_history]
            trainer = again
        found["random"] = float(torch.rand(()))
        found["after"] = _numbers(trainer.evaluate())
        if self.way == "find batch size":
            found["batch size"] = trainer._train_batch_size
        trainer.save_model(str(Path(self.folder, "final")))
        trainer.accelerator.wait_for_everyone()
        found["weights"] = saved_weights(str(Path(self.folder, "final")))
        return found


class Plain:
    """The Trainer as it is."""


class OutOfMemory:
    """A Trainer whose memory holds three samples."""

    def training_step(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
        if len(inputs["input_ids"]) > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate a lot.")
        return super().training_step(model, inputs, *more, **named)  # type: ignore[misc]


def _of_strategy(strategy: str) -> dict[str, Any]:
    is_real, num_ranks = os.environ["COMPAT_SIDE"] == "real", int(os.environ.get("WORLD_SIZE", "1"))
    if strategy == "fsdp":
        return {"use_cpu": True, "ddp_backend": "gloo", "fsdp": True, "fsdp_config": {"version": 2}}
    if strategy.startswith("zero"):
        zero = {
            "stage": int(strategy[-1]),
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,
        }
        auto = (
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
            "train_batch_size",
        )
        return {
            "deepspeed": {
                **dict.fromkeys(auto, "auto"),
                "zero_optimization": zero,
                "bf16": {"enabled": "auto"},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
            "optim": "adamw_torch",
            **(_join_ranks_of_deepspeed() if is_real and num_ranks > 1 else {}),
        }
    return {"use_cpu": True, "ddp_backend": "gloo" if num_ranks > 1 else None}


def _join_ranks_of_deepspeed() -> dict[str, Any]:
    """Let Accelerate count the ranks: on the CPU it shards with DeepSpeed, yet takes each rank for the only one."""
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    return {"accelerator_config": {"use_configured_state": True}}


def with_lora(model: Any) -> Any:
    """The model with trainable adapters."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"]))


def right(prediction: Any) -> dict[str, float]:
    """How many tokens are foreseen, and how many samples there were."""
    answers, labels = np.asarray(prediction.predictions).argmax(-1)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
    known = labels != -100
    return {"right": float((answers == labels)[known].mean()), "samples": float(len(labels))}


class BatchMetrics:
    """The same, batch by batch."""

    def __init__(self) -> None:
        self.right = self.known = 0

    def __call__(self, prediction: Any, compute_result: bool = False) -> dict[str, float]:
        answers, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
        known = labels != -100
        self.right += int(((answers == labels) & known).sum())
        self.known += int(known.sum())
        return {"right": self.right / self.known, "known": float(self.known)} if compute_result else {}


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    """What does not depend on the time."""
    of_time = ("time", "per_second", "flos")
    numbers = {name: float(value) for name, value in entry.items() if isinstance(value, (int, float))}
    return {name: value for name, value in numbers.items() if not any(word in name for word in of_time)}
