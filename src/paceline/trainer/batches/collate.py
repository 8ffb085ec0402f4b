"""From samples to a batch, and from a batch to what a model is called with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import default_collate

from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

__all__ = ["Columns", "PaddingCollator", "columns_in", "columns_of", "default_collator", "label_names_of"]


def default_collator(samples: Sequence[Any]) -> Any:
    """Stack samples: mappings of numbers, lists and tensors become a mapping of tensors; `label` becomes `labels`.

    Text and None are left out. Samples that are no mappings are stacked as `torch.utils.data.default_collate` does.
    """
    first = samples[0]
    if not isinstance(first, Mapping):
        return default_collate(list(samples))
    batch: dict[str, Any] = {}
    for name, value in first.items():
        if value is None or isinstance(value, str):
            continue
        key = "labels" if name in ("label", "label_ids") else name
        batch[key] = _stack([sample[name] for sample in samples])
    return batch


def _stack(values: list[Any]) -> torch.Tensor:
    if isinstance(values[0], torch.Tensor):
        return torch.stack(values)
    if isinstance(values[0], np.ndarray | np.generic):
        return torch.from_numpy(np.stack(values))
    return torch.tensor(values)


class PaddingCollator:
    """Pads samples to the longest with a tokenizer's own `pad`."""

    def __init__(self, processing_class: Any) -> None:
        self._pad = processing_class.pad

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Return a mapping of tensors."""
        batch = dict(self._pad(list(samples), return_tensors="pt"))
        for name in ("label", "label_ids"):
            if name in batch:
                batch["labels"] = batch.pop(name)
        return batch


REMOVED = "remove_unused_columns takes away what the model's forward does not name"
KEEP = "Set remove_unused_columns=False where the data_collator makes the model's inputs, or rename columns"


def nothing_left(columns: Iterable[str], kept: Iterable[str]) -> str:
    """What is wrong with samples of which the model takes nothing."""
    return f"Samples have {', '.join(columns)}, and the model takes {', '.join(sorted(kept))}"


class Columns:
    """A collator before which columns are dropped that the model does not take."""

    def __init__(self, collator: Callable[[Any], Any], kept: frozenset[str]) -> None:
        self.collator = collator
        self.kept = kept

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Collate what the model takes."""
        first = samples[0]
        if isinstance(first, Mapping):
            samples = [{k: v for k, v in sample.items() if k in self.kept} for sample in samples]
            if first and not samples[0]:
                raise DataError(nothing_left(first, self.kept), REMOVED, KEEP)
        return self.collator(samples)


def columns_in(batch: Any) -> str:
    """What a batch holds, for a message."""
    if isinstance(batch, Mapping):
        return ", ".join(map(str, batch)) or "nothing"
    return f"{len(batch)} parts without names" if isinstance(batch, list | tuple) else f"one {type(batch).__name__}"


def columns_of(model: nn.Module, label_names: Sequence[str]) -> frozenset[str] | None:
    """The columns that a model takes; None if it takes whatever comes."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not named or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    # Models of transformers take further keywords for their kernels, never columns of data.
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and not hasattr(model, "main_input_name"):
        return None
    return frozenset({*named, *label_names, "label", "label_ids", "labels"})


def label_names_of(model: nn.Module) -> list[str]:
    """The inputs of a model that are labels, by their names."""
    names = list(inspect.signature(model.forward).parameters)
    found = [name for name in names if "label" in name]
    if "QuestionAnswering" in type(model).__name__:
        found += [name for name in ("start_positions", "end_positions") if name in names]
    return found or ["labels"]
