"""What examples in docstrings find in their module, besides its own names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["names_for"]


class Line(nn.Module):
    """A linear model with a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.linear(x)
        return {"logits": logits} if labels is None else {"loss": (logits - labels).square().mean(), "logits": logits}


class Points(Dataset[dict[str, torch.Tensor]]):
    """Sixteen samples for that model."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(16, 3, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.x[index].sum(0, keepdim=True)}


def names_for(module: str, folder: Path) -> dict[str, Any]:
    """The names for one docstring of a module; files go into `folder`."""
    make: Callable[[Path], dict[str, Any]] | None = _NAMES.get(module)
    return {} if make is None else make(folder)


def _trainer(folder: Path) -> dict[str, Any]:
    from paceline.trainer import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder), max_steps=4, use_cpu=True, log_level="error", disable_tqdm=True, save_strategy="no"
    )
    model, dataset = Line(), Points()

    class Quiet(Trainer):
        """Prints nothing, so that examples need not show it."""

        def __init__(self, *positional: Any, **values: Any) -> None:
            super().__init__(*positional, **values)
            self.remove_callback(PrinterCallback)
            self.remove_callback(ProgressCallback)

    names = {"TrainerCallback": TrainerCallback, "TrainingArguments": TrainingArguments, "Trainer": Quiet}
    trainer = Quiet(model, args, train_dataset=dataset, eval_dataset=dataset)
    return {**names, "trainer": trainer, "model": model, "args": args, "dataset": dataset}


_NAMES = {"paceline.trainer.trainer": _trainer}
