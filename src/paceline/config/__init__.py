"""The configuration: one schema, its sources, its checks, and the origin of every value.

Names are imported on first use: reading a constant of this package must not import the schema (pydantic).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline.config.leniency import STRICT, Leniency
    from paceline.config.resolution import resolve, with_arguments, worker_config
    from paceline.config.resolved import Recording, Resolved, use_configuration
    from paceline.config.schema.base import Section
    from paceline.config.schema.data import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration
    from paceline.config.schema.deepspeed import DeepSpeedPlugin
    from paceline.config.schema.dynamo import TorchDynamoPlugin
    from paceline.config.schema.fp8 import FP8Config
    from paceline.config.schema.fsdp import FullyShardedDataParallelPlugin
    from paceline.config.schema.kwargs import (
        AutocastKwargs,
        DistributedDataParallelKwargs,
        GradScalerKwargs,
        InitProcessGroupKwargs,
        ProfileKwargs,
    )
    from paceline.config.schema.megatron import MegatronLMConfig, MpirunConfig
    from paceline.config.schema.names import Option, options
    from paceline.config.schema.parallelism import ParallelismConfig
    from paceline.config.schema.run import RunConfig
    from paceline.config.sources.locate import default_config_file, find_config_file, is_accelerate_file
    from paceline.config.sources.origin import Detected, Origin

_HOME = {
    "AutocastKwargs": "paceline.config.schema.kwargs",
    "DataLoaderConfiguration": "paceline.config.schema.data",
    "DeepSpeedPlugin": "paceline.config.schema.deepspeed",
    "DistributedDataParallelKwargs": "paceline.config.schema.kwargs",
    "FP8Config": "paceline.config.schema.fp8",
    "Detected": "paceline.config.sources.origin",
    "FullyShardedDataParallelPlugin": "paceline.config.schema.fsdp",
    "GradScalerKwargs": "paceline.config.schema.kwargs",
    "GradientAccumulationPlugin": "paceline.config.schema.data",
    "InitProcessGroupKwargs": "paceline.config.schema.kwargs",
    "Leniency": "paceline.config.leniency",
    "MegatronLMConfig": "paceline.config.schema.megatron",
    "MpirunConfig": "paceline.config.schema.megatron",
    "Option": "paceline.config.schema.names",
    "Origin": "paceline.config.sources.origin",
    "ParallelismConfig": "paceline.config.schema.parallelism",
    "ProfileKwargs": "paceline.config.schema.kwargs",
    "ProjectConfiguration": "paceline.config.schema.data",
    "Recording": "paceline.config.resolved",
    "Resolved": "paceline.config.resolved",
    "RunConfig": "paceline.config.schema.run",
    "STRICT": "paceline.config.leniency",
    "Section": "paceline.config.schema.base",
    "TorchDynamoPlugin": "paceline.config.schema.dynamo",
    "default_config_file": "paceline.config.sources.locate",
    "find_config_file": "paceline.config.sources.locate",
    "use_configuration": "paceline.config.resolved",
    "is_accelerate_file": "paceline.config.sources.locate",
    "options": "paceline.config.schema.names",
    # A module named `resolve` would replace the function of that name when it is imported.
    "resolve": "paceline.config.resolution",
    "with_arguments": "paceline.config.resolution",
    "worker_config": "paceline.config.resolution",
}

__all__ = [
    "STRICT",
    "AutocastKwargs",
    "DataLoaderConfiguration",
    "DeepSpeedPlugin",
    "Detected",
    "DistributedDataParallelKwargs",
    "FP8Config",
    "FullyShardedDataParallelPlugin",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "InitProcessGroupKwargs",
    "Leniency",
    "MegatronLMConfig",
    "MpirunConfig",
    "Option",
    "Origin",
    "ParallelismConfig",
    "ProfileKwargs",
    "ProjectConfiguration",
    "Recording",
    "Resolved",
    "RunConfig",
    "Section",
    "TorchDynamoPlugin",
    "default_config_file",
    "find_config_file",
    "is_accelerate_file",
    "options",
    "resolve",
    "use_configuration",
    "with_arguments",
    "worker_config",
]


def __getattr__(name: str) -> object:
    try:
        module = _HOME[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value
