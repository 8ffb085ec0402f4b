"""Classify lines as code or prose with the Trainer: your own model, a tokenizer, and metrics.

The lines come from Python's standard library and are labelled by Python's own tokenizer, so nothing is downloaded.
Samples are dictionaries, as in transformers' data sets. The tokenizer pads each batch to its longest line, and batches
are grouped by length.

    python examples/text_classification.py
    paceline launch examples/text_classification.py --num_train_epochs 2
    paceline launch --use_fsdp examples/text_classification.py --bf16
"""

from __future__ import annotations

import io
import random
import sys
import sysconfig
import tokenize
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paceline import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed

NAMES = ("code", "prose")
LONGEST = 72


class ByteTokenizer:
    """Every byte is a token; 0 is padding."""

    def encode(self, text: str) -> list[int]:
        """Turn a line into tokens."""
        return [byte + 1 for byte in text.encode()[:LONGEST]]

    def pad(self, samples: list[dict[str, Any]], return_tensors: str = "pt") -> dict[str, Tensor]:
        """Pad to the longest sample, with an attention mask."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        rows = [sample["input_ids"] + [0] * (longest - len(sample["input_ids"])) for sample in samples]
        tokens = torch.tensor(rows)
        return {
            "input_ids": tokens,
            "attention_mask": tokens.ne(0),
            "labels": torch.tensor([sample["label"] for sample in samples]),
        }


class Classifier(nn.Module):
    """A transformer encoder over bytes, mean-pooled over the tokens that are not padding."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(257, width, padding_idx=0)
        self.positions = nn.Embedding(LONGEST, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(width, len(NAMES))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Classify padded lines of bytes [batch, length]."""
        hidden = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=~attention_mask)
        real = attention_mask.unsqueeze(-1)
        logits = self.head((hidden * real).sum(1) / real.sum(1))
        found = {"logits": logits}
        return found if labels is None else {"loss": F.cross_entropy(logits.float(), labels), **found}


def read_lines(per_kind: int) -> list[tuple[str, int]]:
    """Read lines of the standard library with their labels, `per_kind` of each."""
    found: list[list[str]] = [[], []]
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="ignore")
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                found[1].append(token.string.lstrip("#! "))
            elif token.type == tokenize.STRING and token.string.startswith('"""'):
                found[1] += [line.strip() for line in token.string.strip('"').splitlines()]
            elif token.type == tokenize.NAME and token.start[1] == len(token.line) - len(token.line.lstrip()):
                found[0].append(token.line.strip())
    chosen = random.Random(0)
    kinds = [[line for line in lines if len(line) > 20] for lines in found]
    return [(line, kind) for kind, lines in enumerate(kinds) for line in chosen.sample(lines, per_kind)]


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the accuracy, overall and for each class."""
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    by_kind = {name: float(right[prediction.label_ids == kind].mean()) for kind, name in enumerate(NAMES)}
    return {"accuracy": float(right.mean()), "counted": float(len(right)), **by_kind}


def main() -> None:
    """Train until accuracy stops improving, then evaluate the best checkpoint."""
    defaults = ["--output_dir", "runs/text_classification", "--learning_rate", "2e-3", "--num_train_epochs", "4"]
    defaults += ["--per_device_train_batch_size", "32", "--per_device_eval_batch_size", "64", "--warmup_steps", "0.1"]
    defaults += ["--train_sampling_strategy", "group_by_length", "--eval_strategy", "epoch", "--save_strategy", "epoch"]
    defaults += ["--load_best_model_at_end", "--metric_for_best_model", "accuracy", "--logging_steps", "20"]
    arguments = TrainingArguments.from_command_line(defaults + sys.argv[1:])
    set_seed(arguments.seed)
    tokenizer = ByteTokenizer()
    samples = [{"input_ids": tokenizer.encode(line), "label": kind} for line, kind in read_lines(1500)]
    random.Random(1).shuffle(samples)
    trainer = Trainer(
        Classifier(),
        arguments,
        train_dataset=samples[500:],
        eval_dataset=samples[:500],
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    found = trainer.evaluate()
    counted, right = int(found["eval_counted"]), found["eval_accuracy"]
    trainer.accelerator.print(f"{right:.1%} of {counted} held-out lines classified correctly")


if __name__ == "__main__":
    main()
