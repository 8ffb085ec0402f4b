"""The training loop, ready to use: `Trainer`, `TrainingArguments`, and callbacks."""

from __future__ import annotations

from paceline.trainer.arguments.arguments import TrainingArguments
from paceline.trainer.callbacks.base import TrainerCallback
from paceline.trainer.callbacks.builtin import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
)
from paceline.trainer.loops.evaluation import EvalPrediction, PredictionOutput
from paceline.trainer.loops.training import TrainOutput
from paceline.trainer.model_files import get_last_checkpoint
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
    "get_last_checkpoint",
]
