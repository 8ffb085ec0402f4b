"""The forward of an evaluation batch: its loss, predictions and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset

from paceline.environment.logging import get_logger
from paceline.errors import DataError
from paceline.trainer.batches.collate import columns_in, label_names_of
from paceline.trainer.loops.losses import ModelCall, count_items, find_labels, maybe_loss, without_labels

if TYPE_CHECKING:
    from torch import Tensor, nn

    from paceline.accelerator.accelerator import Accelerator
    from paceline.trainer.protocol import TrainerHooks

__all__ = ["predict_batch", "warn_of_lost_order", "warn_of_missing_labels"]

logger = get_logger(__name__)


def predict_batch(
    hooks: TrainerHooks,
    call: ModelCall,
    model: nn.Module,
    inputs: Any,
    *,
    loss_only: bool,
    ignore_keys: list[str] | None,
    has_own_loss: bool,
    needs_labels: bool,
    computes_loss: bool,
) -> tuple[Tensor | None, Any, Any]:
    """Loss, predictions and labels of a batch, each None if there is none.

    Args:
        hooks: Computes the loss.
        call: How the model is called.
        model: As prepared.
        inputs: The batch.
        loss_only: Return no predictions and labels.
        ignore_keys: Outputs of the model that are not predictions; None takes what its configuration says.
        has_own_loss: Whether `compute_loss` needs no labels under the names that are known.
        needs_labels: Whether metrics will be computed.
        computes_loss: Whether the loss is computed outside of the model, so that its forward need not take labels.

    Raises:
        DataError: `label_names` was given, and the batch has other labels.
    """
    labels = _labels_of(hooks, inputs, needs_labels=needs_labels)
    if has_own_loss or (labels is not None and (computes_loss or _takes_labels(call, inputs))):
        items = {"num_items_in_batch": count_items(hooks, call, inputs)} if _takes_items(type(hooks)) else {}
        loss, outputs = hooks.compute_loss(model, inputs, return_outputs=True, **items)
    else:
        outputs = call(model, inputs if _takes_labels(call, inputs) else without_labels(inputs))
        loss = maybe_loss(outputs)
    loss = None if loss is None else loss.detach().mean()
    if loss_only:
        return loss, None, None
    has_loss = maybe_loss(outputs) is not None
    return loss, _predictions_of(outputs, _ignored_outputs(hooks.model, ignore_keys), has_loss=has_loss), labels


@lru_cache
def _takes_items(trainer: type[TrainerHooks]) -> bool:
    """Whether `compute_loss` takes `num_items_in_batch`; one that was written for evaluations need not."""
    parameters = signature(trainer.compute_loss).parameters
    return "num_items_in_batch" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _takes_labels(call: ModelCall, inputs: Any) -> bool:
    """Whether the model can be called with this batch as it is."""
    return call.takes_labels or not isinstance(inputs, Mapping) or "labels" not in inputs


def _ignored_outputs(model: nn.Module, ignore_keys: list[str] | None) -> frozenset[str]:
    if ignore_keys is not None:
        return frozenset(ignore_keys)
    config = getattr(model, "config", None)
    return frozenset(getattr(config, "keys_to_ignore_at_inference", ("past_key_values", "cache")))


def _labels_of(hooks: TrainerHooks, inputs: Any, *, needs_labels: bool) -> Any:
    """The labels in a batch, a tuple if there are several; None if there are none."""
    if not hasattr(inputs, "get"):
        return find_labels(inputs, last_is_target=True)
    labels = [inputs.get(name) for name in hooks.label_names]
    if labels and all(label is not None for label in labels):
        if len(labels) == 1:
            return labels[0]
        return tuple(labels)
    # A batch that is only predicted for need not have labels.
    has_others = any(label is not None for label in (*labels, *map(inputs.get, label_names_of(hooks.model))))
    if hooks.args.label_names and (needs_labels or has_others):
        raise DataError(
            f"label_names={hooks.label_names}, and a batch has {columns_in(inputs)}",
            "Neither the loss nor compute_metrics would get the named labels",
            "Give the names of the collated batch, in which `label` is called labels, or leave it out",
        )
    return None


def warn_of_missing_labels(label_names: list[str], inputs: Any) -> None:
    """Warn at the first training batch that evaluations will fail, if their batches have the same entries."""
    missing = [name for name in label_names if hasattr(inputs, "get") and inputs.get(name) is None]
    if missing:
        logger.warning(
            "label_names has %s, and the first training batch has %s: an evaluation whose batches have the same will "
            "fail.", ", ".join(missing), columns_in(inputs),
        )  # fmt: skip


def warn_of_lost_order(accelerator: Accelerator, dataset: Any) -> None:
    """Warn if the ranks share out the items of a stream, so that predictions are gathered in another order."""
    is_shared_out = accelerator.dataloader_config.dispatch_batches is False and accelerator.num_processes > 1
    if is_shared_out and isinstance(dataset, IterableDataset):
        logger.warning(
            "predict: with dispatch_batches=False, %d ranks share out the items of the stream %s, so predictions and "
            "labels are not in its order. Leave dispatch_batches out, or predict for a map-style data set.",
            accelerator.num_processes, type(dataset).__name__,
        )  # fmt: skip


def _predictions_of(outputs: Any, ignored: frozenset[str], *, has_loss: bool) -> Any:
    """A model's outputs without the loss: a single one as it is, several as a tuple."""
    if isinstance(outputs, torch.Tensor):
        if has_loss and outputs.dim() == 0:
            return None
        return outputs
    outputs = _as_mapping(outputs)
    if isinstance(outputs, Mapping):
        kept = [outputs[name] for name in outputs if name not in ignored and name != "loss"]
        kept = [value for value in kept if value is not None]
    else:
        kept = list(outputs[1:] if has_loss else outputs)
    if len(kept) == 1:
        return kept[0]
    return tuple(kept)


def _as_mapping(outputs: Any) -> Any:
    """Attributes of an object as a mapping; mappings and sequences as they are."""
    if isinstance(outputs, Mapping | list | tuple):
        return outputs
    if is_dataclass(outputs):
        return {part.name: getattr(outputs, part.name) for part in fields(outputs)}
    if hasattr(outputs, "__dict__"):
        return vars(outputs)
    return outputs
