"""Which source wins, how that is told, and how a configuration travels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.config import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    Origin,
    Resolved,
    RunConfig,
    default_config_file,
    find_config_file,
    resolve,
    with_arguments,
    worker_config,
)
from paceline.errors import ConfigError
from tests.unit.config.files import FOUNDING, FSDP1, answers, read


def test_each_source_overrides_the_next(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("mixed_precision: fp16\n")
    sources = [
        ({"mixed_precision": "no"}, Origin("flag", "--mixed_precision"), "no"),
        ({}, Origin("environment", "PACELINE_MIXED_PRECISION"), "bf16"),
    ]
    env = {"PACELINE_MIXED_PRECISION": "bf16", "PATH": "/bin"}
    for flags, origin, value in sources:
        resolved = resolve(flags=flags, env=env, file=file, detected={"mixed_precision": "bf16"})
        assert (resolved.config.mixed_precision, resolved.origin("mixed_precision")) == (value, origin)
    resolved = resolve(flags={}, env={}, file=file, detected={"mixed_precision": "bf16"})
    assert (resolved.config.mixed_precision, resolved.origin("mixed_precision").kind) == ("fp16", "file")
    resolved = resolve(flags={}, env={}, file=None, detected={"mixed_precision": "bf16"})
    assert (resolved.config.mixed_precision, resolved.origin("mixed_precision").kind) == ("bf16", "detected")
    resolved = resolve(flags={}, env={}, file=None)
    assert (resolved.config.mixed_precision, resolved.origin("mixed_precision").kind) == ("no", "default")


def test_explain_gives_every_value_with_its_source(tmp_path: Path) -> None:
    resolved = read(tmp_path, FOUNDING, {"fsdp-offload-params": "true"}, {"PACELINE_DEBUG": "1"})
    told = {key: (value, origin.kind, Path(origin.where).name) for key, value, origin in resolved.explain()}
    assert told["fsdp_config.fsdp_offload_params"] == (True, "flag", "--fsdp_offload_params")
    assert told["debug"] == (True, "environment", "PACELINE_DEBUG")
    assert told["strategy"] == ("fsdp", "file", "config.yaml:2")
    assert told["num_processes"] == (4, "file", "config.yaml:14")
    assert told["fsdp_config.fsdp_min_num_params"] == (100_000_000, "default", "default")
    assert "dynamo_config.dynamo_backend" in told
    assert "deepspeed_config.zero_stage" not in told


@pytest.mark.parametrize(
    ("name", "value", "attribute", "expected"),
    [
        ("PACELINE_CPU", "true", "use_cpu", True),
        ("PACELINE_USE_CPU", "yes", "use_cpu", True),
        ("PACELINE_NUM_PROCESSES", "3", "num_processes", 3),
        ("PACELINE_TIMEOUT", "1.5", "timeout", 1.5),
        ("PACELINE_STRATEGY", "DDP", "strategy", "ddp"),
        ("PACELINE_USE_FSDP", "true", "strategy", "fsdp"),
        ("PACELINE_USE_FSDP", "false", "strategy", "auto"),
        ("PACELINE_DISTRIBUTED_TYPE", "MULTI_GPU", "strategy", "ddp"),
        ("PACELINE_NUM_PROCESSES", "", "num_processes", None),
        ("PACELINE_NUM_PROCESSES", "none", "num_processes", None),
    ],
)
def test_variables_are_parsed(name: str, value: str, attribute: str, expected: object) -> None:
    resolved = resolve(flags={}, env={name: value}, file=None)
    assert getattr(resolved.config, attribute) == expected


def test_an_unknown_variable_is_a_problem_and_reserved_ones_are_not() -> None:
    env = {"PACELINE_MIXED_PRECISON": "bf16", "PACELINE_HOME": "/x", "PACELINE_LOG_LEVEL": "debug"}
    with pytest.raises(ConfigError) as caught:
        worker_config(env)
    [found] = caught.value.problems
    assert (found.where, found.hint) == ("PACELINE_MIXED_PRECISON", "did you mean PACELINE_MIXED_PRECISION?")


@pytest.mark.parametrize("text", [FOUNDING, answers("FSDP", FSDP1), answers("MULTI_GPU"), "debug: true\n"])
def test_a_configuration_travels_unchanged(tmp_path: Path, text: str) -> None:
    resolved = read(tmp_path, text, {"timeout": "5"}, {"PACELINE_TPU_USE_SUDO": "no"}, {"num_processes": 2})
    handed = worker_config({"PACELINE_CONFIG": resolved.to_json(), "PACELINE_DEBUG": "true"})
    assert handed == resolved
    assert "\n" not in resolved.to_json()


def test_a_deepspeed_file_travels(tmp_path: Path) -> None:
    config = RunConfig(deepspeed_config=DeepSpeedPlugin(hf_ds_config="ds.json"))
    assert Resolved.from_json(Resolved(config, {}).to_json()).config == config


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": {"debug": "x"}, "origins": {}, "notes": []}'])
def test_a_foreign_paceline_config_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        worker_config({"PACELINE_CONFIG": text})


def test_arguments_override_defaults_only() -> None:
    base = resolve(flags={}, env={"PACELINE_GRADIENT_ACCUMULATION_STEPS": "4"}, file=None)
    result = with_arguments(base, {"mixed_precision": "bf16", "gradient_accumulation_steps": 4, "debug": None})
    assert result.config.mixed_precision == "bf16"
    assert result.origin("mixed_precision") == Origin("argument", "Accelerator(mixed_precision=…)")
    with pytest.raises(ConfigError) as caught:
        with_arguments(base, {"gradient_accumulation_steps": 2})
    [found] = caught.value.problems
    assert (found.where, found.key) == (
        "Accelerator(gradient_accumulation_steps=…)",
        "gradient_accumulation_steps",
    )
    assert "PACELINE_GRADIENT_ACCUMULATION_STEPS" in found.what


def test_a_plugin_argument_is_laid_over_the_file_field_by_field(tmp_path: Path) -> None:
    base = read(tmp_path, FOUNDING)
    plugin = FullyShardedDataParallelPlugin(reduce_dtype="bf16", cpu_offload=False)
    result = with_arguments(base, {"fsdp_config": plugin}).config.fsdp_config
    assert result is not None
    assert (result.reduce_dtype, result.transformer_cls_names_to_wrap) == ("bf16", ("LlamaDecoderLayer",))
    with pytest.raises(ConfigError) as caught:
        with_arguments(base, {"fsdp_config": FullyShardedDataParallelPlugin(cpu_offload=True)})
    [found] = caught.value.problems
    assert found.key == "fsdp_config.fsdp_offload_params"
    assert found.what.endswith("config.yaml:6")


def test_a_plugin_argument_chooses_its_strategy_when_nobody_did(tmp_path: Path) -> None:
    plugin = FullyShardedDataParallelPlugin()
    base = resolve(flags={}, env={}, file=None)
    assert with_arguments(base, {"fsdp_config": plugin}).config.strategy == "fsdp"
    ddp = DistributedDataParallelKwargs(static_graph=True)
    result = with_arguments(base, {"ddp_config": ddp}).config
    assert (result.strategy, result.ddp_config) == ("auto", ddp)
    offloading = FullyShardedDataParallelPlugin(cpu_offload=True)
    with pytest.raises(ConfigError, match="unused settings: fsdp_offload_params"):
        with_arguments(read(tmp_path, "strategy: ddp\n"), {"fsdp_config": offloading})


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"mixed_precison": "bf16"}, "mixed_precison"),
        ({"mixed_precision": "bf61"}, "mixed_precision"),
        ({"gradient_accumulation_steps": "2"}, "gradient_accumulation_steps"),
        ({"fsdp_config": {"cpu_offload": True}}, "fsdp_config"),
        ({"mixed_precision": "fp8", "use_cpu": True}, "mixed_precision"),
    ],
)
def test_a_wrong_argument_is_a_problem(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_arguments(resolve(flags={}, env={}, file=None), arguments)
    assert [problem.key for problem in caught.value.problems] == [key]


def test_the_file_is_looked_for_in_order(tmp_path: Path) -> None:
    home, own, xdg, hub = (tmp_path / name for name in ("home", "own", "xdg", "hub"))
    places = [
        own / "default_config.yaml",
        xdg / "paceline" / "default_config.yaml",
        hub / "accelerate" / "default_config.yaml",
    ]
    env = {"HOME": str(home), "PACELINE_HOME": str(own), "XDG_CACHE_HOME": str(xdg), "HF_HOME": str(hub)}
    assert find_config_file(env, None) is None
    for place in reversed(places):
        place.parent.mkdir(parents=True)
        place.write_text("debug: true\n")
        assert find_config_file(env, None) == place
    assert find_config_file({**env, "PACELINE_CONFIG_FILE": "~/x.yaml"}, None) == home / "x.yaml"
    assert find_config_file(env, Path("asked.yaml")) == Path("asked.yaml")
    assert default_config_file(env) == places[0]


@pytest.mark.parametrize(
    ("env", "path"),
    [
        ({}, "home/.cache/paceline"),
        ({}, "home/.cache/huggingface/accelerate"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/huggingface/accelerate"),
    ],
)
def test_the_default_places_hang_on_home(tmp_path: Path, env: dict[str, str], path: str) -> None:
    place = tmp_path / path / "default_config.yaml"
    place.parent.mkdir(parents=True)
    place.write_text("debug: true\n")
    full = {name: str(tmp_path / value) for name, value in {"HOME": "home", **env}.items()}
    assert find_config_file(full, None) == place


def test_torch_is_never_imported() -> None:
    code = (
        "import sys, paceline.config as c; c.options(); c.worker_config({}); "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env={**os.environ})
