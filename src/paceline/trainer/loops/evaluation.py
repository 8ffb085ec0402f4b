"""The evaluation loop: every sample once, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from paceline.environment.logging import get_logger
from paceline.errors import DataError, PacelineError
from paceline.trainer.batches.collate import columns_in
from paceline.trainer.batches.nested import map_leaves
from paceline.trainer.callbacks.base import fire
from paceline.trainer.loops.evaluation_outputs import PADDING, KeptBatches, join_ranks, to_numpy
from paceline.trainer.loops.losses import LoopInputs, count_items

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["EvalLoopOutput", "EvalPrediction", "EvaluationLoop", "PredictionOutput"]

logger = get_logger(__name__)


@dataclass
class EvalPrediction:
    """What `compute_metrics` gets: arrays of all samples.

    With `batch_eval_metrics`, these are tensors on the device, of one batch; a metric object with `update` gets arrays
    of one batch.

    Attributes:
        predictions: The model's outputs besides the loss; one array, or a tuple of several. Padded with -100 along
            dimension 1 where batches differ.
        label_ids: The labels, likewise.
        inputs: The model's main input, with `include_for_metrics=["inputs"]`.
        losses: A loss per sample, shape [N], with `include_for_metrics=["loss"]`.
    """

    predictions: Any
    label_ids: Any
    inputs: Any = None
    losses: Any = None

    def __iter__(self) -> Iterator[Any]:
        parts = (self.predictions, self.label_ids, self.inputs, self.losses)
        yield from parts[:2]
        yield from (part for part in parts[2:] if part is not None)

    def __getitem__(self, index: int) -> Any:
        return tuple(self)[index]


class EvalLoopOutput(NamedTuple):
    """What `evaluation_loop` returns.

    Attributes:
        predictions: The model's outputs besides the loss; None if only the loss was computed.
        label_ids: The labels; None if only the loss was computed.
        metrics: Metrics and times, named with the prefix.
        num_samples: Samples over all ranks; 0 if the loader does not batch by itself (`batch_size=None`).
    """

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]
    num_samples: int


class PredictionOutput(NamedTuple):
    """What `predict` returns.

    Attributes:
        predictions: The model's outputs besides the loss, in the order of the data set.
        label_ids: The labels; None without labels.
        metrics: Metrics and times, named with the prefix.
    """

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]


class EvaluationLoop:
    """One pass over a loader without gradients.

    Args:
        inputs: What it runs on.
        prefix: Prepended to the names of metrics.
        loss_only: Keep no predictions.
        requires_metrics: Raise if metrics cannot be computed for want of labels; else warn.
    """

    def __init__(self, inputs: LoopInputs, *, prefix: str, loss_only: bool, requires_metrics: bool) -> None:
        self.hooks = hooks = inputs.hooks
        self.call = inputs.call
        self.model = inputs.model
        self.loader = inputs.loader
        self.ignore_keys = inputs.ignore_keys
        self.prefix = prefix
        self.loss_only = loss_only
        self.requires_metrics = requires_metrics
        self.args = hooks.args
        self.accelerator = hooks.accelerator
        self.metric = hooks.compute_metrics
        self.stored = KeptBatches(self.args.eval_accumulation_steps)
        # Of the losses, of their weights, and of the batches without a finite loss: shape [3].
        self.loss_sums: Tensor | None = None
        self.num_samples = 0
        self._has_warned = False
        self.streamed: dict[str, float] = {}
        # What was asked for by `predict` is kept, even if metrics do not need it.
        self._keeps_outputs = not (self._streams and requires_metrics)
        self._has_streamed = False

    @property
    def _streams(self) -> bool:
        return self.metric is not None and (self.args.batch_eval_metrics or hasattr(self.metric, "update"))

    def run(self) -> EvalLoopOutput:
        """Evaluate. Collective: every rank must call it."""
        started = time.perf_counter()
        self.model.eval()
        batches = 0
        # Whole samples are dealt to ranks, since nothing can be cut out of a collated batch; and every rank gets the
        # same number of batches, because the model may contain collectives.
        with torch.no_grad(), self.loader.dealing(even=True, fill=False):
            for inputs in self.loader:
                self._batch(inputs)
                batches += 1
                fire(self.hooks, "on_prediction_step")
        stored = None
        if self._keeps_outputs:
            stored = self.stored.everything(concatenate=self.args.eval_do_concat_batches)
        metrics = self._metrics(stored)
        seconds = max(time.perf_counter() - started, 1e-9)
        metrics |= {"runtime": seconds, "steps_per_second": batches / seconds}
        if self.num_samples:
            metrics["samples_per_second"] = self.num_samples / seconds
        named = {self._prefixed(name): value for name, value in metrics.items()}
        predictions, labels = (None, None) if stored is None else _predictions_and_labels(stored)
        return EvalLoopOutput(predictions, labels, named, self.num_samples)

    def _prefixed(self, name: str) -> str:
        if name.startswith(f"{self.prefix}_"):
            return name
        return f"{self.prefix}_{name}"

    def _batch(self, inputs: Any) -> None:
        counts = self.loader.counts
        rank = self.accelerator.process_index
        # A rank without samples left gets a batch of other samples, which is not counted.
        rows, real = counts.rows[rank], counts.real[rank]
        samples = None
        if counts.counted:
            samples = sum(counts.real)
        self.num_samples += samples or 0
        # Before the step, because an overridden `compute_loss` may pop the labels.
        items = count_items(self.hooks, self.call, inputs)
        loss, logits, labels = self.hooks.prediction_step(self.model, inputs, self.loss_only, self.ignore_keys)
        if loss is not None:
            self._add_loss(loss, items, real)
        if self.loss_only:
            return
        if labels is None and self.metric is not None:
            self._report_missing_labels(inputs)
        process = self.hooks.preprocess_logits_for_metrics
        if process is not None and logits is not None:
            logits = process(logits, labels)
        outputs = {"predictions": logits, "label_ids": labels, **self._extras(inputs, loss, rows)}
        outputs = {name: value for name, value in outputs.items() if value is not None}
        self._store(self._gather(outputs), samples)

    def _report_missing_labels(self, inputs: Any) -> None:
        """Raise in an evaluation without labels; warn once if only predictions were requested."""
        names = self.hooks.label_names
        saw = f"compute_metrics was given, and a batch has {columns_in(inputs)}"
        if self.requires_metrics:
            raise DataError(
                saw,
                f"It needs labels, and label_names is {names}",
                "Set label_names to the entries that contain them (all of them must be in the batch), let the "
                "data_collator add them, or leave compute_metrics out",
            )
        if not self._has_warned:
            logger.warning("%s: it is not called, because label_names is %s.", saw, names)
        self._has_warned = True

    def _extras(self, inputs: Any, loss: Tensor | None, rows: int) -> dict[str, Any]:
        requested = self.args.include_for_metrics
        extras: dict[str, Any] = {}
        if "inputs" in requested:
            name = getattr(self.hooks.model, "main_input_name", "input_ids")
            is_mapping = isinstance(inputs, Mapping)
            extras["inputs"] = inputs.get(name, next(iter(inputs.values()))) if is_mapping else inputs[0]
        if "loss" in requested and loss is not None:
            extras["losses"] = loss.mean().expand(rows).clone()
        return extras

    def _add_loss(self, loss: Tensor, weight: Tensor | None, real: int) -> None:
        mean = loss.detach().float().mean()
        if weight is None:
            weight = torch.full((), real, device=mean.device)
        if real == 0:
            weight = torch.zeros_like(weight)
        weight = weight.to(torch.float64 if mean.device.type == "cpu" else torch.float32)
        left_out = torch.zeros_like(weight)
        if self.args.logging_nan_inf_filter:
            left_out = (~torch.isfinite(mean) & (weight > 0)).to(weight.dtype)
            weight = weight * (1 - left_out)
        sums = torch.stack([torch.where(weight > 0, mean * weight, 0.0), weight, left_out])
        self.loss_sums = sums if self.loss_sums is None else self.loss_sums + sums

    def _gather(self, outputs: dict[str, Any]) -> dict[str, Any]:
        as_objects = self.args.eval_use_gather_object
        gathered: dict[str, Any] = self.accelerator.gather_for_metrics(outputs, as_objects, pad_index=PADDING)
        return join_ranks(outputs, gathered) if as_objects else gathered

    def _store(self, gathered: dict[str, Any], samples: int | None) -> None:
        if self._keeps_outputs:
            self.stored.add(gathered, samples)
        if not self._streams or "label_ids" not in gathered:
            return
        self._has_streamed = True
        metric: Any = self.metric
        if hasattr(metric, "update"):
            metric.update(_as_prediction(map_leaves(to_numpy, gathered)))
        else:
            prediction = _as_prediction(gathered)
            self.streamed = metric(prediction, compute_result=self.loader.end_of_dataloader) or {}

    def _metrics(self, stored: Any) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if self.loss_sums is not None:
            total, weight, left_out = self.accelerator.reduce(self.loss_sums, "sum").tolist()
            metrics["loss"] = total / weight if weight else float("nan")
            if left_out and weight:
                logger.warning(
                    "%d batches of the evaluation have no finite loss and are left out of its mean; "
                    "logging_nan_inf_filter=False keeps them.",
                    left_out,
                )
        computed = self._computed_metrics(stored)
        if not isinstance(computed, Mapping):
            what, why = f"compute_metrics returned a {type(computed).__name__}", "Metrics are names and numbers"
            raise PacelineError(what, why, "Return a dictionary")
        return {**metrics, **{name: _as_number(value) for name, value in computed.items()}}

    def _computed_metrics(self, stored: Any) -> Any:
        """What `compute_metrics` returns; nothing if it cannot be called."""
        metric: Any = self.metric
        if metric is None:
            return {}
        if self._streams:
            if hasattr(metric, "compute") and self._has_streamed:
                return metric.compute()
            return self.streamed
        if stored is None:
            return {}
        first = stored
        if not isinstance(stored, dict):
            first = stored[0]
        if "label_ids" in first:
            return metric(_as_prediction(stored))
        return {}


def _predictions_and_labels(stored: Any) -> tuple[Any, Any]:
    """Predictions and labels of all batches together, or as lists with an entry per batch."""
    if isinstance(stored, dict):
        return stored.get("predictions"), stored.get("label_ids")
    return [part.get("predictions") for part in stored], [part.get("label_ids") for part in stored]


def _as_prediction(stored: Any) -> EvalPrediction:
    predictions, labels = _predictions_and_labels(stored)
    if not isinstance(stored, dict):
        return EvalPrediction(predictions, labels)
    return EvalPrediction(predictions, labels, stored.get("inputs"), stored.get("losses"))


def _as_number(value: Any) -> Any:
    """A metric as JSON value."""
    if isinstance(value, torch.Tensor | np.generic) or _is_scalar_array(value):
        return value.item()
    return value


def _is_scalar_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 0
