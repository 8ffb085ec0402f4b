"""Settings that contradict each other, that nothing would read, or that this release does not carry out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.config.files import DEEPSPEED, FOUNDING, answers, problems, read

if TYPE_CHECKING:
    from pathlib import Path

F, P, DS = "fsdp_config", "parallelism_config", "deepspeed_config"
FSDP = "strategy: fsdp\nfsdp_config:\n"

CLASHES: list[tuple[str, dict[str, Any], str, str, str]] = [
    (
        FOUNDING,
        {"multi_gpu": True},
        "--multi_gpu",
        "distributed_type",
        "MULTI_GPU contradicts FSDP at config.yaml:2",
    ),
    (
        "debug: true",
        {"multi_gpu": True, "use_fsdp": True},
        "--use_fsdp",
        "",
        "conflicts with --multi_gpu",
    ),
    (
        "strategy: ddp\ndistributed_type: FSDP",
        {},
        "config.yaml:1",
        "strategy",
        "ddp contradicts distributed_type FSDP at config.yaml:2",
    ),
    (answers("MULTI_GPU"), {"cpu": True}, "--cpu", "use_cpu", "conflicts with distributed_type MULTI_GPU"),
    (
        "distributed_type: 'NO'",
        {"num_processes": "4"},
        "--num_processes",
        "num_processes",
        "config.yaml:1 has distributed_type NO",
    ),
    (
        "strategy: single\nnum_processes: 2",
        {},
        "config.yaml:2",
        "num_processes",
        "config.yaml:1 has strategy single",
    ),
    ("use_cpu: true\ngpu_ids: 0,1", {}, "config.yaml:2", "gpu_ids", "use_cpu is true (config.yaml:1)"),
    ("num_processes: 4\ngpu_ids: 0,1", {}, "config.yaml:2", "gpu_ids", "names 2 devices"),
    (
        "num_processes: 6\ngpu_ids: 0,1\nnum_machines: 2\nmain_process_ip: a",
        {},
        "config.yaml:2",
        "gpu_ids",
        "over 2 machines",
    ),
    ("strategy: ddp\nfsdp_config:\n  fsdp_version: 2", {}, "config.yaml:3", F, "unused settings: fsdp_version"),
    (
        "strategy: ddp\nfsdp_config:\n  fsdp_sharding_strategy: HYBRID_SHARD",
        {},
        "config.yaml:3",
        F,
        "unused settings: fsdp_sharding_strategy",
    ),
    (
        "strategy: fsdp\nddp_config:\n  ddp_static_graph: true",
        {},
        "config.yaml:3",
        "ddp_config",
        "unused settings: ddp_static_graph",
    ),
    (DEEPSPEED, {}, "config.yaml:2", DS, "the strategy is auto"),
    (
        "megatron_lm_config:\n  megatron_lm_tp_degree: 2",
        {},
        "config.yaml:2",
        "megatron_lm_config",
        "strategy is auto",
    ),
    ("strategy: fsdp\n" + DEEPSPEED, {}, "config.yaml:3", DS, "unused settings: gradient_accumulation_steps"),
    (
        "strategy: single",
        {"fsdp_offload_params": "true"},
        "--fsdp_offload_params",
        F,
        "the strategy is single (config.yaml:1)",
    ),
    (
        "strategy: ddp\nparallelism_config:\n  dp_replicate_size: 2",
        {},
        "config.yaml:3",
        P,
        "unused settings: parallelism_config_dp_replicate_size",
    ),
    (
        f"{FSDP}  fsdp_min_num_params: 1e6",
        {},
        "config.yaml:3",
        f"{F}.fsdp_min_num_params",
        "1000000 is not used",
    ),
    (
        f"{FSDP}  fsdp_auto_wrap_policy: NO_WRAP\n  fsdp_transformer_layer_cls_to_wrap: A",
        {},
        "config.yaml:4",
        f"{F}.fsdp_transformer_layer_cls_to_wrap",
        "A is not used",
    ),
    (
        f"{FSDP}  fsdp_activation_checkpointing_offload: true",
        {},
        "config.yaml:3",
        f"{F}.fsdp_activation_checkpointing_offload",
        "true without activation checkpointing",
    ),
    (
        f"{FSDP}  fsdp_offload_params: true\n  fsdp_cpu_offload: true",
        {},
        "config.yaml:4",
        f"{F}.fsdp_offload_params",
        "config.yaml:3 sets it too",
    ),
    (
        "dynamo_config:\n  dynamo_mode: max-autotune",
        {},
        "config.yaml:2",
        "dynamo_config.dynamo_mode",
        "dynamo_backend is auto, which chooses by itself",
    ),
    (
        "dynamo_backend: eager\ndynamo_config:\n  dynamo_backend: inductor",
        {},
        "config.yaml:3",
        "dynamo_config.dynamo_backend",
        "config.yaml:1 sets it too",
    ),
    (
        "mixed_precision: bf16\nfp8_config:\n  backend: AO",
        {},
        "config.yaml:3",
        "fp8_config",
        "mixed_precision is bf16",
    ),
    (
        "fp16: true\nmixed_precision: bf16",
        {},
        "config.yaml:2",
        "mixed_precision",
        "config.yaml:1 sets it too",
    ),
    ("machine_rank: 1", {}, "config.yaml:1", "machine_rank", "there is one machine"),
    ("main_process_ip: 10.0.0.1", {}, "config.yaml:1", "main_process_ip", "there is one machine"),
    ("rdzv_backend: c10d", {}, "config.yaml:1", "rdzv_backend", "there is one machine"),
    ("preflight: false", {}, "config.yaml:1", "preflight", "there is one machine"),
    ("num_machines: 2:4", {}, "config.yaml:1", "rdzv_backend", "num_machines is 2:4"),
    ("num_machines: 4:2\nrdzv_backend: c10d", {}, "config.yaml:1", "num_machines", "MIN must not be greater than MAX"),
    ("num_machines: 2\nmachine_rank: 2", {}, "config.yaml:2", "machine_rank", "they count from 0"),
    ("num_machines: 2\nnum_processes: 3", {}, "config.yaml:2", "num_processes", "a multiple of 2"),
    ("num_machines: 2\nrdzv_conf: timeot=3", {}, "config.yaml:2", "rdzv_conf", "the options are timeout"),
    ("num_machines: 2\nrdzv_conf: timeout=no", {}, "config.yaml:2", "rdzv_conf", "not a number above 0"),
    (
        "num_machines: 2\nrdzv_conf: timeout=no,timeot=3",
        {},
        "config.yaml:2",
        "rdzv_conf",
        "not a number above 0, and 'timeot=3' is not an option",
    ),
    (
        "num_machines: 2\nrdzv_backend: c01d",
        {},
        "config.yaml:2",
        "rdzv_backend",
        "is not a rendezvous backend",
    ),
    (
        "parallelism_config:\n  cp_comm_strategy: alltoall",
        {},
        "config.yaml:2",
        f"{P}.parallelism_config_cp_comm_strategy",
        "cp_size is 1",
    ),
    (
        "parallelism_config:\n  sp_seq_length: 64",
        {},
        "config.yaml:2",
        f"{P}.parallelism_config_sp_seq_length",
        "sp_size is 1",
    ),
    (
        "strategy: fsdp\nnum_processes: 6\nparallelism_config:\n  dp_replicate_size: 4",
        {},
        "config.yaml:4",
        f"{P}.parallelism_config_dp_replicate_size",
        "num_processes is 6 (config.yaml:2)",
    ),
    (
        "strategy: fsdp\nnum_processes: 8\nparallelism_config:\n  dp_replicate_size: 2\n  dp_shard_size: 2",
        {},
        "config.yaml:4",
        P,
        "is 4",
    ),
    (
        "debug: true",
        {"use_parallelism_config": True},
        "--use_parallelism_config",
        P,
        "there is nothing to use",
    ),
    (
        f"{FSDP}  fsdp_version: 2\n  fsdp_use_orig_params: false",
        {},
        "config.yaml:4",
        f"{F}.fsdp_use_orig_params",
        "version 2 always keeps the original parameters",
    ),
    (
        f"{FSDP}  fsdp_version: 2\n  fsdp_forward_prefetch: true",
        {},
        "config.yaml:4",
        f"{F}.fsdp_forward_prefetch",
        "remove the key",
    ),
    (
        f"{FSDP}  fsdp_version: 2\n  fsdp_reshard_after_forward: SHARD_GRAD_OP",
        {},
        "config.yaml:4",
        f"{F}.fsdp_reshard_after_forward",
        "write fsdp_reshard_after_forward: false",
    ),
    (
        f"{FSDP}  fsdp_sharding_strategy: NO_SHARD",
        {},
        "config.yaml:3",
        f"{F}.fsdp_sharding_strategy",
        "write strategy: ddp",
    ),
    (
        f"{FSDP}  fsdp_sharding_strategy: 4",
        {},
        "config.yaml:3",
        f"{F}.fsdp_sharding_strategy",
        "parallelism_config_dp_replicate_size: N",
    ),
    (
        f"{FSDP}  fsdp_sharding_strategy: FULL_SHARD\n  fsdp_reshard_after_forward: false",
        {},
        "config.yaml:3",
        f"{F}.fsdp_sharding_strategy",
        "config.yaml:4 has fsdp_reshard_after_forward false",
    ),
    (
        f"{FSDP}  fsdp_version: 1\n  fsdp_state_dict_type: LOCAL_STATE_DICT",
        {},
        "config.yaml:4",
        f"{F}.fsdp_state_dict_type",
        "write SHARDED_STATE_DICT",
    ),
    (
        "strategy: fsdp",
        {"zero_stage": 3, "debug": True, "num-machine": 2},
        "--num_machine",
        "",
        "did you mean num_machines?",
    ),
]

DEEPSPEED_CLASHES = [
    (
        "  zero_stage: 2\n  offload_param_device: cpu",
        4,
        "offload_param_device",
        "only stage 3 shards parameters",
    ),
    ("  zero_stage: 1\n  zero3_init_flag: true", 4, "zero3_init_flag", "only stage 3 shards parameters"),
    (
        "  deepspeed_multinode_launcher: standard\n  deepspeed_hostfile: hosts",
        4,
        "deepspeed_hostfile",
        "deepspeed_multinode_launcher is standard (config.yaml:3)",
    ),
    ("  zero_stage: 4", 3, "zero_stage", "at least 0 and at most 3"),
    (
        "  zero_stage: 3\n  offload_optimizer_device: nvme",
        4,
        "offload_optimizer_device",
        "set offload_optimizer_nvme_path",
    ),
    (
        "  offload_optimizer_device: nvme\n  offload_optimizer_nvme_path: /x",
        3,
        "offload_optimizer_device",
        "only stage 3 keeps optimizer state on a disk",
    ),
    (
        "  zero_stage: 0\n  offload_optimizer_device: cpu",
        4,
        "offload_optimizer_device",
        "stage 0 does not shard the optimizer",
    ),
    (
        "  offload_optimizer_nvme_path: /x",
        3,
        "offload_optimizer_nvme_path",
        "offload_optimizer_device is none",
    ),
]

NOT_BUILT = [
    (
        "distributed_type: MEGATRON_LM\nmegatron_lm_config:\n  megatron_lm_tp_degree: 2",
        1,
        "distributed_type",
        "FSDP",
    ),
    ("distributed_type: XLA", 1, "distributed_type", "use a machine with GPUs"),
    ("tpu_name: x", 1, "tpu_name", "remove the key"),
    ("downcast_bf16: true", 1, "downcast_bf16", "remove the key"),
    ("main_training_function: train", 1, "main_training_function", "remove the key"),
    (
        "num_machines: 2\nrdzv_backend: etcd",
        2,
        "rdzv_backend",
        "write static, or c10d",
    ),
    ("parallelism_config:\n  tp_size: 2", 2, "parallelism_config.parallelism_config_tp_size", "write 1"),
    ("parallelism_config:\n  cp_size: 2", 2, "parallelism_config.parallelism_config_cp_size", "write 1"),
    (
        "parallelism_config:\n  sp_size: 2",
        2,
        "parallelism_config.parallelism_config_sp_size",
        "start with --as_accelerate --use_deepspeed, and let the script pass ParallelismConfig(sp_size=2)",
    ),
    (
        "strategy: deepspeed\nas_accelerate: true\nparallelism_config:\n  sp_size: 4",
        4,
        "parallelism_config.parallelism_config_sp_size",
        "or leave it out, and let the script pass ParallelismConfig(sp_size=4) to its Accelerator",
    ),
    (
        "debug: true\ncompute_environment: AMAZON_SAGEMAKER\niam_role_name: x",
        2,
        "compute_environment",
        "LOCAL_MACHINE",
    ),
]


@pytest.mark.parametrize(("text", "flags", "where", "key", "part"), CLASHES)
def test_a_clash_names_its_sources(
    tmp_path: Path, text: str, flags: dict[str, Any], where: str, key: str, part: str
) -> None:
    found = problems(tmp_path, text, flags)
    matching = [p for p in found if (p.where, p.key) == (where, key)]
    assert matching, found
    assert any(part in str(p) for p in matching), matching
    assert len(found) <= 2 if "zero_stage" in flags else len(found) == 1, found


@pytest.mark.parametrize(("lines", "line", "key", "part"), DEEPSPEED_CLASHES)
def test_the_deepspeed_section_is_checked(tmp_path: Path, lines: str, line: int, key: str, part: str) -> None:
    [found] = problems(tmp_path, f"distributed_type: DEEPSPEED\n{DS}:\n{lines}")
    assert (found.where, found.key) == (f"config.yaml:{line}", f"{DS}.{key}")
    assert part in str(found)


def test_two_accumulation_settings_clash(tmp_path: Path) -> None:
    section = f"{DS}:\n  gradient_accumulation_steps: 4"
    text = f"distributed_type: DEEPSPEED\ngradient_accumulation_steps: 2\n{section}"
    found = problems(tmp_path, text)
    assert ("config.yaml:2", "gradient_accumulation_steps") in [(p.where, p.key) for p in found]


@pytest.mark.parametrize(("text", "line", "key", "todo"), NOT_BUILT)
def test_what_is_not_built_says_so_and_names_the_way_out(
    tmp_path: Path, text: str, line: int, key: str, todo: str
) -> None:
    [found] = problems(tmp_path, text)
    assert (found.where, found.key) == (f"config.yaml:{line}", key)
    assert "not supported in this release" in found.what
    assert todo in found.hint


def test_mpirun_starts_ranks_on_processors(tmp_path: Path) -> None:
    text = "mpirun_config:\n  mpirun_hostfile: hosts\nnum_processes: 4"
    [found] = problems(tmp_path, text)
    assert (found.where, found.key) == ("config.yaml:2", "mpirun_config")
    assert "distributed_type: MULTI_CPU" in found.hint
    read(tmp_path, f"{text}\ndistributed_type: MULTI_CPU")


FP8 = [
    ("use_cpu: true", 1, "mixed_precision", "write mixed_precision: bf16"),
    ("dynamo_backend: 'no'", 2, "mixed_precision", "fp8 compiles the model's blocks by itself"),
    ("strategy: deepspeed", 1, "mixed_precision", "write strategy: fsdp"),
    ("fp8_config:\n  backend: TE", 3, "fp8_config.fp8_backend", "write AO"),
    ("fp8_config:\n  amax_history_length: 16", 3, "fp8_config.fp8_amax_history_len", "remove the key"),
]


@pytest.mark.parametrize(("text", "line", "key", "todo"), FP8)
def test_what_fp8_cannot_be_combined_with(tmp_path: Path, text: str, line: int, key: str, todo: str) -> None:
    [found] = problems(tmp_path, f"mixed_precision: fp8\n{text}")
    assert (found.where, found.key) == (f"config.yaml:{line}", key)
    assert todo in found.hint
