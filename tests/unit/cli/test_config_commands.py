"""The commands around configuration files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import yaml

from paceline.config.schema.names import all_settings

if TYPE_CHECKING:
    from tests.unit.cli.conftest import Paceline

FILES = Path(__file__).parents[2] / "data" / "accelerate"


def test_the_help_lists_the_commands(paceline: Paceline) -> None:
    answer = paceline("config", "--help")
    assert answer.code == 0
    for name in ("default", "update", "show", "check", "convert", "schema"):
        assert f"{name}  " in answer.out
        assert paceline("config", name, "--help").code == 0


def test_a_default_file(paceline: Paceline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_HOME", str(tmp_path / "own"))
    file = tmp_path / "own" / "default_config.yaml"
    assert paceline("config", "default", "--mixed-precision", "bf16").code == 0
    assert yaml.safe_load(file.read_text()) == {"mixed_precision": "bf16"}
    assert "# num_processes: null" in file.read_text()
    assert paceline("config", "check").code == 0
    again = paceline("config", "default")
    assert again.code == 2
    assert "--force" in again.err
    assert yaml.safe_load(file.read_text()) == {"mixed_precision": "bf16"}
    assert paceline("config", "default", "--force").code == 0
    assert yaml.safe_load(file.read_text()) == {"mixed_precision": "no"}
    assert "bf16" in file.with_name("default_config.yaml.bak").read_text()


def test_what_is_commented_out_may_be_uncommented(paceline: Paceline, tmp_path: Path) -> None:
    assert paceline("config", "default", "--config_file", "mine.yaml").code == 0
    file = tmp_path / "mine.yaml"
    lines = file.read_text().splitlines()
    settings = [line.removeprefix("# ") for line in lines if line.startswith("# ") and ": " in line]
    settings = [line for line in settings if line.partition(":")[0].replace("_", "").isalpha()]
    assert len(settings) >= 6
    file.write_text("\n".join(["mixed_precision: bf16", *settings]))
    assert paceline("config", "check", "mine.yaml").code == 0


def test_a_link_stays_one_and_a_private_file_private(paceline: Paceline, tmp_path: Path) -> None:
    real, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    real.write_text("num_processes: 1\n")
    real.chmod(0o600)
    link.symlink_to(real)
    assert paceline("config", "default", "--force", "--config_file", "link.yaml").code == 0
    assert link.is_symlink()
    assert "mixed_precision" in real.read_text()
    assert real.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.yaml", "real.yaml", "real.yaml.bak"]


def test_a_folder_and_a_place_that_cannot_be_written(paceline: Paceline, tmp_path: Path) -> None:
    assert "is a folder" in paceline("config", "default", "--config_file", str(tmp_path)).err
    (tmp_path / "file").touch()
    answer = paceline("config", "default", "--config_file", "file/below.yaml")
    assert answer.code == 2
    assert "cannot be written" in answer.err


def test_an_option_of_the_questionnaire_before_a_command_is_refused(paceline: Paceline) -> None:
    answer = paceline("config", "--config_file", "x.yaml", "show")
    assert answer.code == 2
    assert "is not used" in answer.err


def test_show_names_every_source(paceline: Paceline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("num_processes: 2\nmixed_precision: bf16\n")
    monkeypatch.setenv("PACELINE_GRADIENT_ACCUMULATION_STEPS", "3")
    flags = ("--config_file", "mine.yaml", "--use_fsdp", "--fsdp-offload-params")
    answer = paceline("config", "show", *flags)
    assert answer.code == 0
    rows = {line.split()[0]: line.split()[1:] for line in answer.lines}
    assert rows["strategy"] == ["fsdp", "--use_fsdp"]
    assert rows["fsdp_config.fsdp_offload_params"] == ["true", "--fsdp_offload_params"]
    assert rows["gradient_accumulation_steps"] == ["3", "PACELINE_GRADIENT_ACCUMULATION_STEPS"]
    assert rows["mixed_precision"] == ["bf16", "mine.yaml:2"]
    assert "max_restarts" not in rows
    explained = paceline("config", "show", "--explain", *flags)
    assert "max_restarts" in explained.out
    assert all_settings()["max_restarts"].description in explained.out
    [last] = explained.lines[-1:]
    assert last.startswith(
        "Sections that nothing sets are not listed: deepspeed_config is read under strategy deepspeed; "
    )
    assert "fp8_config is read under mixed_precision fp8" in last
    assert "fsdp_config" not in last
    assert "fsdp_config is read under strategy fsdp" in paceline("config", "show", "--explain").lines[-1]
    document = json.loads(paceline("config", "show", "--json", *flags).out)
    assert document["values"]["mixed_precision"] == {
        "value": "bf16",
        "origin": {"kind": "file", "where": "mine.yaml:2"},
    }
    assert document["values"]["max_restarts"]["origin"]["kind"] == "default"
    assert "deepspeed" not in document


def test_show_says_what_is_detected(paceline: Paceline) -> None:
    document = json.loads(paceline("config", "show", "--json", "--cpu").out)
    assert document["values"]["num_processes"]["origin"]["kind"] == "detected"
    assert document["values"]["num_processes"]["value"] in (1, 2)


def test_show_reports_all_problems(paceline: Paceline) -> None:
    mesh = ("--parallelism_config_tp_size", "x", "--use_fsdp", "--use_deepspeed")
    answer = paceline("config", "show", "--num_processes", "0", "--mixed_precision", "bf61", *mesh)
    assert answer.code == 2
    first, *problems = answer.err.splitlines()
    assert first == "paceline: 4 problems in the configuration"
    starts = (
        "--use_deepspeed: conflicts with --use_fsdp",
        "--num_processes: the number 0",
        "--mixed_precision: the text 'bf61'",
        "--parallelism_config_tp_size: the text 'x'",
    )
    assert all(any(line.startswith(f"  {start}") for line in problems) for start in starts), problems


def test_show_says_that_accelerates_file_is_read(
    paceline: Paceline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Path
) -> None:
    folder = tmp_path / "hub" / "accelerate"
    folder.mkdir(parents=True)
    (folder / "default_config.yaml").write_text((FILES / "0.12.yaml").read_text())
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for answer in (paceline("config", "show"), paceline("launch", "--dry-run", str(script))):
        assert answer.code == 0
        assert "reading Accelerate's file" in answer.err
    assert json.loads(paceline("env", "--json").out)["config_file"] == str(folder / "default_config.yaml")
    assert "Accelerate's" in paceline("env").out
    own = tmp_path / "home" / ".cache" / "paceline"
    own.mkdir(parents=True)
    (own / "default_config.yaml").write_text("num_processes: 1\n")
    assert "Accelerate" not in paceline("config", "show").err
    assert "Accelerate" not in paceline("config", "show", "--config_file", str(folder / "default_config.yaml")).err


def test_show_says_which_of_accelerates_variables_nothing_reads(
    paceline: Paceline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "debug")
    answer = paceline("config", "show", "--num_processes", "2")
    assert answer.code == 0
    assert answer.err.splitlines() == [
        "paceline: ACCELERATE_DEEPSPEED_ZERO_STAGE: Accelerate's variable is not read; write PACELINE_ZERO_STAGE",
        "paceline: ACCELERATE_MIXED_PRECISION: Accelerate's variable is not read; write PACELINE_MIXED_PRECISION",
        "paceline: FSDP_OFFLOAD_PARAMS: Accelerate's variable is not read; write PACELINE_FSDP_OFFLOAD_PARAMS",
    ]


def test_show_prints_deepspeeds_json(paceline: Paceline, tmp_path: Path) -> None:
    settings = {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "train_micro_batch_size_per_gpu": 2,
        "train_batch_size": "auto",
    }
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    flags = ("--use_deepspeed", "--deepspeed_config_file", "ds.json", "--mixed_precision", "bf16")
    more = ("--num_processes", "2", "--gradient_accumulation_steps", "4", "--offload_optimizer_device", "cpu")
    document = json.loads(paceline("config", "show", "--json", *flags, *more).out)["deepspeed"]
    shown = document["settings"]
    assert shown["train_batch_size"] == 16
    assert shown["gradient_accumulation_steps"] == 4
    assert shown["bf16"] == {"enabled": True}
    assert shown["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert shown["zero_optimization"]["reduce_bucket_size"] == "auto"
    assert document["filled_by_the_run"].keys() == {
        "gradient_clipping",
        "optimizer.params.lr",
        "zero_optimization.reduce_bucket_size",
    }
    assert all(document["filled_by_the_run"].values())
    answer = paceline("config", "show", *flags, *more)
    assert "optimizer.params.lr: the arguments of DummyOptim" in answer.out


def test_check_reports_all_files_at_once(paceline: Paceline, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("mixed_precision: bf16\n")
    (tmp_path / "bad.yaml").write_text("mixed_precison: bf16\nfsdp_config:\n  fsdp_ofload_params: 1\n")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stag": 1}}')
    answer = paceline("config", "check", "good.yaml", "bad.yaml", "ds.json", "absent.yaml")
    assert answer.code == 2
    assert "good.yaml: fine" in answer.out
    assert "bad.yaml: 2 problems" in answer.out
    assert "bad.yaml:1: mixed_precison: unknown key; did you mean mixed_precision?" in answer.out
    assert "did you mean stage?" in answer.out
    assert "absent.yaml: 1 problem" in answer.out
    assert paceline("config", "check", "good.yaml").code == 0
    (tmp_path / "order.yaml").write_text(
        "mixed_precision: bf61\nfsdp_config:\n  fsdp_ofload: 1\nnum_processes: 0\nfoo: 1\n"
    )
    lines = paceline("config", "check", "order.yaml").lines[1:]
    assert [line.split(":")[1] for line in lines] == ["1", "3", "4", "5"]
    document = json.loads(paceline("config", "check", "--json", "good.yaml", "bad.yaml").out)
    assert [len(verdict["problems"]) for verdict in document] == [0, 2]
    nothing = paceline("config", "check")
    assert nothing.code == 2
    assert "There is no configuration file" in nothing.err


def test_check_holds_block_classes_against_the_model(paceline: Paceline, tmp_path: Path) -> None:
    (tmp_path / "models_to_check.py").write_text(
        "from torch import nn\n"
        "class Block(nn.Sequential): pass\n"
        "def build(): return nn.Sequential(*(Block(nn.Linear(2, 2), nn.ReLU()) for _ in range(2)))\n"
        "ready = build()\n"
    )
    text = "distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n  fsdp_transformer_layer_cls_to_wrap: "
    (tmp_path / "right.yaml").write_text(f"{text}Block\n")
    (tmp_path / "wrong.yaml").write_text(f"{text}Blok\n")
    for name in ("models_to_check:build", "models_to_check:ready"):
        assert "3 units: 2 Block + the rest" in paceline("config", "check", "right.yaml", "--model", name).out
        wrong = paceline("config", "check", "wrong.yaml", "--model", name)
        assert wrong.code == 2
        assert "wrong.yaml:4: fsdp_config.fsdp_transformer_layer_cls_to_wrap" in wrong.out
        assert "Did you mean Block?" in wrong.out
    assert paceline("config", "check", "wrong.yaml").code == 0, "without the model nobody can know"
    for name, said in (("models_to_check:absent", "has no attribute"), ("nowhere", "cannot be found")):
        answer = paceline("config", "check", "right.yaml", "--model", name)
        assert answer.code == 2
        assert said in answer.err


def test_an_update_in_place(paceline: Paceline, tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    text = (FILES / "0.26_fsdp.yaml").read_text()
    file.write_text(text)
    dry = paceline("config", "update", "--dry-run", "old.yaml")
    assert dry.code == 0
    assert file.read_text() == text
    answer = paceline("config", "update", "old.yaml")
    assert answer.code == 0
    assert "fsdp_sharding_strategy SHARD_GRAD_OP: became fsdp_reshard_after_forward false" in answer.out
    assert file.with_name("old.yaml.bak").read_text() == text
    assert yaml.safe_load(file.read_text())["fsdp_config"]["fsdp_reshard_after_forward"] is False
    assert paceline("config", "update", "--config_file", "old.yaml").out == "old.yaml is up to date.\n"
    assert "are the same" in paceline("config", "update", "--config_file", "old.yaml", "old.yaml").err


def test_an_update_of_a_wrong_file_changes_nothing(paceline: Paceline, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("fp16: true\nmixed_precison: fp16\n")
    assert paceline("config", "update", "old.yaml").code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["old.yaml"]
    assert "no configuration file" in paceline("config", "update").err
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    answer = paceline("config", "update", "ds.json")
    assert answer.code == 2
    assert "DeepSpeed's own JSON" in answer.err


def test_convert_to_standard_output_and_to_a_file(paceline: Paceline, tmp_path: Path) -> None:
    source = str(FILES / "0.26_fsdp.yaml")
    answer = paceline("config", "convert", source)
    assert answer.code == 0
    assert yaml.safe_load(answer.out)["strategy"] == "fsdp"
    assert "became strategy fsdp" in answer.err
    assert paceline("config", "convert", source, "-o", "-").out == answer.out
    assert list(tmp_path.glob("-")) == []
    assert paceline("config", "convert", source, "-o", "new.yaml").code == 0
    assert yaml.safe_load((tmp_path / "new.yaml").read_text()) == yaml.safe_load(answer.out)
    assert paceline("config", "check", "new.yaml").code == 0
    assert paceline("config", "convert", source, "-o", "new.yaml").code == 2
    assert paceline("config", "convert", source, "-o", "new.yaml", "--force").code == 0


def test_convert_what_cannot_be_converted(paceline: Paceline, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("distributed_type: MULTI_GPU\ntpu_name: mine\nnum_processes: 2\n")
    answer = paceline("config", "convert", "old.yaml", "-o", "new.yaml")
    assert answer.code == 2
    assert "NOT CONVERTED" in answer.out
    assert answer.err.startswith("paceline: 1 problem in the configuration; nothing was written\n")
    assert (answer.out + answer.err).count("is not supported in this release") == 1
    assert not (tmp_path / "new.yaml").exists()
    partial = paceline("config", "convert", "old.yaml", "-o", "new.yaml", "--partial")
    assert partial.code == 0
    assert "by hand" in partial.err
    assert yaml.safe_load((tmp_path / "new.yaml").read_text()) == {
        "distributed_type": "MULTI_GPU",
        "num_processes": 2,
    }
    assert paceline("config", "convert", "absent.yaml").code == 2
    assert "neither one file" in paceline("config", "convert", "a.yaml", "b.yaml").err


def test_convert_a_line_of_torchrun(paceline: Paceline, tmp_path: Path, script: Path) -> None:
    line = ("torchrun", "--nproc_per_node", "2", "--standalone", str(script), "-o", "mine", "--partial")
    answer = paceline("config", "convert", "-o", "new.yaml", *line)
    assert answer.code == 0
    assert f"Run: paceline launch --config_file new.yaml {script} -o mine --partial" in answer.out
    dry = paceline("launch", "--config_file", "new.yaml", "--dry-run", str(script), "-o", "mine")
    assert dry.commands[0][1:] == [str(script), "-o", "mine"] or len(dry.commands) == 2


class _Loader(yaml.SafeLoader):
    """Reads YAML as editors do: only true and false are booleans."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not (tag.endswith(":bool") and first not in "tfTF")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@pytest.fixture
def schema(paceline: Paceline) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(paceline("config", "schema").out)
    return found


def test_the_schema_is_one_and_describes_everything(schema: dict[str, Any]) -> None:
    jsonschema.Draft7Validator.check_schema(schema)
    for dotted, setting in all_settings().items():
        section, _, key = dotted.rpartition(".")
        inside = schema["properties"][section]["properties"] if section else schema["properties"]
        assert setting.description in inside[key]["description"]


@pytest.mark.parametrize("path", sorted(FILES.iterdir()), ids=lambda path: path.stem)
def test_the_schema_accepts_what_the_command_accepts(path: Path, schema: dict[str, Any]) -> None:
    if "sagemaker" not in path.stem:
        jsonschema.validate(yaml.load(path.read_text(), _Loader), schema)


@pytest.mark.parametrize(
    "text",
    [
        "mixed_precison: bf16",
        "mixed_precision: bf61",
        "num_processes: 0",
        "fsdp_config: {fsdp_ofload_params: true}",
        "deepspeed_config: {zero_stage: 4}",
    ],
)
def test_the_schema_refuses_what_the_command_refuses(text: str, schema: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.load(text, _Loader), schema)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(paceline: Paceline, shell: str) -> None:
    answer = paceline("completion", shell)
    assert answer.code == 0
    assert "_PACELINE_COMPLETE" in answer.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("paceline c", {"checkpoint", "completion", "config"}),
        ("paceline config ch", {"check"}),
        ("paceline launch --fsdp_off", {"--fsdp_offload_params"}),
        ("paceline launch --mixed_precision b", {"bf16"}),
        ("paceline config show --fsdp_offload_params t", {"true"}),
    ],
)
def test_what_a_shell_is_offered(
    paceline: Paceline, monkeypatch: pytest.MonkeyPatch, words: str, expected: set[str]
) -> None:
    monkeypatch.setenv("_PACELINE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert {line.partition(",")[2] for line in paceline().lines} == expected
