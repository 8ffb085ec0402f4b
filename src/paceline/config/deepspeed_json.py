"""DeepSpeed's own JSON: reading it, checking its names, and finding what it shares with the run's configuration.

A value that both can hold has one owner. What only the JSON says becomes the run's value; what both say must agree;
`"auto"` follows the run. Key names are those of DeepSpeed 0.19 (https://www.deepspeed.ai/docs/config-json/).
"""

from __future__ import annotations

import base64
import binascii
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from paceline.config.shapes import did_you_mean
from paceline.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["AUTO", "Shared", "name_problems", "read_settings", "shared_values", "value_at", "walk"]

AUTO: Final = "auto"
FILE_KEY: Final = "deepspeed_config.deepspeed_config_file"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TOP: Final = _names(
    """
    activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger
    communication_data_type compile compression_training csv_monitor curriculum_learning data_efficiency
    data_parallel_size data_types dataloader_drop_last disable_allgather disable_python_gc dump_state
    elasticity expert_parallel flops_profiler fp16 fp32_allreduce gradient_accumulation_steps
    gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine keep_in_fp32_modules
    log_level managed_gradient_accumulation memory_breakdown nebula optimizer pipeline
    prescale_gradients scheduler seq_parallel_communication_data_type sequence_parallel_size
    sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers torch_autocast
    train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zenflow zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization
"""
)
_OFFLOAD: Final = frozenset({"device", "nvme_path", "buffer_count", "pin_memory"})
_SECTIONS: Final[Mapping[str, frozenset[str]]] = {
    "zero_optimization": _names(
        """
    allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients cpu_offload
    cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
    gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1
    load_from_fp32_weights log_trace_cache_warnings max_live_parameters max_reuse_distance
    memory_efficient_linear model_persistence_threshold module_granularity_threshold offload_optimizer
    offload_param overlap_comm override_module_apply param_persistence_threshold parameter_alignment
    pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size reduce_scatter
    round_robin_gradients save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential
    stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
    stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
    stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size
    stage3_use_all_reduce_for_fetch_params sub_group_size use_all_reduce_for_fetch_params
    use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size zero_quantized_gradients
    zero_quantized_nontrainable_weights zero_quantized_weights
"""
    ),
    "zero_optimization.offload_optimizer": _OFFLOAD
    | {"cpuadam_cores_perc", "fast_init", "pipeline_read", "pipeline_write", "ratio", "super_offload"},
    "zero_optimization.offload_param": _OFFLOAD | {"buffer_size", "max_in_cpu"},
    "fp16": _names(
        """
    auto_cast consecutive_hysteresis enabled fp16_master_weights_and_grads hysteresis
    initial_scale_power loss_scale loss_scale_window min_loss_scale
"""
    ),
    "bf16": _names(
        """
    bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow enabled
    immediate_grad_update
"""
    ),
    "optimizer": frozenset({"type", "params", "legacy_fusion"}),
    "scheduler": frozenset({"type", "params"}),
    "activation_checkpointing": _names(
        """
    partition_activations cpu_checkpointing contiguous_memory_optimization number_checkpoints
    synchronize_checkpoint_boundary profile
"""
    ),
}
_REFUSED: Final = {
    "amp": "apex is not used; write bf16 or fp16",
    "torch_autocast": "paceline opens autocast itself; write bf16 or fp16",
    "tensor_parallel": "this release shards by ZeRO only",
    "sequence_parallel_size": "this release shards by ZeRO only",
    "expert_parallel": "this release shards by ZeRO only",
    "elasticity": "paceline owns the batch size",
    "managed_gradient_accumulation": "paceline owns gradient accumulation",
}


def read_settings(value: str | Mapping[str, Any], folder: Path | None) -> tuple[dict[str, Any] | None, str, str]:
    """Read DeepSpeed's configuration from a dictionary, a path, JSON text or base64 of such a text.

    Args:
        value: What stands in the configuration.
        folder: Where a relative path may also lie: beside the configuration file.

    Returns:
        The settings, the name of their source, and what is wrong with it; no settings if something is.
    """
    if not isinstance(value, str):
        return dict(value), "hf_ds_config", ""
    if value.lstrip().startswith("{"):
        return (*_parse(value, "the JSON text"),)
    for path in (Path(value).expanduser(), (folder or Path()) / value):
        if path.is_file():
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                return None, str(path), f"cannot be read: {error}"
            return (*_parse(text, path.name),)
    try:
        text = base64.b64decode(value, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None, value, f"there is no file {value}"
    return (*_parse(text, "the base64 text"),)


def _parse(text: str, name: str) -> tuple[dict[str, Any] | None, str, str]:
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        return None, name, f"{name}:{error.lineno} is no JSON: {error.msg} at column {error.colno}"
    if not isinstance(settings, dict):
        return None, name, f"{name} holds a {type(settings).__name__}, not a JSON object"
    return settings, name, ""


def name_problems(settings: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """Yield the keys that DeepSpeed does not know, and those that cannot be carried out."""
    for key in settings:
        if key not in _TOP:
            yield Problem(name, key, "unknown key", hint=did_you_mean(key, dict.fromkeys(_TOP)))
        elif key in _REFUSED:
            yield Problem(name, key, "is not carried out", _REFUSED[key], "remove the key")
    for path, known in _SECTIONS.items():
        section = value_at(settings, path)
        if section is None or section == AUTO:
            continue
        if not isinstance(section, dict):
            yield Problem(name, path, f"{section!r} is not allowed", "it holds keys and values")
            continue
        for key in section:
            if key not in known:
                yield Problem(name, f"{path}.{key}", "unknown key", hint=did_you_mean(key, dict.fromkeys(known)))
    if not isinstance(settings.get("zero_optimization"), dict):
        hint = 'add it, for example "zero_optimization": {"stage": 2}'
        yield Problem(name, "zero_optimization", "the section is missing", "it says what is sharded", hint)
    if all(value_at(settings, f"{kind}.enabled") is True for kind in ("bf16", "fp16")):
        yield Problem(name, "bf16.enabled", "true together with fp16.enabled", "they exclude each other", "keep one")


@dataclass(frozen=True, slots=True)
class Shared:
    """A value of the JSON that the run's configuration can hold as well.

    Attributes:
        path: Dotted, in the JSON.
        key: Dotted, in the run's configuration.
        value: As the run's configuration writes it.
    """

    path: str
    key: str
    value: Any


_SAME: Final = (
    ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    ("gradient_clipping", "deepspeed_config.gradient_clipping"),
    ("zero_optimization.stage", "deepspeed_config.zero_stage"),
    ("zero_optimization.offload_optimizer.device", "deepspeed_config.offload_optimizer_device"),
    ("zero_optimization.offload_optimizer.nvme_path", "deepspeed_config.offload_optimizer_nvme_path"),
    ("zero_optimization.offload_param.device", "deepspeed_config.offload_param_device"),
    ("zero_optimization.offload_param.nvme_path", "deepspeed_config.offload_param_nvme_path"),
    (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "deepspeed_config.zero3_save_16bit_model",
    ),
)


def shared_values(settings: Mapping[str, Any]) -> Iterator[Shared]:
    """Yield what the JSON says of values that the run's configuration owns; nothing for `"auto"`."""
    for path, key in _SAME:
        value = value_at(settings, path)
        if value is not None and value != AUTO and _counts(settings, path):
            yield Shared(path, key, float(value) if path == "gradient_clipping" else value)
    precision = _precision(settings)
    if precision is not None:
        yield precision


def _counts(settings: Mapping[str, Any], path: str) -> bool:
    """Whether DeepSpeed reads a value at all: files in use carry keys of stages and devices that they do not use."""
    of_stage_3 = "offload_param" in path or "stage3" in path
    if of_stage_3 and value_at(settings, "zero_optimization.stage") not in (3, AUTO):
        return False
    if path.endswith("nvme_path"):
        return bool(value_at(settings, path.replace("nvme_path", "device")) == "nvme")
    return True


def _precision(settings: Mapping[str, Any]) -> Shared | None:
    said = {kind: value_at(settings, f"{kind}.enabled") for kind in ("bf16", "fp16")}
    for kind, enabled in said.items():
        if enabled is True:
            return Shared(f"{kind}.enabled", "mixed_precision", kind)
    if set(said.values()) == {False}:
        return Shared("bf16.enabled", "mixed_precision", "no")
    return None


def value_at(settings: Any, path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    for key in path.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return copy.copy(settings)


def walk(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is no section, by its dotted path."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
