"""Every field of `TrainingArguments`, grouped by what it decides."""

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


def _says(default: Any, text: str) -> Any:
    """A field with its default and one sentence about it."""
    return field(default=default, metadata={"help": text})


@dataclass
class DurationFields:
    """How long to train, on how much at a time."""

    output_dir: str = _says("trainer_output", "Folder of checkpoints and logs.")
    do_train: bool = _says(False, "For scripts: whether to train.")
    do_eval: bool = _says(False, "For scripts: whether to evaluate.")
    do_predict: bool = _says(False, "For scripts: whether to predict.")
    num_train_epochs: float = _says(3.0, "Passes over the training set; fractions are allowed.")
    max_steps: int = _says(-1, "Optimizer steps; more than 0 overrides num_train_epochs.")
    max_tokens: int | None = _says(
        None, "Stop after this many input tokens over all ranks, padding included, if that comes first."
    )
    per_device_train_batch_size: int = _says(8, "Samples in a micro-batch of one rank.")
    global_batch_size: int | None = _says(
        None,
        "Samples of one optimizer step over all ranks; accumulation is derived, so that the run is the same on any "
        "number of devices, and per_device_train_batch_size is the most that a rank takes at once.",
    )
    gradient_accumulation_steps: int = _says(1, "Micro-batches of one optimizer step; derived by global_batch_size.")
    auto_find_batch_size: bool = _says(
        False, "When memory runs out, start again with half the micro-batch and twice the accumulation."
    )


@dataclass
class OptimizerFields:
    """How parameters move."""

    learning_rate: float = _says(5e-5, "Highest learning rate.")
    weight_decay: float = _says(0.0, "Decay of all parameters but biases and norms.")
    adam_beta1: float = _says(0.9, "First beta of Adam.")
    adam_beta2: float = _says(0.999, "Second beta of Adam.")
    adam_epsilon: float = _says(1e-8, "Epsilon of Adam.")
    max_grad_norm: float = _says(1.0, "Largest gradient norm; 0 clips nothing.")
    optim: str = _says("adamw_torch_fused", "Optimizer, by the names that transformers uses.")
    optim_args: str | None = _says(None, "More arguments of the optimizer, key=value with commas between.")
    lr_scheduler_type: str = _says("linear", "Course of the learning rate.")
    lr_scheduler_kwargs: dict[str, Any] | str | None = _says(None, "More arguments of the schedule; JSON as text.")
    warmup_steps: float = _says(0.0, "Steps over which the learning rate rises; below 1 a share of all steps.")
    warmup_ratio: float | None = _says(None, "Share of all steps over which the learning rate rises.")
    label_smoothing_factor: float = _says(0.0, "Share of the probability that goes to all labels alike.")
    average_tokens_across_devices: bool = _says(
        True, "Weigh losses by the tokens they are over; False takes the mean over micro-batches and ranks."
    )
    neftune_noise_alpha: float | None = _says(None, "Strength of noise on input embeddings while training.")


@dataclass
class PrecisionFields:
    """Precision, memory and compilation."""

    bf16: bool = _says(False, "Compute in bfloat16; unset leaves it to the launcher's configuration.")
    fp16: bool = _says(False, "Compute in float16 with loss scaling; unset leaves it to the configuration.")
    bf16_full_eval: bool = _says(False, "Evaluate with all weights in bfloat16, outside of training.")
    fp16_full_eval: bool = _says(False, "Evaluate with all weights in float16, outside of training.")
    tf32: bool | None = _says(None, "Let fp32 matrix products use TF32; none leaves torch's setting.")
    activation_checkpointing: bool | None = _says(None, "Compute activations again in backward, to save memory.")
    activation_checkpointing_kwargs: dict[str, Any] | str | None = _says(
        None, "Arguments of torch.utils.checkpoint, and every_n_layers."
    )
    gradient_checkpointing: bool = _says(False, "Older name of activation_checkpointing.")
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = _says(
        None, "Older name of activation_checkpointing_kwargs."
    )
    torch_compile: bool = _says(False, "Compile the model's repeated block with torch.compile.")
    torch_compile_backend: str | None = _says(None, "Backend of torch.compile; naming one compiles.")
    torch_compile_mode: str | None = _says(None, "Mode of torch.compile; naming one compiles.")
    torch_empty_cache_steps: int | None = _says(None, "Give cached device memory back every so many steps.")


@dataclass
class DistributedFields:
    """How the run is spread over ranks."""

    use_cpu: bool = _says(False, "Stay on the CPU even where there is an accelerator.")
    strategy: str | None = _says(None, "auto, single, ddp, fsdp or deepspeed; none leaves it to the configuration.")
    ddp_backend: str | None = _says(None, "Backend of torch.distributed; none chooses by the device.")
    ddp_timeout: int = _says(1800, "Seconds that a collective may wait.")
    ddp_find_unused_parameters: bool | None = _says(None, "Let DDP look for parameters without gradient; costs time.")
    ddp_bucket_cap_mb: int | None = _says(None, "Size in MiB of DDP's buckets.")
    ddp_broadcast_buffers: bool | None = _says(None, "Let DDP copy rank 0's buffers before each forward.")
    ddp_static_graph: bool | None = _says(None, "Promise DDP that every step uses the same parameters.")
    fsdp: str | None = field(
        default=None,
        metadata={
            "help": "True shards with FSDP2; full_shard, shard_grad_op, auto_wrap and offload are understood.",
            "nargs": "?",
            "const": True,
        },
    )
    fsdp_config: dict[str, Any] | str | None = _says(
        None, "Settings of FSDP2: a mapping, JSON text or a JSON file; keys with or without fsdp_."
    )
    deepspeed: dict[str, Any] | str | None = _says(None, "DeepSpeed's own configuration: a mapping or a JSON file.")
    accelerator_config: dict[str, Any] | str | None = _says(
        None, "Settings of the Accelerator: a mapping, a JSON file, or an object with such attributes."
    )
    parallelism_config: dict[str, Any] | str | None = _says(None, "Sizes of the mesh: a mapping or ParallelismConfig.")


@dataclass
class DataFields:
    """How data is read."""

    dataloader_drop_last: bool = _says(False, "Leave out an incomplete last batch.")
    dataloader_num_workers: int = _says(0, "Processes that read for each rank.")
    dataloader_pin_memory: bool = _says(True, "Read into memory from which copies to the device do not wait.")
    dataloader_persistent_workers: bool = _says(False, "Keep the readers between passes.")
    dataloader_prefetch_factor: int | None = _says(None, "Batches that each reader prepares ahead.")
    dataloader_multiprocessing_context: str | None = _says(None, "How readers are started: fork, spawn, forkserver.")
    dataloader_in_order: bool = _says(True, "Hand out batches in order, even if a later one is ready.")
    remove_unused_columns: bool = _says(True, "Drop columns that the model's forward does not take.")
    label_names: list[str] | None = _says(
        None, "Names of the inputs that are labels; none looks at the model, [] says that there are none."
    )
    train_sampling_strategy: Sampling = _says("random", "Order of the training samples.")
    length_column_name: str = _says("length", "Column that says how long a sample is, for group_by_length.")
    seed: int = _says(42, "Seed of all generators.")
    data_seed: int | None = _says(None, "Seed of the order of samples; none takes seed.")
    full_determinism: bool = _says(False, "Ask torch for deterministic kernels.")


@dataclass
class CheckpointFields:
    """What is kept."""

    save_strategy: SaveInterval = _says("steps", "When to save: no, steps, epoch or best.")
    save_steps: float = _says(500, "Steps between two checkpoints; below 1 a share of all steps.")
    save_total_limit: int | None = _says(None, "Checkpoints kept besides the best; none keeps all.")
    save_only_model: bool = _says(False, "Save weights without what is needed to go on training.")
    load_best_model_at_end: bool = _says(False, "Load the best checkpoint when training ends.")
    metric_for_best_model: str | None = _says(None, "Which metric decides what is best; none takes the loss.")
    greater_is_better: bool | None = _says(None, "Whether more of it is better; none looks at the name.")
    resume_from_checkpoint: str | None = _says(None, "For scripts: a checkpoint to go on from, or `true`.")
    ignore_data_skip: bool = _says(False, "Begin a new pass when resuming, rather than going on within the old one.")
    restore_callback_states_from_checkpoint: bool = _says(
        False, "Accepted: callbacks that have a state always get it back."
    )


@dataclass
class EvaluationFields:
    """When and how to evaluate."""

    eval_strategy: Interval = _says("no", "When to evaluate: no, steps or epoch.")
    eval_steps: float | None = _says(None, "Steps between two evaluations; none takes logging_steps.")
    eval_delay: float = _says(0, "Steps or epochs before the first evaluation.")
    eval_on_start: bool = _says(False, "Evaluate before the first step.")
    per_device_eval_batch_size: int = _says(8, "Samples in an evaluation batch of one rank.")
    eval_accumulation_steps: int | None = _says(
        None, "Move predictions to host memory every so many batches; none: before they take 256 MiB."
    )
    eval_do_concat_batches: bool = _says(True, "Concatenate predictions; False keeps a list of batches.")
    eval_use_gather_object: bool = _says(False, "Gather predictions of any Python type.")
    prediction_loss_only: bool = _says(False, "Keep no predictions, only the loss.")
    include_for_metrics: list[str] = field(
        default_factory=list, metadata={"help": "What else compute_metrics gets: inputs, loss."}
    )
    batch_eval_metrics: bool = _says(False, "Call compute_metrics on every batch, so that nothing has to be kept.")


@dataclass
class LoggingFields:
    """What is said, and where."""

    logging_strategy: Interval = _says("steps", "When to log: no, steps or epoch.")
    logging_steps: float = _says(500, "Steps between two log entries; below 1 a share of all steps.")
    logging_first_step: bool = _says(False, "Log the first step as well.")
    logging_nan_inf_filter: bool = _says(True, "Leave losses that are no numbers out of the logged mean.")
    include_num_input_tokens_seen: str = _says("no", "Count input tokens: no, all or non_padding.")
    log_level: str = _says("passive", "Level of rank 0's messages; passive leaves it.")
    log_level_replica: str = _says("warning", "Level of the other ranks' messages.")
    disable_tqdm: bool | None = _says(None, "Print lines in place of a progress bar.")
    report_to: list[str] | str | None = _says(
        "none", "Trackers to report to besides metrics.jsonl: names, or all that are installed."
    )
    run_name: str | None = _says(None, "Name of the run in reports.")
    project: str = _says("paceline", "Project of the run in reports.")
    push_to_hub: bool = _says(False, "Only false: paceline uploads nothing.")
    skip_memory_metrics: bool = _says(True, "Leave this rank's peak memory out of the metrics.")
    profile_steps: str | None = _says(None, "Steps to profile, first:last, counted from 1; traces go to output_dir.")


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
    """All groups together, in the order in which help should list them."""
