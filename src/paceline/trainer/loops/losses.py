"""Calling a model and finding the loss in what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from paceline.errors import PacelineError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "IGNORED",
    "ModelCall",
    "find_labels",
    "keys_to_ignore",
    "loss_of",
    "maybe_loss",
    "predictions_of",
    "smoothed_loss",
    "without_labels",
]

IGNORED = -100


class ModelCall:
    """What is known about how a model wants to be called, looked up once.

    Attributes:
        counts_items: Whether it takes `num_items_in_batch` and divides its sum by that.
        shifts_labels: Whether it predicts the next token, so that the first label counts for nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = inspect.signature(model.forward).parameters
        own = getattr(model, "accepts_loss_kwargs", None)
        is_transformers = hasattr(model, "main_input_name") and hasattr(model, "loss_function")
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if own is None:
            own = "num_items_in_batch" in parameters or (is_transformers and open_ended)
        self.counts_items = bool(own)
        config = getattr(model, "config", None)
        causal = str(getattr(model, "loss_type", "")).startswith("ForCausalLM")
        self.shifts_labels = causal and not getattr(config, "is_encoder_decoder", False)
        labels = parameters.get("labels")
        self.requires_labels = labels is not None and labels.default is labels.empty

    def __call__(self, model: nn.Module, inputs: Any, num_items: Tensor | None = None) -> Any:
        """Call a model with a mapping by keywords, with a sequence by position, or with what is neither."""
        more = {"num_items_in_batch": num_items.clamp(min=1)} if self.counts_items and num_items is not None else {}
        if isinstance(inputs, Mapping):
            return model(**inputs, **more)
        if isinstance(inputs, list | tuple):
            return model(*inputs, **more)
        return model(inputs, **more)

    def count(self, labels: Any) -> Tensor | None:
        """How many targets labels hold: those that are not -100, shape []; None without labels."""
        if not isinstance(labels, torch.Tensor):
            return None
        if labels.is_floating_point():
            return torch.full((), labels.numel(), dtype=torch.int64, device=labels.device)
        if self.shifts_labels and labels.dim() > 1:
            labels = labels[..., 1:]
        counted: Tensor = labels.ne(IGNORED).sum()
        return counted


def find_labels(inputs: Any, *, last_is_target: bool) -> Any:
    """The labels in a batch: under their name, or the last part of a sequence."""
    if isinstance(inputs, Mapping):
        return inputs.get("labels")
    return inputs[-1] if last_is_target and isinstance(inputs, list | tuple) and len(inputs) > 1 else None


def without_labels(inputs: Any) -> Any:
    """A batch without its labels."""
    if isinstance(inputs, Mapping):
        return {name: value for name, value in inputs.items() if name != "labels"}
    return inputs[:-1]


def loss_of(outputs: Any) -> Tensor:
    """The loss in what a model returned: an entry or attribute `loss`, the first of a tuple, or all there is.

    Raises:
        PacelineError: There is none.
    """
    found = maybe_loss(outputs)
    if found is not None:
        return found
    what = f"with {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
    raise PacelineError(
        f"The model returned a {type(outputs).__name__} {what}".rstrip(),
        "There is no loss in it to train on",
        "Pass labels, return a loss, or give the Trainer a compute_loss_func",
    )


def maybe_loss(outputs: Any) -> Tensor | None:
    """The loss in what a model returned, or None."""
    if isinstance(outputs, torch.Tensor):
        return outputs if outputs.dim() == 0 else None
    if isinstance(outputs, Mapping):
        found = outputs.get("loss")
    elif hasattr(outputs, "loss"):
        found = outputs.loss
    else:
        found = outputs[0] if isinstance(outputs, list | tuple) and outputs else None
        found = found if isinstance(found, torch.Tensor) and found.dim() == 0 else None
    return found if isinstance(found, torch.Tensor) else None


def predictions_of(outputs: Any, ignored: frozenset[str], *, has_loss: bool) -> Any:
    """What a model returned without the loss; a single part by itself."""
    if isinstance(outputs, torch.Tensor):
        return None if has_loss and outputs.dim() == 0 else outputs
    if is_dataclass(outputs) and not isinstance(outputs, Mapping):
        outputs = {part.name: getattr(outputs, part.name) for part in fields(outputs)}
    elif not isinstance(outputs, Mapping | list | tuple) and hasattr(outputs, "__dict__"):
        outputs = vars(outputs)
    if isinstance(outputs, Mapping):
        kept = [value for name, value in outputs.items() if name not in ignored and name != "loss"]
        kept = [value for value in kept if value is not None]
    else:
        kept = list(outputs[1:] if has_loss else outputs)
    return kept[0] if len(kept) == 1 else tuple(kept)


def keys_to_ignore(model: nn.Module) -> list[str]:
    """Outputs of a model that are no predictions."""
    own = getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", None)
    return ["past_key_values", "cache"] if own is None else list(own)


def smoothed_loss(outputs: Any, labels: Tensor, smoothing: float, *, shift: bool) -> Tensor:
    """Cross entropy with a share of the probability on all classes alike, mean over what is not ignored."""
    logits = outputs["logits"] if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None:
        logits = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, label_smoothing=smoothing)
