"""Evaluation and prediction: every sample once, in bounded memory."""

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
from paceline.trainer.loops.evaluation_outputs import PADDING, KeptBatches, join_ranks, to_numpy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from paceline.trainer.evaluating import Evaluating

__all__ = ["EvalLoopOutput", "EvalPrediction", "EvaluationLoop", "PredictionOutput"]

logger = get_logger(__name__)


@dataclass
class EvalPrediction:
    """What `compute_metrics` gets: arrays of all samples, or of one batch when metrics are streamed.

    Attributes:
        predictions: What the model returned besides the loss.
        label_ids: The labels.
        inputs: What went in, with `include_for_metrics=["inputs"]`.
        losses: One loss a sample, with `include_for_metrics=["loss"]`.
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
    """Everything that an evaluation found; `num_samples` is 0 where a loader collates by itself and tells no number."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]
    num_samples: int


class PredictionOutput(NamedTuple):
    """What `predict` returns."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]


class EvaluationLoop:
    """One pass over a loader without gradients.

    Args:
        trainer: Whose steps and metrics.
        model: As prepared.
        loader: As prepared.
        prefix: Before the names of metrics.
        loss_only: Keep no predictions.
        ignore_keys: Outputs of the model that are no predictions.
        measures: Whether it is for the metrics: then they must be called.
    """

    def __init__(
        self,
        trainer: Evaluating,
        model: nn.Module,
        loader: Any,
        *,
        prefix: str,
        loss_only: bool,
        ignore_keys: list[str] | None,
        measures: bool,
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.loader = loader
        self.prefix = prefix
        self.loss_only = loss_only
        self.ignore_keys = ignore_keys
        self.measures = measures
        self.args = trainer.args
        self.accelerator = trainer.accelerator
        self.metric = trainer.compute_metrics
        self.kept = KeptBatches(self.args.eval_accumulation_steps)
        self.loss_sum: Tensor | None = None
        self.weight_sum: Tensor | None = None
        self.num_samples = 0
        self.said = False
        self.streamed: dict[str, float] = {}

    @property
    def _streams(self) -> bool:
        return self.metric is not None and (self.args.batch_eval_metrics or hasattr(self.metric, "update"))

    def run(self) -> EvalLoopOutput:
        """Evaluate. Collective: every rank must call it."""
        begun = time.perf_counter()
        self.model.eval()
        batches = 0
        # Whole samples are dealt out: nothing is cut out of a batch that was collated, and all ranks have as many
        # batches, as others may wait for what happens inside the model.
        with torch.no_grad(), self.loader.dealing(even=True, fill=False):
            for inputs in self.loader:
                self._batch(inputs)
                batches += 1
                self.trainer.fire("on_prediction_step")
        kept = None if self._streams else self.kept.everything(concatenate=self.args.eval_do_concat_batches)
        metrics = self._metrics(kept)
        took = max(time.perf_counter() - begun, 1e-9)
        metrics |= {"runtime": took, "steps_per_second": batches / took}
        if self.num_samples:
            metrics["samples_per_second"] = self.num_samples / took
        named = {
            name if name.startswith(f"{self.prefix}_") else f"{self.prefix}_{name}": v for name, v in metrics.items()
        }
        prediction, labels = (None, None) if kept is None else _both(kept)
        return EvalLoopOutput(prediction, labels, named, self.num_samples)

    def _batch(self, inputs: Any) -> None:
        counts = self.loader.counts
        rank = self.accelerator.process_index
        # A rank that has no sample left takes part with a batch of others, which counts for nothing.
        rows, real = counts.rows[rank], counts.real[rank]
        samples = sum(counts.real) if counts.counted else None
        self.num_samples += samples or 0
        # Before the step: a `compute_loss` of one's own may take the labels out.
        items = self.trainer.count_items(inputs)
        loss, logits, labels = self.trainer.prediction_step(self.model, inputs, self.loss_only, self.ignore_keys)
        if loss is not None:
            self._add_loss(loss, items, real)
        if self.loss_only:
            return
        if labels is None and self.metric is not None:
            self._cannot_measure(inputs)
        process = self.trainer.preprocess_logits_for_metrics
        if process is not None and logits is not None:
            logits = process(logits, labels)
        wanted = {"predictions": logits, "label_ids": labels, **self._extras(inputs, loss, rows)}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        self._keep(self._gather(wanted), samples)

    def _cannot_measure(self, inputs: Any) -> None:
        """Raise in an evaluation that has no labels; say it once where predictions alone were asked for."""
        names = self.trainer.label_names
        saw = f"compute_metrics was given, and a batch has {columns_in(inputs)}"
        if not self.measures:
            if not self.said:
                logger.warning("%s: it is not called, for label_names is %s.", saw, names)
            self.said = True
            return
        raise DataError(
            saw,
            f"It is called with labels, and label_names is {names}",
            "Write label_names with what holds them (where there are several, all must be there), let the "
            "data_collator bring them, or leave compute_metrics out",
        )

    def _extras(self, inputs: Any, loss: Tensor | None, rows: int) -> dict[str, Any]:
        asked = self.args.include_for_metrics
        extras: dict[str, Any] = {}
        if "inputs" in asked:
            name = getattr(self.trainer.model, "main_input_name", "input_ids")
            is_mapping = isinstance(inputs, Mapping)
            extras["inputs"] = inputs.get(name, next(iter(inputs.values()))) if is_mapping else inputs[0]
        if "loss" in asked and loss is not None:
            extras["losses"] = loss.mean().expand(rows).clone()
        return extras

    def _add_loss(self, loss: Tensor, weight: Tensor | None, real: int) -> None:
        mean = loss.detach().float().mean()
        if weight is None:
            weight = torch.full((), real, device=mean.device)
        if real == 0:
            weight = torch.zeros_like(weight)
        weight = weight.to(torch.float64 if mean.device.type == "cpu" else torch.float32)
        part = torch.where(weight > 0, mean * weight, 0.0)
        self.loss_sum = part if self.loss_sum is None else self.loss_sum + part
        self.weight_sum = weight if self.weight_sum is None else self.weight_sum + weight

    def _gather(self, wanted: dict[str, Any]) -> dict[str, Any]:
        as_objects = self.args.eval_use_gather_object
        gathered: dict[str, Any] = self.accelerator.gather_for_metrics(wanted, as_objects, pad_index=PADDING)
        return join_ranks(wanted, gathered) if as_objects else gathered

    def _keep(self, gathered: dict[str, Any], samples: int | None) -> None:
        if not self._streams:
            self.kept.add(gathered, samples)
            return
        prediction = _as_prediction(map_leaves(to_numpy, gathered))
        metric: Any = self.metric
        if hasattr(metric, "update"):
            metric.update(prediction)
        else:
            self.streamed = metric(prediction, compute_result=self.loader.end_of_dataloader) or {}

    def _metrics(self, kept: Any) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if self.loss_sum is not None and self.weight_sum is not None:
            total, weight = self.accelerator.reduce(torch.stack([self.loss_sum, self.weight_sum]), "sum").tolist()
            metrics["loss"] = total / weight if weight else float("nan")
        metric: Any = self.metric
        found: Any = {}
        if metric is None:
            pass
        elif self._streams:
            found = metric.compute() if hasattr(metric, "compute") else self.streamed
        elif kept is not None and "label_ids" in (kept if isinstance(kept, dict) else kept[0]):
            found = metric(_as_prediction(kept))
        if not isinstance(found, Mapping):
            what, why = f"compute_metrics returned a {type(found).__name__}", "Metrics are names and numbers"
            raise PacelineError(what, why, "Return a dictionary")
        return {**metrics, **{name: _number(value) for name, value in found.items()}}


def _both(kept: Any) -> tuple[Any, Any]:
    """Predictions and labels, from a structure or from a list of them."""
    if isinstance(kept, dict):
        return kept.get("predictions"), kept.get("label_ids")
    return [part.get("predictions") for part in kept], [part.get("label_ids") for part in kept]


def _as_prediction(kept: Any) -> EvalPrediction:
    prediction, labels = _both(kept)
    if not isinstance(kept, dict):
        return EvalPrediction(prediction, labels)
    return EvalPrediction(prediction, labels, kept.get("inputs"), kept.get("losses"))


def _number(value: Any) -> Any:
    """A metric as JSON can hold it."""
    return value.item() if isinstance(value, torch.Tensor | np.generic) or _is_scalar_array(value) else value


def _is_scalar_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 0
