"""What tests of the Trainer share: a small model, token data with ignored labels, and one run of it."""

from __future__ import annotations

import contextlib
import io
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from collections.abc import Callable

VOCABULARY = 61
IGNORED = -100


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = hidden + self.down(F.gelu(self.up(self.norm(hidden))))
        return out


class Tagger(nn.Module):
    """Says something about each token; the loss is the mean over labels that are not -100."""

    def __init__(self, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        hidden = self.tokens(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return {"loss": loss, "logits": logits}


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens, of which the last few have no label."""

    def __init__(self, size: int, seed: int, length: int = 8) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, VOCABULARY, (size, length), generator=generator)
        self.known = torch.randint(2, length + 1, (size,), generator=generator)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        labels = (self.tokens[index] * 7 + 3) % VOCABULARY
        labels[self.known[index] :] = IGNORED
        return {"input_ids": self.tokens[index], "labels": labels}


def accuracy(prediction: Any) -> dict[str, float]:
    """The share of right answers, and how many samples there were."""
    labels = torch.from_numpy(prediction.label_ids)
    answers = torch.from_numpy(prediction.predictions).argmax(-1)
    there = labels != IGNORED
    return {"accuracy": float((answers == labels)[there].float().mean()), "samples": float(len(labels))}


def arguments(folder: str, **changes: Any) -> dict[str, Any]:
    """Arguments that both Trainers understand."""
    return {
        "output_dir": folder,
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        **changes,
    }


def tagger() -> nn.Module:
    """The model, the same each time."""
    torch.manual_seed(3)
    return Tagger()


def run(
    changes: dict[str, Any],
    folder: str,
    *,
    samples: int = 48,
    resume: bool | str | None = None,
    make: Callable[[], nn.Module] = tagger,
    **more: Any,
) -> tuple[list[dict[str, Any]], Any]:
    """Train once; return the log without times, and the Trainer."""
    from paceline import Trainer, TrainingArguments

    trainer = Trainer(
        make(),
        TrainingArguments(**arguments(folder, **changes)),
        train_dataset=Sentences(samples, 1),
        eval_dataset=Sentences(21, 2),
        compute_metrics=accuracy,
        **more,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(resume_from_checkpoint=resume)
    return [timeless(entry) for entry in trainer.state.log_history], trainer


def batch_plan(trainer: Any) -> list[int]:
    """The samples of a rank's micro-batch, and the micro-batches of an optimizer step."""
    accelerator = trainer.accelerator
    return [trainer.get_total_train_batch_size() // accelerator.num_processes, accelerator.gradient_accumulation_steps]


def timeless(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of a log without what differs from run to run."""
    return {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}


def farthest(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """The largest difference between two logs; infinite if they hold different things."""
    if [sorted(entry) for entry in one] != [sorted(entry) for entry in other]:
        return math.inf
    return max(
        (abs(mine[name] - theirs[name]) for mine, theirs in zip(one, other, strict=True) for name in mine), default=0.0
    )


class Counted:
    """An object of the script in its checkpoints."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]
