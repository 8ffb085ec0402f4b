"""Launchers and commands, as programs call them."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest

from paceline.compat.accelerate.commands import accelerate_cli, config, estimate, launch
from paceline.compat.accelerate.commands.config.config_args import ClusterConfig, SageMakerConfig
from paceline.compat.accelerate.commands.config.default import write_basic_config

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_is_read_as_keys_and_values(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n")
    loaded = config.load_config_from_file(file)
    values = loaded.to_dict()
    assert values["distributed_type"] == "FSDP"
    assert values["fsdp_config"] == {"fsdp_version": 2}
    assert loaded.distributed_type == "FSDP"
    with pytest.raises(AttributeError):
        getattr(loaded, "nothing")  # noqa: B009
    with pytest.raises(FileNotFoundError):
        config.load_config_from_file(tmp_path / "missing.yaml")
    assert config.default_config_file.endswith("default_config.yaml")


def _command(monkeypatch: pytest.MonkeyPatch, *tokens: str, code: int = 0) -> list[str]:
    seen: list[list[str]] = []

    def call(command: list[str], **_kwargs: Any) -> int:
        seen.append(command)
        return code

    monkeypatch.setattr(subprocess, "call", call)
    launch.launch_command(launch.launch_command_parser().parse_args(list(tokens)))
    return seen[0]


def test_flags_and_arguments_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ("--num-processes", "2", "--use_fsdp", "--fsdp_offload_params", "false", "--mixed_precision=bf16")
    command = _command(monkeypatch, *tokens, "train.py", "--lr", "1e-3", "--num_processes", "9")
    assert command[:4] == [sys.executable, "-m", "paceline", "launch"]
    assert command[-5:] == ["train.py", "--lr", "1e-3", "--num_processes", "9"]
    flags = command[4:-5]
    for flag, value in {
        "--num_processes": "2",
        "--use_fsdp": "true",
        "--fsdp_offload_params": "false",
        "--mixed_precision": "bf16",
        "--as_accelerate": "true",
    }.items():
        assert flags[flags.index(flag) + 1] == value


def test_a_switch_has_no_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("strategy: ddp\n")
    command = _command(monkeypatch, "--config_file", str(file), "-m", "--quiet", "package.train", "-x")
    assert command[-2:] == ["package.train", "-x"]
    assert {"--module", "--quiet", "--config_file"} <= set(command)
    assert command[command.index("--config_file") + 1] == str(file)


def test_a_failed_run_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        _command(monkeypatch, "train.py", code=3)
    assert ended.value.code == 3


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launch.launch_command_parser().parse_args(["--nothing", "1", "train.py"])
    assert "--nothing" in capsys.readouterr().err


SCRIPT = """
import os, sys
import accelerate
from accelerate import PartialState
state = PartialState()
assert accelerate.PartialState.__module__ == "paceline.compat.accelerate.state"
print(state.process_index, state.num_processes, sys.argv[1:], flush=True)
"""


def test_a_script_runs_with_the_twin_on_all_ranks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    tokens = ["--num_processes", "2", "--cpu", "--quiet", str(script), "--a", "b"]
    program = (
        "from paceline.compat.accelerate.commands.launch import launch_command, launch_command_parser\n"
        f"launch_command(launch_command_parser().parse_args({tokens!r}))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=800)
    assert finished.returncode == 0, finished.stderr
    lines = sorted(line for line in finished.stdout.splitlines() if "--a" in line)
    assert [line[line.index(" 2 ") - 1 :] for line in lines] == ["0 2 ['--a', 'b']", "1 2 ['--a', 'b']"]


def _flags(monkeypatch: pytest.MonkeyPatch, file: Path, text: str, *tokens: str) -> dict[str, str]:
    file.write_text(text)
    command = _command(monkeypatch, "--config_file", str(file), *tokens, "train.py")
    flags = [token for token in command[4:-1] if token not in ("--quiet", "--module")]
    return {name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}


def test_a_file_is_merged_as_accelerate_merges_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = """
    distributed_type: FSDP
    num_processes: 4
    mixed_precision: bf16
    same_network: true
    fsdp_config: {fsdp_version: 2, offload_params: true, fsdp_state_dict_type: FULL_STATE_DICT}
    deepspeed_config: {zero_stage: 3}
    tpu_name: a
    """
    flags = _flags(monkeypatch, tmp_path / "a.yaml", text, "--num_processes", "2", "--fsdp_offload_params", "false")
    assert flags["distributed_type"] == "FSDP"
    assert flags["num_processes"] == "2"
    assert flags["mixed_precision"] == "bf16"
    # The flag counts before the file, and a key of the file counts where Accelerate would drop it.
    assert flags["fsdp_offload_params"] == "false"
    assert flags["same_network"] == "true"
    assert flags["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    # What this type does not read is left out.
    assert not {"zero_stage", "tpu_name", "multi_gpu"} & set(flags)


def test_fp8_of_a_file_compiles_unless_somebody_forbids_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "distributed_type: 'NO'\nmixed_precision: fp8\nfp8_config: {backend: AO, pad_inner_dim: true}\n"
    flags = _flags(monkeypatch, tmp_path / "a.yaml", text)
    assert (flags["mixed_precision"], flags["fp8_backend"]) == ("fp8", "AO")
    assert "dynamo_backend" not in flags
    assert _flags(monkeypatch, tmp_path / "a.yaml", text, "--dynamo_backend", "no")["dynamo_backend"] == "no"


def test_sections_that_are_not_read_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "distributed_type: 'NO'\nfsdp_config: {fsdp_version: 2}\n"
    assert "fsdp_version" not in _flags(monkeypatch, tmp_path / "a.yaml", text)
    assert "not read under distributed_type NO: fsdp_config" in capsys.readouterr().err


def test_a_typed_way_to_train_wins_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2}\n"
    flags = _flags(monkeypatch, tmp_path / "a.yaml", text, "--multi_gpu")
    assert flags["multi_gpu"] == "true"
    assert not {"distributed_type", "fsdp_version", "use_fsdp"} & set(flags)


def test_version_1_saves_whole_weights_unless_somebody_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_sharding_strategy: FULL_SHARD}\n"
    assert _flags(monkeypatch, tmp_path / "a.yaml", text)["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    text = text.replace("}", ", fsdp_state_dict_type: SHARDED_STATE_DICT}")
    assert _flags(monkeypatch, tmp_path / "b.yaml", text)["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"


def test_values_that_a_program_sets_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def call(command: list[str]) -> int:
        seen.append(command)
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    args = launch.launch_command_parser().parse_args(["train.py"])
    args.num_processes, args.mixed_precision = 3, "bf16"
    launch.launch_command(args)
    assert seen[0][seen[0].index("--num_processes") + 1] == "3"
    assert seen[0][seen[0].index("--mixed_precision") + 1] == "bf16"


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (("--multi_gpu", "--use_fsdp"), "--multi_gpu and --use_fsdp"),
        (("--multi_gpu", "--num_processes", "1"), "Several devices need several processes"),
        (("--use_parallelism_config",), "The mesh belongs to FSDP2"),
    ],
)
def test_flags_that_contradict_each_other(tokens: tuple[str, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        launch.launch_command(launch.launch_command_parser().parse_args([*tokens, "train.py"]))


@pytest.mark.parametrize("tokens", [("--tpu",), ("--role", "worker"), ("--aws_access_key_id", "a")])
def test_what_is_not_supported_names_the_alternative(tokens: tuple[str, ...]) -> None:
    with pytest.raises(NotImplementedError, match="paceline"):
        launch.launch_command(launch.launch_command_parser().parse_args([*tokens, "train.py"]))


def test_a_job_on_sagemaker_is_read_and_not_launched(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "compute_environment: AMAZON_SAGEMAKER\ndistributed_type: NO\nec2_instance_type: a\niam_role_name: b\n"
    )
    loaded = config.load_config_from_file(file)
    assert isinstance(loaded, SageMakerConfig)
    assert loaded.ec2_instance_type == "a"
    with pytest.raises(NotImplementedError, match="SageMaker"):
        launch.launch_command(launch.launch_command_parser().parse_args(["--config_file", str(file), "train.py"]))


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_configurations_are_written_as_they_are_read(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    assert write_basic_config("bf16", str(file)) == file
    assert write_basic_config("bf16", str(file)) is False
    loaded = config.load_config_from_file(file)
    assert isinstance(loaded, ClusterConfig)
    assert (loaded.mixed_precision, loaded.compute_environment) == ("bf16", "LOCAL_MACHINE")
    again = tmp_path / f"b.{suffix}"
    loaded.to_yaml_file(again) if suffix == "yaml" else loaded.to_json_file(again)
    assert config.load_config_from_file(again) == loaded


def test_old_and_unknown_keys(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("distributed_type: NO\nfp16: true\ndynamo_backend: INDUCTOR\n")
    loaded: Any = config.load_config_from_file(file)
    assert (loaded.mixed_precision, loaded.num_processes) == ("fp16", 1)
    assert loaded.dynamo_config == {"dynamo_backend": "INDUCTOR"}
    file.write_text("distributed_type: NO\nnum_procesess: 2\n")
    with pytest.raises(ValueError, match="did you mean num_processes"):
        config.load_config_from_file(file)
    file.write_text("num_processes: 2\n")
    with pytest.raises(ValueError, match="no `distributed_type`"):
        config.load_config_from_file(file)


def test_all_commands_are_listed_and_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["accelerate", "--help"])
    with pytest.raises(SystemExit):
        accelerate_cli.main()
    listed = capsys.readouterr().out
    for name in ("config", "estimate-memory", "env", "launch", "merge-weights", "tpu-config", "test", "to-fsdp2"):
        assert name in listed
    monkeypatch.setattr(sys, "argv", ["accelerate", "config", "--help"])
    with pytest.raises(SystemExit):
        accelerate_cli.main()
    assert {"default", "update"} <= set(
        capsys.readouterr().out.replace("{", " ").replace(",", " ").replace("}", " ").split()
    )


def test_a_command_says_what_is_wrong_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "values.yaml").write_text("mixed_precision: 'no'\n")
    for words, said in (
        (("config", "update", "--config_file", str(tmp_path / "missing.yaml")), "There is no file"),
        (("merge-weights", str(tmp_path), str(tmp_path / "merged")), "holds no shards"),
        (("tpu-config", "--config_file", str(tmp_path / "values.yaml")), "no `distributed_type`"),
    ):
        monkeypatch.setattr(sys, "argv", ["accelerate", *words])
        with pytest.raises(SystemExit) as ended:
            accelerate_cli.main()
        assert ended.value.code == 1
        printed = capsys.readouterr().err
        assert printed.startswith("paceline: ")
        assert said in printed


@pytest.mark.parametrize("kind", ["ConnectError", "other"])
def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Newer libraries of the Hub raise an error of their HTTP client, which is no `OSError`."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    transport = type("TransportError" if kind == "ConnectError" else "AnotherError", (Exception,), {})

    def fail(*_args: object, **_kwargs: object) -> None:
        raise type(kind, (transport,), {})("no route")

    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    if kind == "other":
        with pytest.raises(Exception, match="no route"):
            estimate.verify_on_hub("somebody/model")
    else:
        assert estimate.verify_on_hub("somebody/model") == "gated"


def test_the_repository_holds_no_model_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer libraries of the Hub raise a kind of `EntryNotFoundError` under a name of its own."""
    errors = pytest.importorskip("huggingface_hub.errors")
    kind = type("RemoteEntryNotFoundError", (OSError, errors.EntryNotFoundError), {})

    def fail(_name: str) -> None:
        raise kind("404: config.json")

    monkeypatch.setattr(estimate, "is_timm_available", lambda: True)
    monkeypatch.setattr(estimate, "verify_on_hub", lambda *_: types.SimpleNamespace(library_name=None))
    monkeypatch.setattr(estimate, "_timm_model", fail)
    args = estimate.estimate_command_parser().parse_args(["somebody/model", "--library_name", "timm"])
    with pytest.raises(RuntimeError, match="somebody/model was to be loaded with timm"):
        estimate.gather_data(args)


def test_the_size_of_a_model_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    values = '{"model_type": "bert", "vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2, '
    (tmp_path / "config.json").write_text(values + '"num_attention_heads": 2, "intermediate_size": 32}')
    args = estimate.estimate_command_parser().parse_args([str(tmp_path), "--dtypes", "float32", "float16", "int4"])
    whole, half, least = estimate.gather_data(args)
    assert whole[2] == 2 * half[2] == 8 * least[2]
    assert max(whole[3].values()) == 4 * whole[2]
    assert max(least[3].values()) == -1
    estimate.estimate_command(args)
    assert "N/A" in capsys.readouterr().out


def test_a_real_run_under_the_name_of_accelerate(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    file = tmp_path / "a.yaml"
    file.write_text("distributed_type: FSDP\nnum_processes: 2\nuse_cpu: true\nfsdp_config: {fsdp_version: 2}\n")
    words = ["-m", "paceline.compat", "-m", "accelerate.commands.launch", "--quiet", "--config-file", str(file)]
    finished = subprocess.run(
        [sys.executable, *words, str(script), "--a", "b"], capture_output=True, text=True, timeout=800, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert sum("--a" in line for line in finished.stdout.splitlines()) == 2
