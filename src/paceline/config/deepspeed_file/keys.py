"""The names in DeepSpeed's own JSON, as of DeepSpeed 0.19 (https://www.deepspeed.ai/docs/config-json/)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ARGUMENTS", "OLD", "OPTIMIZERS", "REFUSED", "REMOVED", "REMOVED_FROM_ZERO", "SCHEDULES", "SECTIONS", "TOP"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP: Final = _names(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger
    communication_data_type compile csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt
    disable_allgather disable_python_gc dump_state expert_parallel flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
    hybrid_engine log_level managed_gradient_accumulation memory_breakdown optimizer pipeline
    prescale_gradients scheduler seq_parallel_communication_data_type sequence_parallel_size
    steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization
"""
)
_OFFLOAD: Final = frozenset({"device", "nvme_path", "buffer_count", "pin_memory"})
SECTIONS: Final[Mapping[str, frozenset[str]]] = {
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
    "aio": _names("block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds"),
    "data_types": _names("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
    "zero_optimization.leaf_module": _names("classes names name_suffixes"),
    "timers": frozenset({"throughput"}),
    "timers.throughput": _names("enabled synchronized"),
    "comms_logger": _names("enabled prof_all prof_ops verbose debug"),
    "flops_profiler": _names("enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file"),
    "tensorboard": _names("enabled output_path job_name"),
    "csv_monitor": _names("enabled output_path job_name"),
    "wandb": _names("enabled group team project"),
    "comet": _names(
        "enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode"
    ),
}
REFUSED: Final = {
    "torch_autocast": "paceline opens autocast itself; write bf16 or fp16",
    "tensor_parallel": "this release shards with ZeRO only",
    "sequence_parallel_size": "this release shards with ZeRO only",
    "expert_parallel": "this release shards with ZeRO only",
    "managed_gradient_accumulation": "paceline owns gradient accumulation",
    "dataloader_drop_last": "paceline owns the loaders; write DataLoader(drop_last=True)",
    "data_efficiency": "it acts in DeepSpeed's own loader, and paceline owns the loaders",
    "checkpoint": "paceline writes checkpoints itself",
    "datastates_ckpt": "paceline writes checkpoints itself",
    "pipeline": "this release has no pipeline parallelism",
    "autotuning": "only DeepSpeed's own command reads it",
    "hybrid_engine": "it generates with a second engine between steps, which paceline does not start",
    "weight_quantization": "it is for inference",
    "compile.deepcompile": "it acts in engine.compile(); use --dynamo_backend, which compiles the model's blocks",
    "zero_optimization.zenflow": "its optimizer chooses when to step, and paceline decides that",
    "zero_optimization.offload_optimizer.super_offload": "its optimizer steps during the backward, before the clip",
}
"""Keys that would do nothing here, or conflict with what paceline does, with the reason."""

_GONE: Final = "DeepSpeed 0.19 has removed it"
REMOVED: Final = {
    "amp": f"{_GONE}; write bf16 or fp16",
    "compression_training": _GONE,
    "curriculum_learning": f"{_GONE}; order the samples in the script's own sampler",
    "data_parallel_size": "DeepSpeed takes it from the ranks",
    "eigenvalue": _GONE,
    "elasticity": f"{_GONE}, and paceline owns the batch size",
    "fp32_allreduce": f'{_GONE}; write "communication_data_type": "fp32"',
    "graph_harvesting": _GONE,
    "nebula": f"{_GONE}, and paceline writes checkpoints itself",
    "progressive_layer_drop": _GONE,
    "quantize_training": _GONE,
    "sparse_attention": f"{_GONE}; choose the model's attention, for example attn_implementation",
    "sparse_gradients": f"{_GONE}; nn.Embedding(sparse=True) needs no key",
}
"""Keys of older releases, which are left out where they change nothing."""
REMOVED_FROM_ZERO: Final = _names("mics_shard_size mics_hierarchical_params_gather zeropp_loco_param")

_GATHERS: Final = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
OLD: Final = {
    "bfloat16": "bf16",
    "zero_optimization.cpu_offload": 'zero_optimization.offload_optimizer: {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'zero_optimization.offload_param: {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "pin_memory into zero_optimization.offload_optimizer",
    "zero_optimization.gather_16bit_weights_on_model_save": _GATHERS,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _GATHERS,
}
"""Spellings that DeepSpeed reads and paceline does not, with the one that both read."""

OPTIMIZERS: Final = _names("adagrad adam adamw lamb lion muadam muadamw musgd muon")
"""Optimizers that DeepSpeed builds itself, in any case; other types are classes of torch.optim."""

ARGUMENTS: Final[Mapping[str, frozenset[str]]] = {
    "optimizer.params": _names(
        """
    lr betas eps weight_decay momentum torch_adam adam_w_mode bias_correction amsgrad fp32_optimizer_states
    max_coeff min_coeff freeze_step cuda_aware comm_backend_name nesterov dampening muon_lr adam_lr
"""
    ),
    "scheduler.params": _names(
        """
    warmup_min_lr warmup_max_lr warmup_num_steps warmup_type total_num_steps last_batch_iteration
    warmup_min_ratio cos_min_ratio
"""
    ),
}
"""Arguments of optimizers and schedules, to recognise a key that is one level too high."""

_WARMUP: Final = _names("warmup_num_steps warmup_type last_batch_iteration")
SCHEDULES: Final[Mapping[str, frozenset[str]]] = {
    "WarmupLR": _WARMUP | {"warmup_min_lr", "warmup_max_lr"},
    "WarmupDecayLR": _WARMUP | {"warmup_min_lr", "warmup_max_lr", "total_num_steps"},
    "WarmupCosineLR": _WARMUP | {"warmup_min_ratio", "cos_min_ratio", "total_num_steps"},
}
"""Arguments of the DeepSpeed schedules that a placeholder can fill."""
