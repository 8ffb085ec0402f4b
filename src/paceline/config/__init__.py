"""The configuration: one schema, its sources, its checks, and where every value came from.

The names are resolved on first use: what only reads a constant of this package must not pay for the schema.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline.config.base import Section
    from paceline.config.data import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration
    from paceline.config.deepspeed import DeepSpeedPlugin
    from paceline.config.dynamo import TorchDynamoPlugin
    from paceline.config.force import in_force
    from paceline.config.fp8 import FP8Config
    from paceline.config.fsdp import FullyShardedDataParallelPlugin
    from paceline.config.kwargs import (
        AutocastKwargs,
        DistributedDataParallelKwargs,
        GradScalerKwargs,
        InitProcessGroupKwargs,
        ProfileKwargs,
    )
    from paceline.config.locate import default_config_file, find_config_file, is_accelerates
    from paceline.config.megatron import MegatronLMConfig, MpirunConfig
    from paceline.config.names import Option, options
    from paceline.config.origin import Found, Origin
    from paceline.config.parallelism import ParallelismConfig
    from paceline.config.resolution import resolve, with_arguments, worker_config
    from paceline.config.resolved import Recording, Resolved
    from paceline.config.run import RunConfig

_HOME = {
    "AutocastKwargs": "paceline.config.kwargs",
    "DataLoaderConfiguration": "paceline.config.data",
    "DeepSpeedPlugin": "paceline.config.deepspeed",
    "DistributedDataParallelKwargs": "paceline.config.kwargs",
    "FP8Config": "paceline.config.fp8",
    "Found": "paceline.config.origin",
    "FullyShardedDataParallelPlugin": "paceline.config.fsdp",
    "GradScalerKwargs": "paceline.config.kwargs",
    "GradientAccumulationPlugin": "paceline.config.data",
    "InitProcessGroupKwargs": "paceline.config.kwargs",
    "MegatronLMConfig": "paceline.config.megatron",
    "MpirunConfig": "paceline.config.megatron",
    "Option": "paceline.config.names",
    "Origin": "paceline.config.origin",
    "ParallelismConfig": "paceline.config.parallelism",
    "ProfileKwargs": "paceline.config.kwargs",
    "ProjectConfiguration": "paceline.config.data",
    "Recording": "paceline.config.resolved",
    "Resolved": "paceline.config.resolved",
    "RunConfig": "paceline.config.run",
    "Section": "paceline.config.base",
    "TorchDynamoPlugin": "paceline.config.dynamo",
    "default_config_file": "paceline.config.locate",
    "find_config_file": "paceline.config.locate",
    "in_force": "paceline.config.force",
    "is_accelerates": "paceline.config.locate",
    "options": "paceline.config.names",
    # Not `paceline.config.resolve`: importing a module of that name would put it in the place of the function.
    "resolve": "paceline.config.resolution",
    "with_arguments": "paceline.config.resolution",
    "worker_config": "paceline.config.resolution",
}

__all__ = [
    "AutocastKwargs",
    "DataLoaderConfiguration",
    "DeepSpeedPlugin",
    "DistributedDataParallelKwargs",
    "FP8Config",
    "Found",
    "FullyShardedDataParallelPlugin",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "InitProcessGroupKwargs",
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
    "in_force",
    "is_accelerates",
    "options",
    "resolve",
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
