"""The loop that people do not want to write: `Trainer` and `TrainingArguments`."""

from __future__ import annotations

from paceline.trainer.arguments.arguments import TrainingArguments
from paceline.trainer.callbacks.base import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from paceline.trainer.loops.evaluation import EvalPrediction, PredictionOutput
from paceline.trainer.loops.training import TrainOutput
from paceline.trainer.state import TrainerControl, TrainerState
from paceline.trainer.trainer import Trainer

__all__ = [
    "DefaultFlowCallback",
    "EarlyStoppingCallback",
    "EvalPrediction",
    "PredictionOutput",
    "PrinterCallback",
    "ProgressCallback",
    "TrainOutput",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
]
