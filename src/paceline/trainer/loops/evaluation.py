"""Evaluation and prediction: every sample once, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from paceline.errors import PacelineError
from paceline.trainer.batches.nested import first_rows, is_structure, leaves_of, like, map_leaves, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from paceline.trainer.evaluating import Evaluating

__all__ = ["EvalLoopOutput", "EvalPrediction", "EvaluationLoop", "PredictionOutput"]

PADDING = -100
_DEVICE_BYTES = 256 * 2**20


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
    """Everything that an evaluation found."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]
    num_samples: int


class PredictionOutput(NamedTuple):
    """What `predict` returns."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]


@dataclass
class _Kept:
    """Predictions of the batches so far: the newest on the device, the others in host memory."""

    every: int | None
    waiting: list[Any] = field(default_factory=list)
    stored: list[Any] = field(default_factory=list)
    bytes_waiting: int = 0

    def add(self, value: Any) -> None:
        """Keep one batch; move to host memory what has become too much."""
        self.waiting.append(value)
        self.bytes_waiting += sum(t.numel() * t.element_size() for t in leaves_of(value) if isinstance(t, torch.Tensor))
        if self.bytes_waiting > _DEVICE_BYTES or (self.every is not None and len(self.waiting) >= self.every):
            self.move()

    def move(self) -> None:
        """Move everything to host memory."""
        self.stored += [map_leaves(_to_numpy, value) for value in self.waiting]
        self.waiting.clear()
        self.bytes_waiting = 0

    def everything(self, *, concatenate: bool) -> Any:
        """All batches as one structure of arrays, or as a list of structures."""
        self.move()
        if not self.stored:
            return None
        return _concatenate(self.stored) if concatenate else self.stored


class EvaluationLoop:
    """One pass over a loader without gradients.

    Args:
        trainer: Whose steps and metrics.
        model: As prepared.
        loader: As prepared.
        prefix: Before the names of metrics.
        loss_only: Keep no predictions.
        ignore_keys: Outputs of the model that are no predictions.
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
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.loader = loader
        self.prefix = prefix
        self.loss_only = loss_only
        self.ignore_keys = ignore_keys
        self.args = trainer.args
        self.accelerator = trainer.accelerator
        self.metric = trainer.compute_metrics
        self.kept = _Kept(self.args.eval_accumulation_steps)
        self.loss_sum: Tensor | None = None
        self.weight_sum: Tensor | None = None
        self.num_samples = 0
        self.streamed: dict[str, float] = {}

    @property
    def _streams(self) -> bool:
        return self.metric is not None and (self.args.batch_eval_metrics or hasattr(self.metric, "update"))

    def run(self) -> EvalLoopOutput:
        """Evaluate. Collective: every rank must call it."""
        begun = time.perf_counter()
        self.model.eval()
        batches = 0
        with torch.no_grad():
            for inputs in self.loader:
                self._batch(inputs)
                batches += 1
                self.trainer.fire("on_prediction_step")
        metrics = self._metrics()
        took = max(time.perf_counter() - begun, 1e-9)
        metrics |= {
            "runtime": took,
            "samples_per_second": self.num_samples / took,
            "steps_per_second": batches / took,
        }
        kept = self.kept.everything(concatenate=self.args.eval_do_concat_batches) if not self._streams else None
        named = {
            name if name.startswith(f"{self.prefix}_") else f"{self.prefix}_{name}": v for name, v in metrics.items()
        }
        prediction, labels = (None, None) if kept is None else _both(kept)
        return EvalLoopOutput(prediction, labels, named, self.num_samples)

    def _batch(self, inputs: Any) -> None:
        counts = self.loader.counts
        rank = self.accelerator.process_index
        rows, real = counts.rows[rank], counts.real[rank]
        self.num_samples += sum(counts.real)
        # What filled up the last batch must not enter the model's own mean. A rank with padding alone still takes
        # part, for others may wait for it.
        shorter = 0 < real < rows
        if shorter:
            inputs = first_rows(inputs, real, rows)
        # Before the step: a `compute_loss` of one's own may take the labels out.
        items = self.trainer.count_items(inputs)
        loss, logits, labels = self.trainer.prediction_step(self.model, inputs, self.loss_only, self.ignore_keys)
        if loss is not None:
            self._add_loss(loss, items, real)
        if self.loss_only:
            return
        process = self.trainer.preprocess_logits_for_metrics
        if process is not None and logits is not None:
            logits = process(logits, labels)
        wanted = {"predictions": logits, "label_ids": labels, **self._extras(inputs, loss, real if shorter else rows)}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        if shorter:
            wanted = map_leaves(lambda value: _refill(value, rows) if rows_of(value) == real else value, wanted)
        self._keep(self._gather(wanted))

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
        if self.accelerator.num_processes > 1 and not self.args.eval_use_gather_object:
            wanted = map_leaves(self._pad, wanted)
        gathered: dict[str, Any] = self.accelerator.gather_for_metrics(wanted, self.args.eval_use_gather_object)
        return gathered

    def _pad(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            return self.accelerator.pad_across_processes(value, dim=1, pad_index=PADDING)
        return value

    def _keep(self, gathered: dict[str, Any]) -> None:
        if not self._streams:
            self.kept.add(gathered)
            return
        prediction = _as_prediction(map_leaves(_to_numpy, gathered))
        metric: Any = self.metric
        if hasattr(metric, "update"):
            metric.update(prediction)
        else:
            self.streamed = metric(prediction, compute_result=self.loader.end_of_dataloader) or {}

    def _metrics(self) -> dict[str, float]:
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
        elif not self.loss_only:
            kept = self.kept.everything(concatenate=self.args.eval_do_concat_batches)
            if kept is not None and "label_ids" in (kept if isinstance(kept, dict) else kept[0]):
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


def _refill(value: Any, rows: int) -> Any:
    """Give what was computed on the real rows the size of the whole batch again."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value, value.new_zeros((rows - value.shape[0], *value.shape[1:]))])
    return type(value)([*value, *[value[-1]] * (rows - len(value))])


def _to_numpy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _concatenate(parts: list[Any]) -> Any:
    """One structure from those of all batches; what differs in length is padded with -100."""
    first = parts[0]
    if isinstance(first, Mapping):
        return {name: _concatenate([part[name] for part in parts]) for name in first}
    if isinstance(first, tuple | list) and any(is_structure(part) for part in first):
        return like(first, [_concatenate(list(column)) for column in zip(*parts, strict=True)])
    if not isinstance(first, np.ndarray):
        return [entry for part in parts for entry in (part if isinstance(part, list | tuple) else [part])]
    if first.ndim > 1 and len({part.shape[1] for part in parts}) > 1:
        width = max(part.shape[1] for part in parts)
        parts = [_widen(part, width) for part in parts]
    return np.concatenate([np.atleast_1d(part) for part in parts])


def _widen(part: Any, width: int) -> Any:
    room = [(0, 0), (0, width - part.shape[1]), *[(0, 0)] * (part.ndim - 2)]
    return np.pad(part, room, constant_values=PADDING)


def _number(value: Any) -> Any:
    """A metric as JSON can hold it."""
    return value.item() if isinstance(value, torch.Tensor | np.generic) or _is_scalar_array(value) else value


def _is_scalar_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 0
