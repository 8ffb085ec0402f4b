"""Accelerate's engine for Megatron-LM, which is not supported."""

from __future__ import annotations

from paceline.compat.accelerate.settings.refusals import MEGATRON, refused_names

_NAMES = """
    AbstractTrainStep BertTrainStep GPTTrainStep MegatronEngine MegatronLMDummyDataLoader MegatronLMDummyScheduler
    MegatronLMOptimizerWrapper MegatronLMSchedulerWrapper T5TrainStep add_model_config_to_megatron_parser
    avg_losses_across_data_parallel_group finish_mpu_init gather_across_data_parallel_groups initialize
    model_provider_func parse_bert_config parse_glm4_moe_config parse_gpt2_config parse_llama_config parse_t5_config
    prepare_data_loader prepare_model_optimizer_scheduler prepare_optimizer prepare_scheduler
"""

__getattr__, __all__ = refused_names(__name__, _NAMES, MEGATRON)
