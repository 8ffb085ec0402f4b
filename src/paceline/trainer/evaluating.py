"""How a Trainer evaluates and predicts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paceline.environment.logging import get_logger
from paceline.errors import DataError, PacelineError
from paceline.trainer import model_files as saving
from paceline.trainer.batches.collate import columns_in, label_names_of
from paceline.trainer.callbacks import best_checkpoint as best
from paceline.trainer.core import TrainerCore
from paceline.trainer.feeding import Feeding
from paceline.trainer.loops import losses
from paceline.trainer.loops.evaluation import EvalLoopOutput, EvaluationLoop, PredictionOutput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


__all__ = ["Evaluating"]

logger = get_logger(__name__)


class Evaluating(Feeding):
    """Evaluates and predicts."""

    # Whether an evaluation is going on, for which there must be labels.
    _measures = False

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the loss and the metrics. Collective: every rank must call it.

        Args:
            eval_dataset: A data set, the name of one of several, or a mapping of several; the Trainer's own when
                left out.
            ignore_keys: Outputs of the model that are no predictions.
            metric_key_prefix: Before the metrics' names; several sets add their own names.
        """
        given = eval_dataset is not None
        dataset = eval_dataset if given else self.eval_dataset
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part if given else name, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        loader = self.get_eval_dataloader(eval_dataset)
        output = self.evaluation_loop(loader, metric_key_prefix=metric_key_prefix, ignore_keys=ignore_keys)
        self.log(output.metrics)
        self.fire("on_evaluate", metrics=output.metrics)
        return output.metrics

    def evaluate_in_training(self) -> dict[str, float]:
        """Evaluate, and let a schedule that follows the metric move."""
        metrics = self.evaluate(ignore_keys=self._ignore_keys)
        if self.scheduler_follows_metric:
            name = self.args.metric_for_best_model or "loss"
            self.lr_scheduler.step(metrics[name if name.startswith("eval_") else f"eval_{name}"])
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predict for every sample of a data set, in its order. Collective: every rank must call it."""
        loader = self.get_test_dataloader(test_dataset)
        output = self.evaluation_loop(
            loader, metric_key_prefix=metric_key_prefix, ignore_keys=ignore_keys, prediction_loss_only=False
        )
        self.fire("on_predict", metrics=output.metrics)
        return PredictionOutput(output.predictions, output.label_ids, output.metrics)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str = "",
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """One pass over a loader without gradients; `evaluate` and `predict` are made of it. Collective."""
        dataloader = self._as_prepared(dataloader)
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        # Who says it asks for predictions or for the loss: an evaluation leaves it to the arguments, and measures.
        self._measures = prediction_loss_only is None
        if self._measures and self.compute_metrics is None:
            loss_only = True
        self.callback_handler.things["eval_dataloader"] = dataloader
        self._switch_optimizer("eval")
        try:
            model = self._model_for_evaluation()
            loop = EvaluationLoop(
                self,
                model,
                dataloader,
                prefix=metric_key_prefix,
                loss_only=loss_only,
                ignore_keys=ignore_keys,
                measures=self._measures,
            )
            return loop.run()
        finally:
            self._switch_optimizer("train")

    def _switch_optimizer(self, mode: str) -> None:
        """Schedule-free optimizers keep other weights for evaluation."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.is_in_train and callable(getattr(inner, mode, None)):
            getattr(inner, mode)()

    def _model_for_evaluation(self) -> nn.Module:
        if self.model_wrapped is self.model and not self.is_in_train:
            args = self.args
            dtype = torch.bfloat16 if args.bf16_full_eval else torch.float16 if args.fp16_full_eval else None
            if dtype is not None:
                self.model.to(dtype)
            return self.accelerator.prepare_model(self.model, evaluation_mode=True)
        return self.model_wrapped

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Forward of one batch without gradients: (loss, predictions, labels), each None where there is none."""
        inputs = self._prepare_inputs(inputs)
        own = self.compute_loss_func is not None
        if not self.label_names:
            # No labels are needed for a loss of one's own.
            own = own or type(self).compute_loss is not TrainerCore.compute_loss
        labels = self._labels_of(inputs)
        if labels is not None or own:
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        else:
            outputs = self._call(model, inputs)
            loss = losses.maybe_loss(outputs)
        loss = None if loss is None else loss.detach().mean()
        if prediction_loss_only:
            return loss, None, None
        default = getattr(
            getattr(self.model, "config", None), "keys_to_ignore_at_inference", ["past_key_values", "cache"]
        )
        ignored = frozenset(default if ignore_keys is None else ignore_keys)
        has_loss = losses.maybe_loss(outputs) is not None
        return loss, losses.predictions_of(outputs, ignored, has_loss=has_loss), labels

    def _labels_of(self, inputs: Any) -> Any:
        """The labels in a batch, a tuple where there are several; None where it has none.

        Raises:
            DataError: The arguments name labels, and the batch has others.
        """
        if not hasattr(inputs, "get"):
            return losses.find_labels(inputs, last_is_target=True)
        found = [inputs.get(name) for name in self.label_names]
        if found and all(label is not None for label in found):
            return found[0] if len(found) == 1 else tuple(found)
        # What is only predicted for need have no labels.
        others = any(label is not None for label in (*found, *map(inputs.get, label_names_of(self.model))))
        if self.args.label_names and (self._measures or others):
            raise DataError(
                f"label_names={self.label_names}, and a batch has {columns_in(inputs)}",
                "Neither the loss nor compute_metrics would get the labels that are named",
                "Name what the batches hold once they are collated, where `label` is called labels, or leave it out",
            )
        return None

    def doubt_labels(self, inputs: Any) -> None:
        """Say at the first batch of a training that evaluations will fail, unless their batches have other parts."""
        missing = [name for name in self.label_names if hasattr(inputs, "get") and inputs.get(name) is None]
        if missing:
            logger.warning(
                "label_names names %s, and the first training batch has %s: an evaluation whose batches have the same "
                "will fail.", ", ".join(missing), columns_in(inputs),
            )  # fmt: skip

    def note_metrics(self, metrics: Mapping[str, float]) -> bool:
        """Remember the metric that decides, if it is the best so far; say whether it is.

        Raises:
            PacelineError: The evaluation gave no such metric.
        """
        name = self.args.metric_for_best_model
        if name is None:
            return False
        key = name if name.startswith("eval_") else f"eval_{name}"
        if key not in metrics:
            known = ", ".join(metrics)
            what = f"metric_for_best_model={name!r}"
            raise PacelineError(what, f"The evaluation gives {known}", "Name one of them")
        return best.note_metric(self.state, float(metrics[key]), greater=bool(self.args.greater_is_better))

    def _checkpoint_folder(self) -> str:
        return os.fspath(Path(self.args.output_dir) / f"{saving.PREFIX}{self.state.global_step}")
