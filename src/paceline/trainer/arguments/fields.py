"""Every field of `TrainingArguments`, grouped by what it controls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "AllFields",
    "CheckpointFields",
    "DataFields",
    "DistributedFields",
    "DurationFields",
    "EvaluationFields",
    "LoggingFields",
    "OptimizerFields",
    "PrecisionFields",
]

Interval = Literal["no", "steps", "epoch"]
SaveInterval = Literal["no", "steps", "epoch", "best"]
Sampling = Literal["random", "sequential", "group_by_length"]


def _field(default: Any, text: str) -> Any:
    """A field with its default and the text that describes it in help and docstrings."""
    return field(default=default, metadata={"help": text})


@dataclass
class DurationFields:
    """How long to train, and with which batch sizes."""

    output_dir: str = _field("trainer_output", "Folder of checkpoints, logs and metrics.")
    do_train: bool = _field(False, "For scripts: whether to train. The Trainer ignores it.")
    do_eval: bool = _field(False, "For scripts: whether to evaluate. The Trainer ignores it.")
    do_predict: bool = _field(False, "For scripts: whether to predict. The Trainer ignores it.")
    num_train_epochs: float = _field(3.0, "Epochs to train; may be a fraction.")
    max_steps: int = _field(-1, "Optimizer steps to train; a value above 0 overrides num_train_epochs.")
    max_tokens: int | None = _field(
        None, "Stop after this many input tokens over all ranks, padding included, if that comes first."
    )
    per_device_train_batch_size: int = _field(8, "Samples of a training micro-batch on each rank.")
    global_batch_size: int | None = _field(
        None,
        "Samples of an optimizer step over all ranks. Accumulation is derived from it, so that training is the same "
        "on any number of ranks; per_device_train_batch_size then is an upper limit.",
    )
    gradient_accumulation_steps: int = _field(
        1, "Micro-batches of an optimizer step; leave it out with global_batch_size."
    )
    auto_find_batch_size: bool = _field(
        False, "When memory runs out, retry with half the micro-batch and twice the accumulation."
    )


@dataclass
class OptimizerFields:
    """Optimizer, learning rate and loss."""

    learning_rate: float = _field(5e-5, "Peak learning rate.")
    weight_decay: float = _field(0.0, "Weight decay of all parameters except biases and norms.")
    adam_beta1: float = _field(0.9, "First beta of Adam.")
    adam_beta2: float = _field(0.999, "Second beta of Adam.")
    adam_epsilon: float = _field(1e-8, "Epsilon of Adam.")
    max_grad_norm: float = _field(1.0, "Gradients are clipped to this norm; 0 disables clipping.")
    optim: str = _field("adamw_torch_fused", "Optimizer, under transformers' name.")
    optim_args: str | None = _field(None, "Further arguments of the optimizer: key=value pairs, comma-separated.")
    lr_scheduler_type: str = _field("linear", "Learning-rate schedule, under transformers' name.")
    lr_scheduler_kwargs: dict[str, Any] | str | None = _field(
        None, "Further arguments of the schedule: a mapping, or JSON text."
    )
    warmup_steps: float = _field(
        0.0, "Optimizer steps over which the learning rate rises; below 1, a fraction of all steps."
    )
    warmup_ratio: float | None = _field(None, "Fraction of all steps over which the learning rate rises.")
    label_smoothing_factor: float = _field(0.0, "Probability mass spread over all classes, from 0 to 1.")
    chunked_loss: bool | None = _field(
        None,
        "Compute the loss of a causal language model from transformers in chunks of tokens, without all logits; none "
        "does so for vocabularies of 16,384 and more, if the first batch has the same loss that way.",
    )
    average_tokens_across_devices: bool = _field(
        True, "Weight losses by their number of targets; False averages micro-batches and ranks equally."
    )
    neftune_noise_alpha: float | None = _field(
        None, "Alpha of the NEFTune noise on input embeddings during training; none adds no noise."
    )


@dataclass
class PrecisionFields:
    """Precision, memory and compilation."""

    bf16: bool = _field(False, "Compute in bfloat16; False leaves the precision to the launcher's configuration.")
    fp16: bool = _field(False, "Compute in float16 with loss scaling; False leaves the precision to the configuration.")
    bf16_full_eval: bool = _field(False, "Cast weights to bfloat16 for evaluations outside of training.")
    fp16_full_eval: bool = _field(False, "Cast weights to float16 for evaluations outside of training.")
    tf32: bool | None = _field(None, "Whether float32 matrix products may use TF32; none keeps torch's setting.")
    activation_checkpointing: bool | None = _field(
        None, "Recompute activations in the backward pass to save memory; none is false."
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = _field(
        None, "Arguments of torch.utils.checkpoint, every_n_layers, and policy (full or products): a mapping, or JSON."
    )
    gradient_checkpointing: bool = _field(False, "Older name of activation_checkpointing.")
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = _field(
        None, "Older name of activation_checkpointing_kwargs."
    )
    torch_compile: bool = _field(False, "Compile the model's repeated blocks with torch.compile.")
    torch_compile_backend: str | None = _field(None, "Backend of torch.compile; setting it enables torch_compile.")
    torch_compile_mode: str | None = _field(None, "Mode of torch.compile; setting it enables torch_compile.")
    torch_empty_cache_steps: int | None = _field(
        None, "Optimizer steps between two calls of empty_cache on the device; none never calls it."
    )


@dataclass
class DistributedFields:
    """Devices, strategy, and how ranks communicate."""

    use_cpu: bool = _field(False, "Use the CPU even if there is an accelerator.")
    strategy: str | None = _field(
        None, "auto, single, ddp, fsdp or deepspeed; none leaves it to the launcher's configuration."
    )
    ddp_backend: str | None = _field(None, "Backend of torch.distributed; none chooses it by the device.")
    ddp_timeout: int = _field(1800, "Seconds that a collective may wait for other ranks.")
    ddp_find_unused_parameters: bool | None = _field(
        None, "Let DDP search for parameters without gradient in every step, which costs time; none is false."
    )
    ddp_bucket_cap_mb: int | None = _field(None, "Size of DDP's gradient buckets in MiB; none keeps torch's default.")
    ddp_broadcast_buffers: bool | None = _field(
        None, "Let DDP broadcast rank 0's buffers before each forward; none keeps torch's default."
    )
    ddp_static_graph: bool | None = _field(
        None, "Tell DDP that every step uses the same parameters; none keeps torch's default."
    )
    fsdp: str | None = field(
        default=None,
        metadata={
            "help": "True shards with FSDP2; the words full_shard, shard_grad_op, auto_wrap and offload work as well.",
            "nargs": "?",
            "const": True,
        },
    )
    fsdp_config: dict[str, Any] | str | None = _field(
        None, "Settings of FSDP2: a mapping, JSON text, or a JSON file; keys with or without the prefix fsdp_."
    )
    deepspeed: dict[str, Any] | str | None = _field(None, "DeepSpeed's configuration: a mapping, or a JSON file.")
    accelerator_config: dict[str, Any] | str | None = _field(
        None, "Settings of the Accelerator: a mapping, a JSON file, or an object with such attributes."
    )
    parallelism_config: dict[str, Any] | str | None = _field(
        None, "Sizes of the device mesh: a mapping, or a ParallelismConfig."
    )


@dataclass
class DataFields:
    """Data loading."""

    dataloader_drop_last: bool = _field(False, "Drop the last batch of a training epoch if it is incomplete.")
    dataloader_num_workers: int = _field(0, "Worker processes of each rank's loader; 0 loads in the main process.")
    dataloader_pin_memory: bool = _field(True, "Load batches into pinned memory, which copies to the device faster.")
    dataloader_persistent_workers: bool = _field(False, "Keep workers alive between epochs.")
    dataloader_prefetch_factor: int | None = _field(
        None, "Batches that each worker loads ahead; none keeps torch's default."
    )
    dataloader_multiprocessing_context: str | None = _field(
        None, "How workers are started: fork, spawn or forkserver; none keeps torch's default."
    )
    dataloader_in_order: bool = _field(True, "Yield batches in order, even if a later one is ready first.")
    remove_unused_columns: bool = _field(True, "Drop columns that the model's forward does not take.")
    label_names: list[str] | None = _field(
        None, "Names of the inputs that are labels; none takes them from the model's forward, [] means there are none."
    )
    train_sampling_strategy: Sampling = _field("random", "Order of the training samples.")
    length_column_name: str = _field(
        "length", "Column with the length of each sample, for group_by_length and packing."
    )
    packing: bool = _field(
        False,
        "Pack the training sequences into rows of packing_length tokens, without padding between them; a sample of the "
        "batch sizes is a row then.",
    )
    packing_length: int | None = _field(
        None, "Tokens of a packed row; none takes the longest training sample, which a stream does not know."
    )
    seed: int = _field(42, "Seed of all random generators.")
    data_seed: int | None = _field(None, "Seed of the order of samples; none takes seed.")
    full_determinism: bool = _field(False, "Use deterministic kernels only.")


@dataclass
class CheckpointFields:
    """Checkpoints, and resuming from them."""

    save_strategy: SaveInterval = _field("steps", "When to save: no, steps, epoch or best.")
    save_steps: float = _field(500, "Optimizer steps between two checkpoints; below 1, a fraction of all steps.")
    save_total_limit: int | None = _field(
        None, "Checkpoints to keep, of which one is the best; with 1, the newest and the best. none keeps all."
    )
    save_only_model: bool = _field(False, "Save only weights, from which training cannot be resumed.")
    load_best_model_at_end: bool = _field(False, "Load the best checkpoint at the end of training.")
    metric_for_best_model: str | None = _field(
        None, "Metric that decides which checkpoint is best; none takes the loss."
    )
    greater_is_better: bool | None = _field(
        None, "Whether a higher metric is better; none means yes unless its name ends in loss."
    )
    resume_from_checkpoint: str | None = _field(
        None, "For scripts: the checkpoint to resume from, or true for the newest. The Trainer ignores it."
    )
    ignore_data_skip: bool = _field(False, "Resume at the start of the next epoch instead of within the saved one.")
    restore_callback_states_from_checkpoint: bool = _field(
        False, "No effect: the state of callbacks is always restored."
    )


@dataclass
class EvaluationFields:
    """When and how to evaluate."""

    eval_strategy: Interval = _field("no", "When to evaluate: no, steps or epoch.")
    eval_steps: float | None = _field(
        None, "Optimizer steps between two evaluations; below 1, a fraction of all steps; none takes logging_steps."
    )
    eval_delay: float = _field(0, "Steps or epochs (see eval_strategy) before the first evaluation.")
    eval_on_start: bool = _field(False, "Evaluate before the first step as well.")
    per_device_eval_batch_size: int = _field(8, "Samples of an evaluation batch on each rank.")
    eval_accumulation_steps: int | None = _field(
        None, "Batches after which predictions move to host memory; none moves them before they exceed 256 MiB."
    )
    eval_do_concat_batches: bool = _field(True, "Concatenate predictions; False gives a list with an entry per batch.")
    eval_use_gather_object: bool = _field(False, "Gather predictions by pickling, so that they may be of any type.")
    prediction_loss_only: bool = _field(False, "Let evaluations compute only the loss; predict keeps predictions.")
    include_for_metrics: list[str] = field(
        default_factory=list, metadata={"help": "What else compute_metrics gets: inputs, loss."}
    )
    batch_eval_metrics: bool = _field(False, "Call compute_metrics for each batch, so that no predictions are kept.")


@dataclass
class LoggingFields:
    """What is logged, when, and where to."""

    logging_strategy: Interval = _field("steps", "When to log: no, steps or epoch.")
    logging_steps: float = _field(500, "Optimizer steps between two log entries; below 1, a fraction of all steps.")
    logging_first_step: bool = _field(False, "Log the first step as well.")
    logging_nan_inf_filter: bool = _field(
        True, "Leave NaN and infinite losses out of the logged means, of evaluations too."
    )
    include_num_input_tokens_seen: str = _field("no", "Count input tokens: no, all or non_padding.")
    log_level: str = _field("passive", "Log level of rank 0; passive keeps it.")
    log_level_replica: str = _field("warning", "Log level of the other ranks.")
    disable_tqdm: bool | None = _field(
        None, "Print lines instead of a progress bar; none decides by whether stderr is a terminal."
    )
    report_to: list[str] | str | None = _field(
        "none", "Trackers to report to besides metrics.jsonl: names, or all for those that are installed."
    )
    run_name: str | None = _field(None, "Name of the run in trackers.")
    project: str = _field("paceline", "Name of the project in trackers.")
    push_to_hub: bool = _field(False, "Must be false: paceline uploads nothing.")
    skip_memory_metrics: bool = _field(True, "Leave this rank's peak memory out of the metrics.")
    profile_steps: str | None = _field(
        None, "Optimizer steps to profile: first:last, counted from 1; traces go to output_dir/profile."
    )


@dataclass
class AllFields(
    LoggingFields,
    EvaluationFields,
    CheckpointFields,
    DataFields,
    DistributedFields,
    PrecisionFields,
    OptimizerFields,
    DurationFields,
):
    """All groups, in the order in which help lists them."""
