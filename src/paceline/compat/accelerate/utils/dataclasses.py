"""Enumerations, handlers and plugins, under the name by which programs import them."""

from __future__ import annotations

from paceline.compat.accelerate.settings.deepspeed import DeepSpeedPlugin
from paceline.compat.accelerate.settings.enums import (
    BaseEnum,
    ComputeEnvironment,
    CustomDtype,
    DDPCommunicationHookType,
    DistributedType,
    DynamoBackend,
    EnumWithContains,
    FP8BackendType,
    LoggerType,
    PrecisionType,
    RNGType,
    SageMakerDistributedType,
)
from paceline.compat.accelerate.settings.fsdp import FullyShardedDataParallelPlugin, get_module_class_from_name
from paceline.compat.accelerate.settings.handlers import (
    AORecipeKwargs,
    AutocastKwargs,
    DistributedDataParallelKwargs,
    FP8RecipeKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
    MSAMPRecipeKwargs,
    ProfileKwargs,
    TERecipeKwargs,
)
from paceline.compat.accelerate.settings.parallelism import (
    DeepSpeedSequenceParallelConfig,
    TorchContextParallelConfig,
    TorchTensorParallelConfig,
    TorchTensorParallelPlugin,
)
from paceline.compat.accelerate.settings.plugins import (
    BnbQuantizationConfig,
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    MegatronLMPlugin,
    ProjectConfiguration,
    TensorInformation,
    TorchDynamoPlugin,
)
from paceline.compat.accelerate.settings.refusals import MEGATRON, refused_names

__all__ = [
    "AORecipeKwargs",
    "AutocastKwargs",
    "BaseEnum",
    "BnbQuantizationConfig",
    "ComputeEnvironment",
    "CustomDtype",
    "DDPCommunicationHookType",
    "DataLoaderConfiguration",
    "DeepSpeedPlugin",
    "DeepSpeedSequenceParallelConfig",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "DynamoBackend",
    "EnumWithContains",
    "FP8BackendType",
    "FP8RecipeKwargs",
    "FullyShardedDataParallelPlugin",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "InitProcessGroupKwargs",
    "KwargsHandler",
    "LoggerType",
    "MSAMPRecipeKwargs",
    "MegatronLMPlugin",
    "PrecisionType",
    "ProfileKwargs",
    "ProjectConfiguration",
    "RNGType",
    "SageMakerDistributedType",
    "TERecipeKwargs",
    "TensorInformation",
    "TorchContextParallelConfig",
    "TorchDynamoPlugin",
    "TorchTensorParallelConfig",
    "TorchTensorParallelPlugin",
    "get_module_class_from_name",
]

_MEGATRON_NAMES = """
    add_model_config_to_megatron_parser parse_bert_config parse_glm4_moe_config parse_gpt2_config parse_llama_config
    parse_t5_config
"""

__getattr__, _ = refused_names(__name__, _MEGATRON_NAMES, MEGATRON)
