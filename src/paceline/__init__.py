"""paceline: one PyTorch training script on one CPU, one GPU or many, under DDP, FSDP2 or DeepSpeed.

Names are resolved on first use, so `import paceline` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Accelerator": "paceline.accelerator.accelerator",
    "AutocastKwargs": "paceline.config",
    "DataLoaderConfiguration": "paceline.config",
    "DeepSpeedPlugin": "paceline.config",
    "DistributedDataParallelKwargs": "paceline.config",
    "DistributedType": "paceline.strategies",
    "DummyOptim": "paceline.strategies.placeholders",
    "DummyScheduler": "paceline.strategies.placeholders",
    "EarlyStoppingCallback": "paceline.trainer",
    "FP8Config": "paceline.config",
    "FullyShardedDataParallelPlugin": "paceline.config",
    "GradScalerKwargs": "paceline.config",
    "GradientAccumulationPlugin": "paceline.config",
    "InitProcessGroupKwargs": "paceline.config",
    "PacelineError": "paceline.errors",
    "ParallelismConfig": "paceline.config",
    "ProfileKwargs": "paceline.config",
    "ProjectConfiguration": "paceline.config",
    "TorchDynamoPlugin": "paceline.config",
    "Trainer": "paceline.trainer",
    "TrainerCallback": "paceline.trainer",
    "TrainerControl": "paceline.trainer",
    "TrainerState": "paceline.trainer",
    "TrainingArguments": "paceline.trainer",
    "__version__": "paceline.environment.version",
    "debug_launcher": "paceline.launch",
    "get_logger": "paceline.environment.logging",
    "notebook_launcher": "paceline.launch",
    "set_seed": "paceline.environment.random_generators",
    "skip_first_batches": "paceline.data",
}

__all__ = [
    "Accelerator",
    "AutocastKwargs",
    "DataLoaderConfiguration",
    "DeepSpeedPlugin",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "DummyOptim",
    "DummyScheduler",
    "EarlyStoppingCallback",
    "FP8Config",
    "FullyShardedDataParallelPlugin",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "InitProcessGroupKwargs",
    "PacelineError",
    "ParallelismConfig",
    "ProfileKwargs",
    "ProjectConfiguration",
    "TorchDynamoPlugin",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
    "__version__",
    "debug_launcher",
    "get_logger",
    "notebook_launcher",
    "set_seed",
    "skip_first_batches",
]

if TYPE_CHECKING:
    from paceline.accelerator.accelerator import Accelerator
    from paceline.config import (
        AutocastKwargs,
        DataLoaderConfiguration,
        DeepSpeedPlugin,
        DistributedDataParallelKwargs,
        FP8Config,
        FullyShardedDataParallelPlugin,
        GradientAccumulationPlugin,
        GradScalerKwargs,
        InitProcessGroupKwargs,
        ParallelismConfig,
        ProfileKwargs,
        ProjectConfiguration,
        TorchDynamoPlugin,
    )
    from paceline.data import skip_first_batches
    from paceline.environment.logging import get_logger
    from paceline.environment.random_generators import set_seed
    from paceline.environment.version import __version__
    from paceline.errors import PacelineError
    from paceline.launch import debug_launcher, notebook_launcher
    from paceline.strategies import DistributedType
    from paceline.strategies.placeholders import DummyOptim, DummyScheduler
    from paceline.trainer import (
        EarlyStoppingCallback,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )


def __getattr__(name: str) -> Any:
    try:
        module = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'paceline' has no attribute {name!r}") from None
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
