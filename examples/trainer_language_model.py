"""Train a small Llama with the Trainer, with its arguments in a YAML file.

The text is the source code of Python's standard library, one token per byte, so nothing is downloaded. The model comes
from transformers (install the extra `transformers`). The same two files run on one process or many; after an
interruption, `--resume_from_checkpoint true` resumes from the newest checkpoint:

    python examples/trainer_language_model.py examples/trainer_language_model.yaml
    paceline launch examples/trainer_language_model.py examples/trainer_language_model.yaml --max_steps 1000
    paceline launch --config_file examples/fsdp.yaml examples/trainer_language_model.py examples/trainer_language_model.yaml
"""  # noqa: E501

from __future__ import annotations

import math
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from paceline import Trainer, TrainingArguments, set_seed


@dataclass
class ModelArguments:
    """The size of the model and of the text."""

    width: int = field(default=128, metadata={"help": "Width of the model."})
    layers: int = field(default=4, metadata={"help": "Decoder layers."})
    heads: int = field(default=4, metadata={"help": "Attention heads."})
    context: int = field(default=128, metadata={"help": "Bytes per training sample."})
    text_bytes: int = field(default=2_000_000, metadata={"help": "Bytes to train on."})


class Windows(Dataset[dict[str, Tensor]]):
    """Consecutive windows of bytes; each byte is predicted from the bytes before it."""

    def __init__(self, text: bytes, context: int) -> None:
        self.data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return len(self.data) // self.context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.data[index * self.context : (index + 1) * self.context].long()
        return {"input_ids": window, "labels": window}


def read_text(limit: int) -> tuple[bytes, bytes]:
    """Read the standard library's sources as a training text and a held-out text (every tenth file)."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    train = b"".join(file.read_bytes() for i, file in enumerate(files) if i % 10)[:limit]
    held_out = b"".join(file.read_bytes() for i, file in enumerate(files) if not i % 10)
    return train, held_out[: limit // 20]


def build_model(size: ModelArguments) -> LlamaForCausalLM:
    """Build a randomly initialised Llama over bytes."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=size.width,
            intermediate_size=4 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=size.context,
        )
    )


def main() -> None:
    """Train, evaluate on the held-out text, and save the weights."""
    arguments, size = TrainingArguments.parse(ModelArguments)
    set_seed(arguments.seed)
    train, held_out = read_text(size.text_bytes)
    trainer = Trainer(
        build_model(size),
        arguments,
        train_dataset=Windows(train, size.context),
        eval_dataset=Windows(held_out, size.context),
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    loss = trainer.evaluate()["eval_loss"]
    trainer.accelerator.print(trainer.accelerator.describe())
    trainer.accelerator.print(f"held-out text: {loss:.4f} nats per byte, perplexity {math.exp(loss):.2f}")
    trainer.save_model()


if __name__ == "__main__":
    main()
