"""Collators, and which columns of a batch a model takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import default_collate

from paceline.errors import DataError
from paceline.strategies.adapters import is_adapted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

__all__ = [
    "IGNORED",
    "Columns",
    "PaddingCollator",
    "columns_in",
    "columns_of",
    "default_collator",
    "forward_parameters",
    "label_names_of",
]

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

# The index that torch's cross_entropy ignores by default, and tokenizers write for "no target".
IGNORED = -100


def default_collator(samples: Sequence[Any]) -> Any:
    """Stack samples: mappings of numbers, lists and tensors become a mapping of tensors; `label` becomes `labels`.

    Text and None are dropped. Samples that are not mappings go to `torch.utils.data.default_collate`.
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
    """Pads samples to the longest one with the `pad` method of a tokenizer."""

    _objects_of_script = ("_pad",)

    def __init__(self, processing_class: Any) -> None:
        self._pad = processing_class.pad

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Return a mapping of tensors."""
        batch = dict(self._pad(list(samples), return_tensors="pt"))
        for name in ("label", "label_ids"):
            if name in batch:
                batch["labels"] = batch.pop(name)
        return batch


REMOVED = "remove_unused_columns drops columns that the model's forward does not take, so nothing would be left"
KEEP = "Set remove_unused_columns=False if the data_collator creates the model's inputs, or rename the columns"


def nothing_left(columns: Iterable[str], kept: Iterable[str]) -> str:
    """What was seen where the model takes none of the columns."""
    return f"Samples have {', '.join(columns)}, and the model takes {', '.join(sorted(kept))}"


class Columns:
    """Drops columns that the model does not take, then collates.

    Args:
        collator: Collates what is left.
        kept: The columns that the model takes.
    """

    _objects_of_script = ("collator",)

    def __init__(self, collator: Callable[[Any], Any], kept: frozenset[str]) -> None:
        self.collator = collator
        self.kept = kept

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Return the batch."""
        first = samples[0]
        if isinstance(first, Mapping):
            samples = [{k: v for k, v in sample.items() if k in self.kept} for sample in samples]
            if first and not samples[0]:
                raise DataError(nothing_left(first, self.kept), REMOVED, KEEP)
        return self.collator(samples)


def columns_in(batch: Any) -> str:
    """The contents of a batch, for a message."""
    if isinstance(batch, Mapping):
        return ", ".join(map(str, batch)) or "nothing"
    if isinstance(batch, list | tuple):
        return f"{len(batch)} elements without names"
    return f"one {type(batch).__name__}"


def forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of a model's forward by name.

    A `PeftModel` passes on what it does not name itself: it takes what its base model takes, and its own.
    """
    base = _base_of(model)
    parameters = dict(inspect.signature(base.forward).parameters)
    if base is not model:
        own = inspect.signature(model.forward).parameters
        parameters |= {name: p for name, p in own.items() if p.kind in _NAMED and name not in parameters}
    return parameters


def _base_of(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`; any other model itself."""
    adapted: Any = model
    if is_adapted(model):
        base: nn.Module = adapted.get_base_model()
        return base
    return model


def columns_of(model: nn.Module, label_names: Sequence[str]) -> frozenset[str] | None:
    """The columns that a model takes; None if it takes any."""
    parameters = forward_parameters(model).values()
    named = {p.name for p in parameters if p.kind in _NAMED}
    if not named or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    # The **kwargs of models of transformers are for their attention kernels, not for columns of data.
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and not hasattr(model, "main_input_name"):
        return None
    return frozenset({*named, *label_names, "label", "label_ids", "labels"})


def label_names_of(model: nn.Module) -> list[str]:
    """The names of a model's inputs that are labels."""
    names = list(forward_parameters(model))
    labels = [name for name in names if "label" in name]
    if "QuestionAnswering" in type(_base_of(model)).__name__:
        labels += [name for name in ("start_positions", "end_positions") if name in names]
    return labels or ["labels"]
