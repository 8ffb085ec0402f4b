"""What the page about Accelerate's surface cannot see in the code: what differs in meaning, and what to do instead.

Names are those of the page's rows: `module.name`, `command --flag`, `key name`, `variable NAME`; those of `INSTEAD` and
`INTERNAL` are regular expressions.
"""

from __future__ import annotations

_FILE = "the key of the file counts, too; Accelerate reads the flag only"
_TRANSLATED = "a file of FSDP version 1 runs as version 2"
_DROPPED = f"{_TRANSLATED}, which has no such setting; a note says so"
_DEVICE = "paceline trains on GPUs and CPUs; run on TPUs with Accelerate itself"
_CLOUD = "start `paceline launch` in the entry point of a job that you create with SageMaker's estimator"
_MEGATRON = "shard with FSDP2 or DeepSpeed: `--use_fsdp`, `--use_deepspeed`"
_PARALLEL = "sizes above 1 are an error; `dp_replicate` and `dp_shard` divide the ranks"
_SEQUENCES = "sizes above 1 are an error here; a script's own ParallelismConfig divides sequences under DeepSpeed"

DIFFERENT: dict[str, str] = {
    # Names
    "inference.prepare_pippy": "a batch may have any number of rows, and the output has as many; inputs of another "
    "form than the example are an error; auto divides by bytes and keeps repeated blocks whole",
    # Commands
    "commands.config.config.get_user_input": "",
    "launch --same_network": _FILE,
    "launch --rdzv_backend": _FILE,
    "launch --enable_cpu_affinity": _FILE,
    "launch --num_processes": "without devices and without a file one process starts, as with Accelerate; a file with "
    "distributed_type MULTI_CPU starts all ranks, also without mpirun",
    "launch --use_fsdp": "shards on CPUs as well, where Accelerate trains whole replicas",
    "launch --fsdp_version": f"{_TRANSLATED}, with a note for each key",
    "launch --fsdp_sharding_strategy": f"{_TRANSLATED}: as `fsdp_reshard_after_forward`; NO_SHARD is an error",
    "launch --fsdp_backward_prefetch": _DROPPED,
    "launch --fsdp_forward_prefetch": _DROPPED,
    "launch --fsdp_use_orig_params": _DROPPED,
    "launch --fsdp_sync_module_states": _DROPPED,
    "launch --fsdp_state_dict_type": "LOCAL_STATE_DICT is an error: use SHARDED_STATE_DICT",
    "launch --offload_optimizer_nvme_path": "reaches the ranks; Accelerate's launcher loses it",
    "launch --offload_param_nvme_path": "reaches the ranks; Accelerate's launcher loses it",
    "launch --fp8_backend": "ao only; te and msamp are an error",
    "launch --parallelism_config_tp_size": _PARALLEL,
    "launch --parallelism_config_cp_size": _PARALLEL,
    "launch --parallelism_config_sp_size": _SEQUENCES,
    "launch --parallelism_config_sp_seq_length_is_variable": "false counts; Accelerate takes any text for true",
    "launch --log_dir": "one folder for each rank, with both streams",
    "launch --tee": "3 or 0: both streams or none",
    "test --config_file": "runs the checks of `paceline test`",
    "config --config_file": "asks the questions of `paceline config`",
    "env --config_file": "prints the report of `paceline env` as well",
    "tpu-config --debug": "prints the command, as with Accelerate; without the flag it is printed, and an error says "
    "that paceline does not run it",
    # Keys
    "key rdzv_backend": _FILE,
    "key same_network": _FILE,
    "key enable_cpu_affinity": _FILE,
    "key distributed_type": "FSDP shards on CPUs as well; MULTI_CPU starts all ranks; XLA and MEGATRON_LM are an error",
    "key mixed_precision": "fp8 is computed by torchao",
    "key compute_environment": "AMAZON_SAGEMAKER can be read and written, and not launched",
    "key fsdp_config": "`fsdp_cpu_offload` is read, too, as `fsdp_offload_params`; unknown keys are an error natively",
    "key fsdp_config.fsdp_version": f"{_TRANSLATED}, with a note for each key",
    "key fsdp_config.fsdp_sharding_strategy": f"{_TRANSLATED}: as `fsdp_reshard_after_forward`; NO_SHARD is an error",
    "key fsdp_config.fsdp_backward_prefetch": _DROPPED,
    "key fsdp_config.fsdp_forward_prefetch": _DROPPED,
    "key fsdp_config.fsdp_use_orig_params": _DROPPED,
    "key fsdp_config.fsdp_sync_module_states": _DROPPED,
    "key fsdp_config.fsdp_state_dict_type": "LOCAL_STATE_DICT is an error: use SHARDED_STATE_DICT",
    "key deepspeed_config.offload_optimizer_nvme_path": "reaches the ranks; Accelerate's launcher loses it",
    "key deepspeed_config.offload_param_nvme_path": "reaches the ranks; Accelerate's launcher loses it",
    "key fp8_config.fp8_backend": "ao only; te and msamp are an error",
    "key parallelism_config.parallelism_config_tp_size": _PARALLEL,
    "key parallelism_config.parallelism_config_cp_size": _PARALLEL,
    "key parallelism_config.parallelism_config_sp_size": _SEQUENCES,
    **{
        f"key {name} (SageMaker)": "can be read and written, and not launched: " + _CLOUD
        for name in (
            *("ec2_instance_type", "iam_role_name", "image_uri", "profile", "region", "base_job_name"),
            *("pytorch_version", "transformers_version", "py_version", "sagemaker_inputs_file"),
            *("sagemaker_metrics_file", "additional_args"),
        )
    },
    # Names
    "commands.launch.launch_command": "runs `paceline launch`; a failure ends the program with its exit code",
    "commands.launch.simple_launcher": "the same as `launch_command`",
    "commands.launch.multi_gpu_launcher": "the same as `launch_command`",
    "commands.launch.deepspeed_launcher": "the same as `launch_command`",
    "commands.config.config.config_command": "asks the questions of `paceline config`",
    "commands.test.test_command": "runs the checks of `paceline test`",
    "commands.env.env_command": "prints the report of `paceline env` as well",
    "commands.tpu.tpu_command_launcher": "prints the command; does not run it",
    "commands.estimate.create_empty_model": "takes a folder with a configuration, too",
    "commands.config.config_args.ClusterConfig": "keys of paceline become attributes, too",
    "commands.config.config_args.default_config_file": "paceline's own file if there is one, else Accelerate's",
    "commands.config.config_args.default_json_config_file": "paceline's own file if there is one, else Accelerate's",
    "commands.config.config_args.default_yaml_config_file": "paceline's own file if there is one, else Accelerate's",
    **{
        f"data_loader.{name}": "a loader knows its position without a correction for batches that were read ahead"
        for name in ("DataLoaderAdapter", "DataLoaderDispatcher", "DataLoaderShard", "SkipDataLoader")
    },
    "utils.dataclasses.FullyShardedDataParallelPlugin": "fsdp_version=1 runs as version 2; FSDP shards on CPUs as well",
    # Variables
    "variable PARALLELISM_CONFIG_TP_SIZE": _PARALLEL,
    "variable PARALLELISM_CONFIG_CP_SIZE": _PARALLEL,
    "variable PARALLELISM_CONFIG_SP_SIZE": "above 1 it is an error without DeepSpeed",
    "variable FSDP_VERSION": f"{_TRANSLATED}, with a note",
}
DIFFERENT = {name: text for name, text in DIFFERENT.items() if text}

INSTEAD: dict[str, str] = {
    r"launch --(tpu|tpu_cluster|no_tpu_cluster|tpu_use_sudo|vm|env|main_training_function|downcast_bf16)": _DEVICE,
    r"launch --(use_megatron_lm|megatron_lm_.*)": _MEGATRON,
    r"launch --aws_.*": _CLOUD,
    r"launch --role": "all ranks have one role; leave it out",
    r"launch --fp8_opt_level": "a level of MS-AMP: use torchao (`--fp8_backend ao`)",
    r"launch --fp8_(margin|interval|format|amax_.*|override_.*|use_autocast_.*)": (
        "a setting of Transformer Engine: use torchao (`--fp8_backend ao`)"
    ),
    r"key (tpu_.*|commands|command_file|main_training_function|downcast_bf16)": (
        f"{_DEVICE}; a file with another `distributed_type` may have the key, and `accelerate tpu-config` reads it"
    ),
    r"key megatron_lm_config(\..*)?": _MEGATRON,
    r"key fp8_config\.fp8_opt_level": "a level of MS-AMP: use torchao",
    r"key fp8_config\.fp8_(margin|interval|format|amax_.*|override_.*|use_autocast_.*)": (
        "a setting of Transformer Engine: use torchao"
    ),
    r"variable (ACCELERATE_DOWNCAST_BF16|XLA_.*|ACCELERATE_IN_TPU_POD)": _DEVICE,
    r"variable .*SAGEMAKER.*": _CLOUD,
    r"variable (ACCELERATE_USE_MEGATRON_LM|MEGATRON_LM_.*)": _MEGATRON,
    r"variable ACCELERATE_FP8_OPT_LEVEL": "a level of MS-AMP: use torchao",
    r"variable ACCELERATE_FP8_(ENABLE_FSDP_FLOAT8_ALL_GATHER|PAD_INNER_DIM)": "write it in `fp8_config` of the file",
    r"variable ACCELERATE_FP8_(MARGIN|INTERVAL|FORMAT|AMAX_.*|OVERRIDE_.*|USE_AUTOCAST_.*)": (
        "a setting of Transformer Engine: use torchao"
    ),
    r"variable ACCELERATE_BYPASS_DEVICE_MAP": "train a model that was loaded without a device_map",
    r"variable ACCELERATE_ALLOW_CP_STANDALONE": "context parallelism is an error; shorten the samples, or checkpoint",
    r"variable NCCL_.*": "set it yourself: paceline changes no setting of NCCL",
}
INTERNAL: dict[str, str] = {
    r"commands\.launch\.(CustomHelpFormatter|clean_option)": "inner part: `launch_command_parser()` has the help",
    r"commands\.utils\.CustomArgumentGroup": "inner part: `CustomArgumentParser` reads both spellings by itself",
    r"inference\..*": "inner part: `paceline.placement.pipeline_model` does it",
    r"optimizer\.(move_to_device|patch_optimizer_step)": "inner part: `prepare` places and watches optimizers",
    r"state\.(ThreadLocalSharedDict|do_nothing)": "inner part of TPU runs",
    r"utils\.ao\..*": "inner part: `convert_model_to_fp8_ao` takes a filter of its own",
    r"utils\.bnb\..*": "inner part: load the model with transformers' BitsAndBytesConfig",
    r"utils\.operations\..*": "inner part: ACCELERATE_DEBUG_MODE checks shapes before each collective",
}
# Keys that the stand-in reads and paceline's own schema does not.
VALUES: tuple[str, ...] = ("compute_environment",)
