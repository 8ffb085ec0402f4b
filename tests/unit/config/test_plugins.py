"""Sections built in Python: loose inputs become one form, mistakes become one kind of error."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from paceline.config import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    FP8Config,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    MegatronLMConfig,
    MpirunConfig,
    ParallelismConfig,
    ProfileKwargs,
    ProjectConfiguration,
    RunConfig,
    Section,
    TorchDynamoPlugin,
    options,
)
from paceline.errors import ConfigError

SECTIONS: list[type[Section]] = [
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    FP8Config,
    FullyShardedDataParallelPlugin,
    GradScalerKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    MegatronLMConfig,
    MpirunConfig,
    ParallelismConfig,
    ProfileKwargs,
    ProjectConfiguration,
    RunConfig,
    TorchDynamoPlugin,
]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_one_sentence_and_a_default(section: type[Section]) -> None:
    built = section()
    for name, info in section.model_fields.items():
        assert info.description, name
        assert info.description.endswith("."), name
        assert not info.is_required(), name
    with pytest.raises(ConfigError, match="a configuration is immutable"):
        setattr(built, next(iter(section.model_fields)), None)


@pytest.mark.parametrize(
    ("section", "values", "field", "hint"),
    [
        (FullyShardedDataParallelPlugin, {"cpu_ofload": True}, "cpu_ofload", "did you mean cpu_offload?"),
        (FullyShardedDataParallelPlugin, {"fsdp_ofload": True}, "fsdp_ofload", "did you mean"),
        (
            FullyShardedDataParallelPlugin,
            {"sharding_strategy": "FULL_SHARD"},
            "sharding_strategy",
            "reshard_after",
        ),
        (FullyShardedDataParallelPlugin, {"fsdp_version": 1}, "fsdp_version", ""),
        (FullyShardedDataParallelPlugin, {"cpu_offload": "true"}, "cpu_offload", ""),
        (FullyShardedDataParallelPlugin, {"state_dict_type": "FULL"}, "state_dict_type", ""),
        (
            FullyShardedDataParallelPlugin,
            {"mixed_precision_policy": {"param": 1}},
            "mixed_precision_policy",
            "it has",
        ),
        (FullyShardedDataParallelPlugin, {"mixed_precision_policy": "int8"}, "mixed_precision_policy", ""),
        (GradientAccumulationPlugin, {"adjust_scheduler": False}, "adjust_scheduler", "count the schedule"),
        (GradientAccumulationPlugin, {"num_steps": 0}, "num_steps", "at least 1"),
        (GradScalerKwargs, {"growth_factor": 1.0}, "growth_factor", "more than 1"),
        (TorchDynamoPlugin, {"backend": "inducto"}, "backend", "did you mean inductor?"),
        (
            DeepSpeedPlugin,
            {"zero_stage": 1, "zero3_init_flag": True},
            "zero3_init_flag",
            "set zero_stage to 3",
        ),
        (ParallelismConfig, {"cp_size": 2, "sp_size": 2}, "sp_size", "divide the sequence"),
        (
            ParallelismConfig,
            {"sp_size": 2, "sp_attn_implementation": "eager"},
            "sp_attn_implementation",
            "fused",
        ),
        (ProjectConfiguration, {"total_limit": 0}, "total_limit", "at least 1"),
    ],
)
def test_a_mistake_in_python_is_a_config_error(
    section: type[Section], values: dict[str, Any], field: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    [found] = caught.value.problems
    assert (found.where, found.key) == (f"{section.__name__}(…)", field)
    assert hint in str(found)


def test_a_precision_policy_is_folded_into_three_fields() -> None:
    policy = SimpleNamespace(
        param_dtype="torch.bfloat16",
        reduce_dtype="torch.float32",
        output_dtype=None,
        cast_forward_inputs=True,
    )
    for given, dtypes in (
        ("bf16", ("bf16", None, "bf16")),
        ("fp8", ("bf16", None, "bf16")),
        (policy, ("bf16", "fp32", None)),
        ({"param_dtype": "fp16", "reduce_dtype": "bfloat16"}, ("fp16", "bf16", None)),
    ):
        values: dict[str, Any] = {"mixed_precision_policy": given}
        plugin = FullyShardedDataParallelPlugin(**values)
        assert (plugin.param_dtype, plugin.reduce_dtype, plugin.output_dtype) == dtypes


def test_two_precisions_for_one_thing_clash() -> None:
    values: dict[str, Any] = {"mixed_precision_policy": "bf16", "param_dtype": "fp16"}
    with pytest.raises(ConfigError, match="differs from 'bf16'"):
        FullyShardedDataParallelPlugin(**values)


def test_enums_and_torch_objects_are_understood_by_name() -> None:
    state_dict_type = Enum("state_dict_type", "FULL_STATE_DICT")
    offload = type("CPUOffloadPolicy", (), {})()
    values: dict[str, Any] = {
        "state_dict_type": state_dict_type["FULL_STATE_DICT"],
        "cpu_offload": offload,
        "transformer_cls_names_to_wrap": {"B", "A"},
    }
    plugin = FullyShardedDataParallelPlugin(**values)
    assert (plugin.state_dict_type, plugin.cpu_offload) == ("FULL_STATE_DICT", True)
    assert plugin.transformer_cls_names_to_wrap == ("A", "B")


def test_a_changed_copy_is_checked() -> None:
    plugin = GradientAccumulationPlugin().changed(num_steps=4)
    assert plugin.num_steps == 4
    with pytest.raises(ConfigError):
        plugin.changed(num_steps=-4)


def test_every_flag_is_unique_and_described() -> None:
    flags = [option.flag for option in options()]
    assert len(flags) == len(set(flags))
    for option in options():
        assert option.description.endswith("."), option
        assert (option.kind == "choice") == bool(option.choices), option


@pytest.mark.parametrize(
    ("flag", "key", "kind", "default"),
    [
        ("cpu", "use_cpu", "bool", False),
        ("mixed_precision", "mixed_precision", "choice", "no"),
        ("num_processes", "num_processes", "int", None),
        ("timeout", "timeout", "float", None),
        ("fsdp_offload_params", "fsdp_config.fsdp_offload_params", "bool", False),
        ("fsdp_reshard_after_forward", "fsdp_config.fsdp_reshard_after_forward", "str", True),
        ("fsdp_sharding_strategy", "fsdp_config.fsdp_sharding_strategy", "choice", None),
        ("fsdp_version", "fsdp_config.fsdp_version", "choice", 2),
        ("zero_stage", "deepspeed_config.zero_stage", "int", 2),
        (
            "parallelism_config_dp_replicate_size",
            "parallelism_config.parallelism_config_dp_replicate_size",
            "int",
            1,
        ),
        ("dynamo_use_fullgraph", "dynamo_config.dynamo_use_fullgraph", "bool", False),
        ("fp8_margin", "fp8_config.fp8_margin", "int", 0),
        ("gradient_accumulation_steps", "gradient_accumulation_steps", "int", 1),
        ("multi_gpu", "distributed_type", "bool", False),
        ("mpirun_hostfile", "mpirun_config.mpirun_hostfile", "str", None),
        ("tpu_cluster", "tpu_use_cluster", "bool", False),
    ],
)
def test_flags_follow_from_the_schema(flag: str, key: str, kind: str, default: object) -> None:
    [option] = [option for option in options() if option.flag == flag]
    assert (option.key, option.kind, option.default) == (key, kind, default)
