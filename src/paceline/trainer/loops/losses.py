"""How a model is called, its loss, and the number of targets that the loss is over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from paceline.errors import PacelineError
from paceline.trainer.batches.collate import IGNORED, forward_parameters

if TYPE_CHECKING:
    from collections.abc import Callable
    from inspect import Parameter

    from torch import Tensor, nn

    from paceline.trainer.protocol import TrainerHooks

__all__ = [
    "IGNORED",
    "LoopInputs",
    "ModelCall",
    "compute_loss",
    "count_items",
    "find_labels",
    "maybe_loss",
    "without_labels",
]


@dataclass(frozen=True, slots=True)
class LoopInputs:
    """What a training or an evaluation loop runs on.

    Attributes:
        hooks: The Trainer's steps, state and callbacks.
        call: Counts the targets of a batch.
        model: As prepared.
        loader: As prepared.
        ignore_keys: Outputs of the model that are not predictions; None takes what its configuration says.
    """

    hooks: TrainerHooks
    call: ModelCall
    model: nn.Module
    loader: Any
    ignore_keys: list[str] | None


class ModelCall:
    """How a model is called, looked up once from its signature.

    Args:
        model: Not wrapped.
        packed: Whether rows hold several sequences.

    Attributes:
        takes_num_items: Whether its forward takes `num_items_in_batch` and divides the summed loss by it.
        shifts_labels: Whether it predicts the next token, so that the first label is not a target.
        requires_labels: Whether its forward cannot be called without labels.
        takes_labels: Whether its forward can be called with the keyword `labels`.
    """

    def __init__(self, model: nn.Module, *, packed: bool = False) -> None:
        parameters = forward_parameters(model)
        self.takes_num_items = _takes_num_items(model, parameters)
        config = getattr(model, "config", None)
        self.shifts_labels = _is_causal(model) and not getattr(config, "is_encoder_decoder", False)
        labels = parameters.get("labels")
        self.takes_labels = labels is not None or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        # The keys and values that generating needs cost memory here, and compiled blocks are compiled again for each
        # layer. With them, models of transformers also take a packed row for one sequence, whatever its positions say.
        caches = getattr(config, "use_cache", False) and "use_cache" in parameters
        self._extra = {"use_cache": False} if caches or (packed and hasattr(config, "use_cache")) else {}
        self.requires_labels = labels is not None and labels.default is labels.empty

    def __call__(self, model: nn.Module, inputs: Any, num_items: Tensor | None = None) -> Any:
        """Call a model: a mapping becomes keywords, a sequence positional arguments, anything else one argument."""
        more: dict[str, Any] = dict(self._extra)
        if self.takes_num_items and num_items is not None:
            more["num_items_in_batch"] = num_items.clamp(min=1)
        if isinstance(inputs, Mapping):
            return model(**inputs, **more)
        if isinstance(inputs, list | tuple):
            return model(*inputs, **more)
        return model(inputs, **more)

    def count_items(self, inputs: Any, *, last_is_target: bool) -> Tensor | None:
        """The number of targets in a micro-batch, shape []; None without labels.

        Args:
            inputs: The micro-batch.
            last_is_target: Whether the last element of a sequence is the labels.
        """
        shifted = None
        if hasattr(inputs, "get"):
            shifted = inputs.get("shift_labels")
        if shifted is not None:
            count: Tensor = shifted.ne(IGNORED).sum()
            return count
        return self.count_labels(find_labels(inputs, last_is_target=last_is_target))

    def count_labels(self, labels: Any) -> Tensor | None:
        """The number of targets among labels, shape []; None if they are not a tensor."""
        if not isinstance(labels, torch.Tensor):
            return None
        if labels.is_floating_point():
            return torch.full((), labels.numel(), dtype=torch.int64, device=labels.device)
        if self.shifts_labels and labels.dim() > 1:
            labels = labels[..., 1:]
        count: Tensor = labels.ne(IGNORED).sum()
        return count


def _takes_num_items(model: nn.Module, parameters: Mapping[str, Parameter]) -> bool:
    """Whether a forward with these parameters takes `num_items_in_batch`."""
    explicit = getattr(model, "accepts_loss_kwargs", None)
    if explicit is not None:
        return bool(explicit)
    is_transformers = hasattr(model, "main_input_name") and hasattr(model, "loss_function")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return "num_items_in_batch" in parameters or (is_transformers and takes_any)


def _is_causal(model: nn.Module) -> bool:
    """Whether a model of transformers predicts the next token."""
    if str(getattr(model, "loss_type", "")).startswith("ForCausalLM"):
        return True
    # Older ones, such as GPT-2, name no type and use the same loss. So do others that compute theirs themselves.
    adapted: Any = model
    base = adapted.get_base_model() if hasattr(model, "get_base_model") else model
    has_default_loss = getattr(getattr(base, "loss_function", None), "__name__", "") == "ForCausalLMLoss"
    return has_default_loss and type(base).__name__.endswith("LMHeadModel")


def count_items(hooks: TrainerHooks, call: ModelCall, inputs: Any) -> Tensor | None:
    """The targets by which a batch's loss is weighted, shape []; None if batches are to weigh the same."""
    if not hooks.args.average_tokens_across_devices:
        return None
    return call.count_items(inputs, last_is_target=hooks.compute_loss_func is not None)


def compute_loss(
    call: ModelCall,
    model: nn.Module,
    inputs: Any,
    *,
    loss_function: Callable[..., Tensor] | None,
    label_smoothing: float,
    num_items: Tensor | None,
) -> tuple[Tensor, Any]:
    """The loss of a micro-batch, as mean over its targets, shape [], and the model's outputs.

    Args:
        call: How the model is called.
        model: As prepared.
        inputs: The micro-batch.
        loss_function: Computes the loss from outputs and labels instead of the model.
        label_smoothing: From 0 to 1; the loss is computed here instead of by the model if it is above 0.
        num_items: The number of targets, for models and functions that divide a summed loss by it.

    Raises:
        PacelineError: The model returned no loss, or there are no labels to smooth.
    """
    labels = find_labels(inputs, last_is_target=loss_function is not None)
    is_separate = labels is not None and (loss_function is not None or label_smoothing > 0)
    is_unknown = not call.takes_labels and isinstance(inputs, Mapping)
    if is_unknown or (is_separate and not call.requires_labels):
        inputs = without_labels(inputs)
    outputs = call(model, inputs, None if is_separate else num_items)
    if loss_function is not None:
        # A function that divides a sum needs the count also where losses are not weighted by it.
        count = call.count_labels(labels) if num_items is None else num_items
        return loss_function(outputs, labels, num_items_in_batch=_at_least_one(count)), outputs
    if is_separate:
        return _smoothed_loss(outputs, labels, label_smoothing, shift=call.shifts_labels), outputs
    if label_smoothing > 0:
        raise PacelineError(
            f"label_smoothing_factor={label_smoothing}, and the batch has no 'labels'",
            "The model would compute the loss itself, without smoothing",
            "Call them labels in a mapping, or leave the factor out",
        )
    return _loss_of(outputs), outputs


def find_labels(inputs: Any, *, last_is_target: bool) -> Any:
    """The labels in a batch: the entry `labels` of a mapping, or the last element of a sequence; None if absent."""
    if isinstance(inputs, Mapping):
        return inputs.get("labels")
    if last_is_target and isinstance(inputs, list | tuple) and len(inputs) > 1:
        return inputs[-1]
    return None


def _at_least_one(count: Tensor | None) -> Tensor | None:
    return None if count is None else count.clamp(min=1)


def without_labels(inputs: Any) -> Any:
    """A batch without its entry `labels`, or without the last element of a sequence."""
    if isinstance(inputs, Mapping):
        return {name: value for name, value in inputs.items() if name != "labels"}
    return inputs[:-1]


def _loss_of(outputs: Any) -> Tensor:
    """The loss in a model's outputs.

    Raises:
        PacelineError: There is none.
    """
    loss = maybe_loss(outputs)
    if loss is not None:
        return loss
    names = ""
    if isinstance(outputs, Mapping):
        names = f"with {', '.join(map(str, outputs))}"
    raise PacelineError(
        f"The model returned a {type(outputs).__name__} {names}".rstrip(),
        "It contains no loss to train on",
        "Pass labels, return a loss, or give the Trainer a compute_loss_func",
    )


def maybe_loss(outputs: Any) -> Tensor | None:
    """The loss in a model's outputs: `loss`, the first of a tuple, or the only tensor; None if there is none."""
    if isinstance(outputs, torch.Tensor):
        if outputs.dim() == 0:
            return outputs
        return None
    loss = None
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    elif hasattr(outputs, "loss"):
        loss = outputs.loss
    elif isinstance(outputs, list | tuple) and outputs and getattr(outputs[0], "ndim", None) == 0:
        loss = outputs[0]
    if isinstance(loss, torch.Tensor):
        return loss
    return None


def _smoothed_loss(outputs: Any, labels: Tensor, smoothing: float, *, shift: bool) -> Tensor:
    """Cross entropy with label smoothing, mean over the targets."""
    logits = outputs["logits"] if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None:
        logits = outputs
        if not isinstance(outputs, torch.Tensor):
            logits = outputs[0]
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, label_smoothing=smoothing)
