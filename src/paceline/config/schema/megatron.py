"""The `mpirun_config` section, and `megatron_lm_config`, which is checked and not supported in this release."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from paceline.config.schema.base import Section
from paceline.config.schema.readers import FilePath

Size = Annotated[int, Field(ge=1)]


class MpirunConfig(Section):
    """How `mpirun` starts the processes of a run on CPUs."""

    key_prefix: ClassVar[str] = "mpirun_"

    hostfile: FilePath | None = Field(None, description="Host file that mpirun reads.")
    ccl: int | str | None = Field(None, description="oneCCL worker threads of each process (CCL_WORKER_COUNT).")


class MegatronLMConfig(Section):
    """How Megatron-LM would divide a model; checked, and not supported in this release."""

    key_prefix: ClassVar[str] = "megatron_lm_"

    tp_degree: Size = Field(1, description="Ranks that share each layer.")
    pp_degree: Size = Field(1, description="Stages of the pipeline.")
    num_micro_batches: Size | None = Field(None, description="Micro-batches of one pipeline pass.")
    sequence_parallelism: bool | None = Field(None, description="Share activations along the sequence.")
    recompute_activations: bool | None = Field(None, description="Recompute activations in backward.")
    use_distributed_optimizer: bool | None = Field(None, description="Shard optimizer state.")
    gradient_clipping: float = Field(1.0, description="Largest gradient norm.")
    use_custom_fsdp: bool | None = Field(None, description="Use Megatron's own sharding.")
    no_load_optim: bool | None = Field(None, description="Do not load optimizer state.")
    no_save_optim: bool | None = Field(None, description="Do not save optimizer state.")
    eod_mask_loss: bool | None = Field(None, description="Mask the loss at ends of documents.")
    overlap_cpu_optimizer_d2h_h2d: bool | None = Field(None, description="Overlap copies of the host optimizer.")
    optimizer_cpu_offload: bool | None = Field(None, description="Keep optimizer state in host memory.")
    use_precision_aware_optimizer: bool | None = Field(None, description="Keep optimizer state in low precision.")
    decoder_last_pipeline_num_layers: Size | None = Field(None, description="Layers of the last stage.")
    recompute_granularity: Literal["full", "selective"] | None = Field(None, description="What is recomputed.")
    recompute_method: Literal["uniform", "block"] | None = Field(None, description="How recomputation is spread.")
    recompute_num_layers: Size | None = Field(None, description="Layers of one recomputed part.")
    attention_backend: str | bool | None = Field(None, description="Attention kernel.")
    expert_model_parallel_size: Size | None = Field(None, description="Ranks that share the experts.")
    context_parallel_size: Size | None = Field(None, description="Ranks that share each sequence.")
    attention_dropout: float | None = Field(None, description="Dropout of attention weights.")
    hidden_dropout: float | None = Field(None, description="Dropout of hidden states.")
    attention_softmax_in_fp32: bool | None = Field(None, description="Compute the softmax in fp32.")
    expert_tensor_parallel_size: Size | None = Field(None, description="Ranks that share each expert's layers.")
    calculate_per_token_loss: bool | None = Field(None, description="Average the loss over tokens.")
    use_rotary_position_embeddings: bool | None = Field(None, description="Use rotary positions.")
