"""The configuration: one schema, its sources, its checks, and where every value came from."""

from __future__ import annotations

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
from paceline.config.resolve import resolve, with_arguments, worker_config
from paceline.config.resolved import Recording, Resolved
from paceline.config.run import RunConfig

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
