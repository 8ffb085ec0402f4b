"""The configuration: one schema, its sources, its checks, and where every value came from."""

from __future__ import annotations

from paceline.config.force import in_force
from paceline.config.resolve import resolve, with_arguments, worker_config
from paceline.config.resolved import Recording, Resolved
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
from paceline.config.sources.locate import default_config_file, find_config_file, is_accelerates
from paceline.config.sources.origin import Found, Origin

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
