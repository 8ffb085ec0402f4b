"""Typos, wrong types and unreadable files: each is reported at its line with what was meant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from paceline.config import resolve
from paceline.errors import ConfigError, Problem
from tests.unit.config.files import FOUNDING, problems

if TYPE_CHECKING:
    from pathlib import Path

F, P, DS, DY, Q, M = (
    "fsdp_config",
    "parallelism_config",
    "deepspeed_config",
    "dynamo_config",
    "fp8_config",
    "mpirun_config",
)

TYPOS = [
    ("use_fsdp: true\n", 1, "use_fsdp", "in a file, write distributed_type: FSDP"),
    ("ddp: true\n", 1, "ddp", "in a file, write distributed_type: MULTI_GPU"),
    ("cpu: true\n", 1, "cpu", "that is a flag; in a file, its key is use_cpu"),
    ("mixed_precison: bf16", 1, "mixed_precison", "did you mean mixed_precision?"),
    ("debug: true\nnum_proceses: 2", 2, "num_proceses", "did you mean num_processes?"),
    ("distribted_type: FSDP", 1, "distribted_type", "did you mean distributed_type?"),
    ("fsdp_confg: {}", 1, "fsdp_confg", "did you mean fsdp_config?"),
    ("Mixed_Precision: bf16", 1, "Mixed_Precision", "did you mean mixed_precision?"),
    ("fsdp_offload_params: true", 1, "fsdp_offload_params", "it belongs in fsdp_config"),
    ("zero_stage: 3", 1, "zero_stage", "it belongs in deepspeed_config"),
    ("fsdp_ofload_params: true", 1, "fsdp_ofload_params", "did you mean fsdp_offload_params in fsdp_config?"),
    ("nonsense_qqq: 1", 1, "nonsense_qqq", ""),
    ("1: x", 1, "1", ""),
    (f"{F}:\n  fsdp_ofload_params: true", 2, f"{F}.fsdp_ofload_params", "did you mean fsdp_offload_params?"),
    (f"{F}:\n  ofload_params: true", 2, f"{F}.ofload_params", "did you mean offload_params?"),
    (
        f"{F}:\n  fsdp_version: 2\n  fsdp_cpu_ofload: true",
        3,
        f"{F}.fsdp_cpu_ofload",
        "did you mean fsdp_cpu_offload?",
    ),
    (
        f"{F}:\n  fsdp_sharding_stategy: 1",
        2,
        f"{F}.fsdp_sharding_stategy",
        "did you mean fsdp_sharding_strategy?",
    ),
    (f"{F}:\n  mixed_precision: bf16", 2, f"{F}.mixed_precision", "it belongs at the top level"),
    (f"{F}:\n  fsdp_x: {{a: {{b: 1}}}}", 2, f"{F}.fsdp_x", ""),
    (f"{DS}:\n  zero_stge: 2", 2, f"{DS}.zero_stge", "did you mean zero_stage?"),
    (
        f"{DS}:\n  offload_optimiser_device: cpu",
        2,
        f"{DS}.offload_optimiser_device",
        "did you mean offload_optimizer_device?",
    ),
    (
        f"{P}:\n  parallelism_config_tp_sise: 1",
        2,
        f"{P}.parallelism_config_tp_sise",
        "did you mean parallelism_config_tp_size?",
    ),
    (f"{P}:\n  dp_replicat_size: 2", 2, f"{P}.dp_replicat_size", "did you mean dp_replicate_size?"),
    (f"{DY}:\n  dynamo_backnd: eager", 2, f"{DY}.dynamo_backnd", "did you mean dynamo_backend?"),
    (f"{Q}:\n  fp8_margn: 1", 2, f"{Q}.fp8_margn", "did you mean fp8_margin?"),
    (f"{M}:\n  mpirun_hostfil: x", 2, f"{M}.mpirun_hostfil", "did you mean mpirun_hostfile?"),
    (
        "megatron_lm_config:\n  megatron_lm_tp_degre: 2",
        2,
        "megatron_lm_config.megatron_lm_tp_degre",
        "did you mean megatron_lm_tp_degree?",
    ),
    ("ddp_config:\n  ddp_bucket_cap: 2", 2, "ddp_config.ddp_bucket_cap", "did you mean ddp_bucket_cap_mb?"),
]

TYPES = [
    (
        "num_processes: two",
        1,
        "num_processes",
        "the text 'two' is not allowed",
        "it must be a whole number",
        "",
    ),
    (
        "num_processes: '2'",
        1,
        "num_processes",
        "the text '2' is not allowed",
        "it must be a whole number",
        "remove the quotes",
    ),
    ("num_processes: 0", 1, "num_processes", "the number 0 is out of range", "it must be at least 1", ""),
    ("num_processes: -1", 1, "num_processes", "the number -1 is out of range", "it must be at least 1", ""),
    (
        "num_processes: 2.5",
        1,
        "num_processes",
        "the number 2.5 is not allowed",
        "it must be a whole number",
        "",
    ),
    (
        "num_processes: true",
        1,
        "num_processes",
        "the boolean true is not allowed",
        "it must be a whole number",
        "",
    ),
    (
        "num_processes: [1, 2]",
        1,
        "num_processes",
        "the list [1, 2] is not allowed",
        "it must be a whole number",
        "",
    ),
    ("debug: maybe", 1, "debug", "the text 'maybe' is not allowed", "it must be true or false", ""),
    ("debug: 1", 1, "debug", "the number 1 is not allowed", "it must be true or false", ""),
    (
        "mixed_precision: bf61",
        1,
        "mixed_precision",
        "the text 'bf61' is not allowed",
        "it must be one of no, fp16, bf16, fp8",
        "did you mean bf16?",
    ),
    (
        "distributed_type: FSPD",
        1,
        "distributed_type",
        "the text 'FSPD' is not allowed",
        None,
        "did you mean FSDP?",
    ),
    (
        "strategy: fsdp2",
        1,
        "strategy",
        "the text 'fsdp2' is not allowed",
        "it must be one of auto, single, ddp, fsdp, deepspeed",
        "did you mean fsdp?",
    ),
    (
        "main_process_port: 70000",
        1,
        "main_process_port",
        "the number 70000 is out of range",
        "it must be at least 0 and at most 65535",
        "",
    ),
    ("timeout: 0", 1, "timeout", "the number 0.0 is out of range", "it must be more than 0", ""),
    ("timeout: .nan", 1, "timeout", "the number nan is not allowed", "it must be a number", ""),
    ("timeout: .inf", 1, "timeout", "the number inf is not allowed", "it must be a number", ""),
    ("gpu_ids: 0,0", 1, "gpu_ids", "the text '0,0' cannot be used", "a device is listed twice", ""),
    ("gpu_ids: '0,,1'", 1, "gpu_ids", "the text '0,,1' cannot be used", None, ""),
    (
        f"{F}: 5",
        1,
        F,
        "5 is not allowed",
        "a section holds keys and values",
        "indent the section's keys under fsdp_config:",
    ),
    (
        f"{F}:\n- fsdp_version: 2",
        1,
        F,
        "[{'fsdp_version': 2}] is not allowed",
        "a section holds keys and values",
        None,
    ),
    (
        f"{F}:\n  fsdp_version: 3",
        2,
        f"{F}.fsdp_version",
        "the number 3 is not allowed",
        "it must be one of 1, 2",
        "",
    ),
    (
        f"{F}:\n  fsdp_offload_params: cpu",
        2,
        f"{F}.fsdp_offload_params",
        "the text 'cpu' is not allowed",
        "it must be true or false",
        "",
    ),
    (
        f"{F}:\n  fsdp_cpu_offload: cpu",
        2,
        f"{F}.fsdp_offload_params",
        "the text 'cpu' is not allowed",
        "it must be true or false",
        "",
    ),
    (
        f"{F}:\n  fsdp_auto_wrap_policy: TRANSFORMER_WRAP",
        2,
        f"{F}.fsdp_auto_wrap_policy",
        "the text 'TRANSFORMER_WRAP' is not allowed",
        None,
        "did you mean TRANSFORMER_BASED_WRAP?",
    ),
    (
        f"{F}:\n  fsdp_reshard_after_forward: sometimes",
        2,
        f"{F}.fsdp_reshard_after_forward",
        "the text 'sometimes' is not allowed",
        "it must be true or false or a whole number",
        "",
    ),
    (
        f"{F}:\n  fsdp_transformer_layer_cls_to_wrap: 3",
        2,
        f"{F}.fsdp_transformer_layer_cls_to_wrap",
        "the number 3 is not allowed",
        "it must be a list or comma-separated text",
        "",
    ),
    (
        f"{F}:\n  fsdp_sharding_strategy: FULL_SHRD",
        2,
        f"{F}.fsdp_sharding_strategy",
        "the text 'FULL_SHRD' is not allowed",
        None,
        "did you mean FULL_SHARD?",
    ),
    (
        f"{F}:\n  fsdp_ignored_modules: '('",
        2,
        f"{F}.fsdp_ignored_modules",
        "'(' is not a regular expression",
        None,
        "",
    ),
    (
        f"{F}:\n  fsdp_reduce_dtype: int8",
        2,
        f"{F}.fsdp_reduce_dtype",
        "the text 'int8' is not allowed",
        "it must be one of fp32, bf16, fp16",
        "",
    ),
    (
        f"{DY}:\n  dynamo_backend: inducter",
        2,
        f"{DY}.dynamo_backend",
        "the text 'inducter' is not allowed",
        None,
        "did you mean inductor?",
    ),
    (
        f"{P}:\n  dp_shard_size: 0",
        2,
        f"{P}.parallelism_config_dp_shard_size",
        "the number 0 is out of range",
        "it must be at least 1",
        "",
    ),
    (
        "ddp_config:\n  ddp_comm_hook: powersgd",
        2,
        "ddp_config.ddp_comm_hook",
        "the text 'powersgd' is not allowed",
        None,
        "did you mean power_sgd?",
    ),
    (
        "gradient_accumulation_steps: 0",
        1,
        "gradient_accumulation_steps",
        "the number 0 is out of range",
        "it must be at least 1",
        "",
    ),
    ("fp16: maybe", 1, "fp16", "maybe is not allowed", "it must be true or false", ""),
]

UNREADABLE = [
    (b"", 1, "", "the file is empty"),
    (b"# only a comment\n", 1, "", "the file is empty"),
    (b"- a\n- b\n", 1, "", "the file holds a list"),
    (b"\n\njust words\n", 3, "", "the file holds a single value"),
    (
        b"debug: true\n\tx: 1\n",
        2,
        "",
        "this is not valid YAML: found character '\\t' that cannot start any token, in `x: 1`",
    ),
    (
        b"debug: [\n",
        1,
        "",
        "this is not valid YAML: expected the node content, but found '<stream end>', in `debug: [`",
    ),
    (
        b"x: 1\ndebug: 'yes\nuse_cpu: true\n",
        2,
        "",
        "this is not valid YAML: found unexpected end of stream, in `debug: 'yes`",
    ),
    (b"debug: true\n  x: 1\n", 2, "", "this is not valid YAML: mapping values are not allowed here, in `x: 1`"),
    (b"a: &x 1\nb: *y\n", 2, "", "this is not valid YAML: found undefined alias 'y', in `b: *y`"),
    (
        b"debug: @yes\n",
        1,
        "",
        "this is not valid YAML: found character '@' that cannot start any token, in `debug: @yes`",
    ),
    (b"debug: true\n---\ndebug: false\n", 2, "", "this is not valid YAML: but found another document, in `---`"),
    (b"debug: true\nx: \xff\n", 2, "", "byte 0xff is not UTF-8"),
    (b"debug: true\nx: \x07\n", 2, "", "character #x0007 is not allowed in YAML"),
    (b"debug: true\ndebug: false\n", 2, "debug", "the key is given twice"),
    (
        b"fsdp_config:\n  fsdp_version: 2\n  fsdp_version: 2\n",
        3,
        "fsdp_config.fsdp_version",
        "the key is given twice",
    ),
    (b"timeout: 2024-99-99\n", 1, "timeout", "the text '2024-99-99' is not allowed"),
    (b"debug: !!python/object:os.system x\n", 1, "", "this is not valid YAML: could not determine a constructor"),
]


@pytest.mark.parametrize(("text", "line", "key", "hint"), TYPOS)
def test_an_unknown_key_is_reported_at_its_line(tmp_path: Path, text: str, line: int, key: str, hint: str) -> None:
    found = problems(tmp_path, text)
    assert found == [Problem(f"config.yaml:{line}", key, "unknown key", hint=hint)]


@pytest.mark.parametrize(("text", "line", "key", "what", "why", "hint"), TYPES)
def test_a_wrong_value_is_reported_with_what_is_allowed(
    tmp_path: Path, text: str, line: int, key: str, what: str, why: str | None, hint: str | None
) -> None:
    [found] = problems(tmp_path, text)
    assert (found.where, found.key, found.what) == (f"config.yaml:{line}", key, what)
    assert why is None or found.why == why
    assert hint is None or found.hint == hint


@pytest.mark.parametrize(("data", "line", "key", "what"), UNREADABLE)
def test_a_file_that_cannot_be_read_is_reported_at_its_line(
    tmp_path: Path, data: bytes, line: int, key: str, what: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        resolve(flags={}, env={}, file=file)
    [found] = caught.value.problems
    assert (found.where, found.key) == (f"{file}:{line}", key)
    assert found.what.startswith(what)


def test_a_missing_file_a_folder_and_a_file_within_a_file_are_problems(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("debug: true\n")
    for path, what in (
        ("b", "there is no such file"),
        ("", "this is a folder"),
        ("a/b", "the file cannot be read"),
    ):
        with pytest.raises(ConfigError) as caught:
            resolve(flags={}, env={}, file=tmp_path / path)
        [found] = caught.value.problems
        assert found.where == str(tmp_path / path)
        assert found.what.startswith(what)


def test_a_json_file_is_read_with_its_lines(tmp_path: Path) -> None:
    text = '{\n\t"mixed_precision": "bf16",\n\t"num_proceses": 2\n}\n'
    [found] = problems(tmp_path, text)
    assert (found.where, found.hint) == ("config.yaml:3", "did you mean num_processes?")


def test_all_problems_are_reported_at_once_with_the_message_naming_each(tmp_path: Path) -> None:
    text = FOUNDING.replace("fsdp_cpu_offload: false", "fsdp_cpu_ofload: maybe").replace("bf16", "bf61")
    found = problems(tmp_path, text, {"num_processe": 2}, {"PACELINE_DEBUGG": "1", "PACELINE_TIMEOUT": "long"})
    assert sorted(p.where for p in found) == [
        "--num_processe",
        "PACELINE_DEBUGG",
        "PACELINE_TIMEOUT",
        "config.yaml:12",
        "config.yaml:6",
    ]
    with pytest.raises(
        ConfigError, match=r"5 problems.*\n.*config.yaml:6: fsdp_config.fsdp_cpu_ofload: unknown key"
    ) as caught:
        raise ConfigError([next(p for p in found if p.where.endswith(":6")), *found[:4]])
    assert caught.value.exit_code == 2


def test_a_merge_key_is_followed(tmp_path: Path) -> None:
    text = "fsdp_config: &base\n  fsdp_version: 2\n  fsdp_ofload: 1\nstrategy: fsdp\n"
    [found] = problems(tmp_path, text)
    assert found.where == "config.yaml:3"
