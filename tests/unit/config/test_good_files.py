"""Files that must be accepted, and what they come to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from paceline.config import FullyShardedDataParallelPlugin, RunConfig
from tests.unit.config.files import DEEPSPEED, FOUNDING, FSDP1, answers, read

if TYPE_CHECKING:
    from pathlib import Path


def fsdp_of(config: RunConfig) -> FullyShardedDataParallelPlugin:
    assert config.fsdp_config is not None
    return config.fsdp_config


def test_the_founding_file_is_accepted_as_it_stands(tmp_path: Path) -> None:
    resolved = read(tmp_path, FOUNDING)
    config = resolved.config
    assert (config.strategy, config.mixed_precision, config.num_processes) == ("fsdp", "bf16", 4)
    assert config.fsdp_config == FullyShardedDataParallelPlugin(
        auto_wrap_policy="TRANSFORMER_BASED_WRAP", transformer_cls_names_to_wrap=("LlamaDecoderLayer",)
    )
    assert resolved.notes == ()


def test_the_founding_file_can_switch_offloading_on(tmp_path: Path) -> None:
    resolved = read(tmp_path, FOUNDING.replace("fsdp_cpu_offload: false", "fsdp_cpu_offload: true"))
    assert fsdp_of(resolved.config).cpu_offload is True
    assert resolved.origin("fsdp_config.fsdp_offload_params").where.endswith("config.yaml:6")


@pytest.mark.parametrize(
    ("text", "strategy", "processes", "cpu"),
    [
        (answers("'NO'", num_processes=1), "single", 1, False),
        (answers("NO", num_processes=1, use_cpu="true"), "single", 1, True),
        (answers("MULTI_CPU", use_cpu="true"), "ddp", 2, True),
        (answers("MULTI_CPU"), "ddp", 2, True),
        (answers("MULTI_GPU", "gpu_ids: all\n", 8), "ddp", 8, False),
        (answers("MULTI_XPU"), "ddp", 2, False),
        (answers("FSDP", FSDP1), "fsdp", 2, False),
        (answers("FSDP", "fsdp_config:\n  fsdp_version: 2\n", 4), "fsdp", 4, False),
        (answers("FSDP"), "fsdp", 2, False),
        (
            answers("MULTI_GPU", "fsdp_config: {}\ndeepspeed_config:\nmegatron_lm_config: {}\n"),
            "ddp",
            2,
            False,
        ),
        (
            answers("MULTI_GPU", "main_process_ip: null\nmain_process_port: null\ntpu_name: null\n"),
            "ddp",
            2,
            False,
        ),
        ("mixed_precision: no\n", "auto", None, False),
        ("distributed_type: no\n", "single", 1, False),
    ],
)
def test_the_answers_of_a_questionnaire_are_accepted(
    tmp_path: Path, text: str, strategy: str, processes: int | None, cpu: bool
) -> None:
    config = read(tmp_path, text).config
    assert (config.strategy, config.num_processes, config.use_cpu) == (strategy, processes, cpu)


def test_a_deepspeed_file_is_accepted(tmp_path: Path) -> None:
    config = read(tmp_path, answers("DEEPSPEED", DEEPSPEED)).config
    assert config.strategy == "deepspeed"
    assert config.deepspeed_config is not None
    assert (config.deepspeed_config.zero_stage, config.deepspeed_config.zero3_init_flag) == (2, False)
    assert config.gradient_accumulation_steps == 1


def test_a_file_of_fsdp_version_1_is_translated_with_a_note_per_key(tmp_path: Path) -> None:
    resolved = read(tmp_path, answers("FSDP", FSDP1))
    plugin = fsdp_of(resolved.config)
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_offload) == (2, False, True)
    assert len(resolved.notes) == 6
    text = "\n".join(resolved.notes)
    assert "config.yaml:24: fsdp_reshard_after_forward SHARD_GRAD_OP (FSDP version 1): became" in text
    for key in ("version", "backward_prefetch", "forward_prefetch", "use_orig_params", "sync_module_states"):
        assert f"fsdp_{key} " in text


def test_keys_of_version_1_that_ask_for_the_usual_are_noted_under_version_2(tmp_path: Path) -> None:
    text = FSDP1.replace("fsdp_version: 1", "fsdp_version: 2").replace("SHARD_GRAD_OP", "true")
    resolved = read(tmp_path, answers("FSDP", text))
    assert len(resolved.notes) == 4
    assert fsdp_of(resolved.config).reshard_after_forward is True


@pytest.mark.parametrize(
    ("named", "reshard"), [("FULL_SHARD", True), ("SHARD_GRAD_OP", False), ("1", True), ("2", False)]
)
def test_a_file_without_a_version_may_name_a_sharding_strategy(tmp_path: Path, named: str, reshard: bool) -> None:
    text = f"distributed_type: FSDP\nfsdp_config:\n  sharding_strategy: {named}\n  use_orig_params: false\n"
    resolved = read(tmp_path, text)
    assert fsdp_of(resolved.config).reshard_after_forward is reshard
    assert len(resolved.notes) == 2
    assert resolved.origin("fsdp_config.fsdp_reshard_after_forward").where.endswith(":3")


def test_hybrid_sharding_is_translated_when_the_copies_are_given(tmp_path: Path) -> None:
    text = (
        "distributed_type: FSDP\nnum_processes: 8\n"
        "fsdp_config:\n  fsdp_sharding_strategy: HYBRID_SHARD_ZERO2\n"
        "parallelism_config:\n  parallelism_config_dp_replicate_size: 2\n"
    )
    resolved = read(tmp_path, text)
    assert fsdp_of(resolved.config).reshard_after_forward is False
    mesh = resolved.config.parallelism_config
    assert mesh is not None
    assert (mesh.dp_replicate_size, mesh.dp_shard_size, mesh.total_size) == (2, 4, 8)


def test_old_top_level_keys_are_moved(tmp_path: Path) -> None:
    resolved = read(tmp_path, "fp16: true\ndynamo_backend: INDUCTOR\ndistributed_type: MULTI_GPU\n")
    assert resolved.config.mixed_precision == "fp16"
    assert resolved.config.dynamo_config.backend == "inductor"
    assert len(resolved.notes) == 2


def test_keys_without_their_prefix_are_accepted(tmp_path: Path) -> None:
    text = (
        "strategy: fsdp\nfsdp_config:\n  offload_params: 'yes'\n  min_num_params: 1e6\n"
        "  auto_wrap_policy: SIZE_BASED_WRAP\ndynamo_config:\n  backend: eager\n  use_dynamic: false\n"
    )
    config = read(tmp_path, text).config
    assert (fsdp_of(config).cpu_offload, fsdp_of(config).min_num_params) == (True, 1_000_000)
    assert (config.dynamo_config.backend, config.dynamo_config.dynamic) == ("eager", False)


@pytest.mark.parametrize("written", ["A,B", "[A, B]", "'A, B'"])
def test_block_classes_are_a_list_or_have_commas(tmp_path: Path, written: str) -> None:
    text = f"strategy: fsdp\nfsdp_config:\n  fsdp_transformer_layer_cls_to_wrap: {written}\n"
    assert fsdp_of(read(tmp_path, text).config).transformer_cls_names_to_wrap == ("A", "B")


@pytest.mark.parametrize(("written", "ids"), [("all", "all"), ("0", "0"), ("0,1", "0,1"), ("[2, 3]", "2,3")])
def test_devices_are_written_in_several_ways(tmp_path: Path, written: str, ids: str) -> None:
    assert read(tmp_path, f"gpu_ids: {written}\n").config.gpu_ids == ids


@pytest.mark.parametrize("word", ["true", "'true'", "yes", "'Yes'", "on", "TRUE"])
def test_words_for_true(tmp_path: Path, word: str) -> None:
    assert read(tmp_path, f"debug: {word}\n").config.debug is True


@pytest.mark.parametrize("word", ["false", "'false'", "no", "'no'", "off"])
def test_words_for_false(tmp_path: Path, word: str) -> None:
    assert read(tmp_path, f"debug: {word}\n", {}, {}, {"debug": True}).config.debug is False


def test_a_merge_key_brings_its_values(tmp_path: Path) -> None:
    text = (
        "fsdp_config:\n  <<: {fsdp_offload_params: true, fsdp_state_dict_type: FULL_STATE_DICT}\n"
        "  fsdp_offload_params: false\nstrategy: fsdp\n"
    )
    plugin = fsdp_of(read(tmp_path, text).config)
    assert (plugin.cpu_offload, plugin.state_dict_type) == (False, "FULL_STATE_DICT")


def test_fsdp_on_the_cpu_is_no_clash(tmp_path: Path) -> None:
    config = read(tmp_path, None, {"cpu": True, "use_fsdp": True, "num_processes": "2"}).config
    assert (config.strategy, config.use_cpu, config.num_processes) == ("fsdp", True, 2)


def test_the_same_paradigm_twice_is_no_clash(tmp_path: Path) -> None:
    assert read(tmp_path, FOUNDING, {"use_fsdp": True}).config.strategy == "fsdp"


def test_devices_are_those_of_one_machine(tmp_path: Path) -> None:
    text = "distributed_type: MULTI_GPU\ngpu_ids: 0,1\nnum_machines: 2\nnum_processes: 4\nmain_process_ip: head\n"
    assert read(tmp_path, text).config.gpu_ids == "0,1"
