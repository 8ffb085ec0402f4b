"""Files of every past version of Accelerate, DeepSpeed's JSON and lines of torchrun, converted."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from paceline.config import resolve
from paceline.config.conversion import Conversion, convert_file, convert_torchrun, is_torchrun
from paceline.config.schema.base import settings_of
from paceline.config.schema.fsdp import FsdpVersion1
from paceline.config.sources.document import read_document
from paceline.errors import ConfigError

FILES = Path(__file__).parents[2] / "data" / "accelerate"

EXPECTED: dict[str, dict[str, object]] = {
    "0.10_fp16": {"distributed_type": "MULTI_GPU", "mixed_precision": "fp16", "num_processes": 2},
    "0.11": {"strategy": "single", "num_processes": 1},
    "0.12": {"strategy": "ddp", "use_cpu": True, "mixed_precision": "bf16", "num_processes": 2},
    "0.13_fsdp_numbers": {
        "strategy": "fsdp",
        "mixed_precision": "fp16",
        "num_processes": 2,
        "fsdp_config.fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_config.fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_config.fsdp_transformer_layer_cls_to_wrap": "BertLayer",
    },
    "0.15_dynamo": {
        "distributed_type": "MULTI_GPU",
        "mixed_precision": "fp16",
        "num_processes": 2,
        "gpu_ids": "all",
        "dynamo_config.dynamo_backend": "inductor",
    },
    "0.17_dynamo": {
        "distributed_type": "MULTI_GPU",
        "mixed_precision": "bf16",
        "num_processes": 2,
        "gpu_ids": "all",
        "dynamo_config.dynamo_backend": "inductor",
        "dynamo_config.dynamo_mode": "reduce-overhead",
        "dynamo_config.dynamo_use_dynamic": False,
        "dynamo_config.dynamo_use_fullgraph": True,
    },
    "0.18_deepspeed": {
        "strategy": "deepspeed",
        "mixed_precision": "bf16",
        "num_processes": 2,
        "deepspeed_config.gradient_accumulation_steps": 4,
        "deepspeed_config.gradient_clipping": 1.0,
        "deepspeed_config.offload_optimizer_device": "cpu",
        "deepspeed_config.offload_param_device": "cpu",
        "deepspeed_config.zero3_init_flag": True,
        "deepspeed_config.zero3_save_16bit_model": True,
        "deepspeed_config.zero_stage": 3,
    },
    "0.26_fsdp": {
        "strategy": "fsdp",
        "mixed_precision": "bf16",
        "num_processes": 4,
        "fsdp_config.fsdp_auto_wrap_policy": "SIZE_BASED_WRAP",
        "fsdp_config.fsdp_min_num_params": 2000,
        "fsdp_config.fsdp_offload_params": True,
        "fsdp_config.fsdp_reshard_after_forward": False,
    },
    "1.6_fsdp2": {
        "strategy": "fsdp",
        "mixed_precision": "bf16",
        "num_processes": 8,
        "fsdp_config.fsdp_activation_checkpointing": True,
        "fsdp_config.fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_config.fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    },
    "1.12_parallelism": {
        "strategy": "fsdp",
        "mixed_precision": "bf16",
        "num_processes": 8,
        "fsdp_config.fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_config.fsdp_reshard_after_forward": False,
        "fsdp_config.fsdp_state_dict_type": "FULL_STATE_DICT",
        "parallelism_config.parallelism_config_dp_replicate_size": 2,
        "parallelism_config.parallelism_config_dp_shard_size": 4,
    },
    "1.15_written": {
        "distributed_type": "MULTI_GPU",
        "mixed_precision": "fp16",
        "num_processes": 2,
        "same_network": False,
    },
}
UNBUILT = {"0.28_mpi", "0.30_sagemaker", "0.34_fp8"}
"""Files whose meaning may not be carried out yet; they are understood, or refused with a way out."""


def test_every_file_is_looked_at() -> None:
    assert {path.stem for path in FILES.iterdir()} == {*EXPECTED, *UNBUILT}


@pytest.mark.parametrize("name", EXPECTED)
def test_files_of_every_version_of_accelerate(name: str, tmp_path: Path) -> None:
    source = FILES / f"{name}.yaml"
    result = convert_file(source)
    assert result.problems == []
    assert result.values == EXPECTED[name]
    assert result.remaining_problems(tmp_path) == ()
    new = tmp_path / "new.yaml"
    new.write_text(result.as_yaml(), encoding="utf-8")
    assert _meaning(new) == _meaning(source)


@pytest.mark.parametrize("path", sorted(FILES.iterdir()), ids=lambda path: path.stem)
def test_there_is_a_line_for_every_key(path: Path) -> None:
    if "sagemaker" in path.stem:
        assert "SAGEMAKER" in str(convert_file(path).problems[0])
        return
    items, _ = read_document(path)
    keys = [f"{item.name}.{child.name}" for item in items for child in item.items or ()]
    keys += [item.name for item in items if not item.items]
    converted = convert_file(path).keys
    assert sorted(key.key for key in converted if key.key != "ipex_config") == sorted(
        key for key in keys if not key.startswith("ipex_config")
    )
    assert all(key.where.startswith(f"{path}:") and key.became for key in converted)


def _meaning(path: Path) -> dict[str, object]:
    """What a file comes to, without the word for the strategy and without what belongs to version 1."""
    explained = resolve(flags={}, env={}, file=path).explain()
    return {key: value for key, value, _ in explained if key != "distributed_type"}


def test_the_lines_say_what_became_of_keys() -> None:
    lines = [str(key).rpartition("yaml:")[2] for key in convert_file(FILES / "0.13_fsdp_numbers.yaml").keys]
    assert lines == [
        "2: compute_environment LOCAL_MACHINE: left out: it is the default",
        "3: distributed_type FSDP: became strategy fsdp",
        "4: downcast_bf16 false: left out: it is the default",
        "6: fsdp_config.fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP: kept",
        "7: fsdp_config.fsdp_backward_prefetch_policy BACKWARD_PRE: left out: "
        "version 2 always prefetches before backward",
        "8: fsdp_config.offload_params false: left out: it is the default",
        "9: fsdp_config.sharding_strategy 1: became fsdp_reshard_after_forward true",
        "10: fsdp_config.fsdp_state_dict_type FULL_STATE_DICT: kept",
        "11: fsdp_config.fsdp_transformer_layer_cls_to_wrap BertLayer: kept",
        "12: machine_rank 0: left out: it is the default",
        "13: main_training_function main: left out: it is the default",
        "14: mixed_precision fp16: kept",
        "15: num_machines 1: left out: it is the default",
        "16: num_processes 2: kept",
        "17: use_cpu false: left out: it is the default",
    ]


def test_every_key_of_fsdp_version_1_has_a_fate(tmp_path: Path) -> None:
    values = {
        "sharding_strategy": "SHARD_GRAD_OP",
        "backward_prefetch": "BACKWARD_PRE",
        "forward_prefetch": "true",
        "use_orig_params": "false",
        "sync_module_states": "true",
    }
    assert values.keys() == {setting.field for setting in settings_of(FsdpVersion1)}
    lines = [f"  fsdp_{name}: {value}" for name, value in values.items()]
    result = _convert(tmp_path, "\n".join(["distributed_type: FSDP", "fsdp_config:", "  fsdp_version: 1", *lines]))
    assert result.values == {"strategy": "fsdp", "fsdp_config.fsdp_reshard_after_forward": False}
    assert len(result.keys) == 2 + len(values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1, fsdp_sharding_strategy: NO_SHARD}", "strategy: ddp"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1, fsdp_sharding_strategy: 4}", "dp_replicate_size"),
        ("distributed_type: FSDP\nfsdp_config:\n  fsdp_state_dict_type: LOCAL_STATE_DICT", "SHARDED_STATE_DICT"),
        ("distributed_type: FSDP\nfsdp_config:\n  fsdp_ofload_params: true", "fsdp_offload_params?"),
        ("mixed_precision: bf61", "bf16?"),
        ("tpu_name: mine", "TPU setting"),
        ("- 1", "mapping"),
    ],
)
def test_what_cannot_be_converted_is_a_problem(tmp_path: Path, text: str, words: str) -> None:
    result = _convert(tmp_path, text)
    assert len(result.problems) == 1
    assert words in str(result.problems[0])
    if "FSDP" in text:
        assert "NOT CONVERTED" in str([str(key) for key in result.keys])


def test_problems_of_a_whole_section_are_those_of_its_keys(tmp_path: Path) -> None:
    result = _convert(tmp_path, "distributed_type: MULTI_GPU\nfsdp_config: {fsdp_offload_params: true}\n")
    assert [problem.key for problem in result.problems] == ["fsdp_config"]


def test_an_update_changes_only_what_is_written_differently_now(tmp_path: Path) -> None:
    file = FILES / "1.6_fsdp2.yaml"
    assert not convert_file(file, compact=False).is_changed
    old = convert_file(FILES / "0.15_dynamo.yaml", compact=False)
    assert old.is_changed
    assert old.values["distributed_type"] == "MULTI_GPU"
    assert old.values["same_network"] is True
    assert old.remaining_problems(tmp_path) == ()


def _convert(folder: Path, text: str, name: str = "old.yaml") -> Conversion:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return convert_file(file)


def test_a_deepspeed_json_becomes_keys(tmp_path: Path) -> None:
    settings = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/fast"}},
    }
    result = _convert(tmp_path, json.dumps(settings), "ds.json")
    assert result.problems == []
    assert result.values == {
        "strategy": "deepspeed",
        "gradient_accumulation_steps": 4,
        "mixed_precision": "bf16",
        "deepspeed_config.gradient_clipping": 1.0,
        "deepspeed_config.zero_stage": 3,
        "deepspeed_config.offload_optimizer_device": "nvme",
        "deepspeed_config.offload_optimizer_nvme_path": "/fast",
    }
    assert len(result.keys) == 9
    assert result.remaining_problems(tmp_path) == ()


def test_a_deepspeed_json_with_more_than_we_have_keys_for_stays(tmp_path: Path) -> None:
    settings = {"fp16": {"enabled": True, "loss_scale": 0}, "zero_optimization": {"stage": 2, "overlap_comm": True}}
    result = _convert(tmp_path, json.dumps(settings), "ds.json")
    assert result.values == {
        "strategy": "deepspeed",
        "deepspeed_config.deepspeed_config_file": str(tmp_path / "ds.json"),
    }
    new = tmp_path / "new.yaml"
    new.write_text(result.as_yaml(), encoding="utf-8")
    config = resolve(flags={}, env={}, file=new).config
    assert config.mixed_precision == "fp16"
    assert config.deepspeed_config is not None
    assert config.deepspeed_config.zero_stage == 2


def test_a_wrong_deepspeed_json_is_reported(tmp_path: Path) -> None:
    result = _convert(tmp_path, '{"zero_optimization": {"stag": 2}, "amp": {"enabled": true}}', "ds.json")
    assert {problem.key for problem in result.problems} == {"amp", "zero_optimization.stag"}


@pytest.mark.parametrize(
    ("line", "values", "command"),
    [
        ("torchrun train.py", {}, "train.py"),
        ("torchrun --standalone --nproc_per_node=4 train.py --lr 1", {"num_processes": 4}, "train.py --lr 1"),
        ("torchrun --nproc-per-node gpu -m pkg.train -x", {}, "--module pkg.train -x"),
        ("torchrun --nproc_per_node cpu a.py", {"use_cpu": True}, "a.py"),
        (
            "OMP_NUM_THREADS=2 CUDA_VISIBLE_DEVICES=1,2 /bin/torchrun --nproc_per_node 2 --max_restarts 3 a.py",
            {"num_cpu_threads_per_process": 2, "gpu_ids": "1,2", "num_processes": 2, "max_restarts": 3},
            "a.py",
        ),
        (
            "python3 -m torch.distributed.run --nnodes 2 --nproc_per_node 8 --node_rank 1 --rdzv_backend c10d "
            "--rdzv_endpoint head:29400 --rdzv_id 7 a.py",
            {
                "num_machines": 2,
                "num_processes": 16,
                "machine_rank": 1,
                "rdzv_backend": "c10d",
                "main_process_ip": "head",
                "main_process_port": 29400,
            },
            "a.py",
        ),
        (
            "torchrun --nnodes 1:4 --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint head:29400 a.py",
            {
                "num_machines": "1:4",
                "num_processes": 8,
                "rdzv_backend": "c10d",
                "main_process_ip": "head",
                "main_process_port": 29400,
            },
            "a.py",
        ),
        (
            "python -m torch.distributed.launch --use_env --master_addr here --master_port 5000 --log-dir logs "
            "-t 3 -r 3 --no-python ./run.sh",
            {"main_process_port": 5000},
            "--no_python --log_dir logs --tee ./run.sh",
        ),
    ],
)
def test_lines_of_torchrun(line: str, values: dict[str, object], command: str) -> None:
    words = shlex.split(line)
    assert is_torchrun(words)
    result = convert_torchrun(words)
    assert result.problems == []
    assert result.values == values
    assert result.command == ("paceline", "launch", *shlex.split(command))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("torchrun --nporc_per_node 2 a.py", "did you mean nproc_per_node?"),
        ("torchrun --nnodes 1:x --nproc_per_node 2 a.py", "1:x machines"),
        ("torchrun --nnodes 2 --nproc_per_node gpu a.py", "give the number of processes"),
        ("torchrun --local_ranks_filter 0 a.py", "--log_dir"),
        ("torchrun --nproc_per_node 2", "there is no script"),
    ],
)
def test_lines_of_torchrun_that_cannot_be_converted(line: str, words: str) -> None:
    result = convert_torchrun(shlex.split(line))
    assert len(result.problems) == 1
    assert words in str(result.problems[0])


def test_files_are_no_lines_of_torchrun() -> None:
    assert not is_torchrun(["old.yaml"])
    assert not is_torchrun(["python", "train.py"])
    assert not is_torchrun([])


def test_every_flag_of_torchrun_is_known() -> None:
    """Torch's own parser knows no flag that the conversion does not."""
    from torch.distributed.run import get_args_parser

    from paceline.config.conversion.torchrun import KNOWN_OPTIONS

    names = {action.dest for action in get_args_parser()._actions if action.option_strings}
    assert names - {"help"} <= {*KNOWN_OPTIONS}


def test_a_file_with_problems_says_so_of_the_right_lines(tmp_path: Path) -> None:
    result = Conversion("nothing", {"mixed_precision": "bf61"})
    problems = result.remaining_problems(tmp_path)
    assert [problem.where for problem in problems] == ["line 4"]
    with pytest.raises(ConfigError):
        raise ConfigError(problems)
