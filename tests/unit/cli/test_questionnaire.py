"""What `paceline config` asks on which machine, and answers that come from a pipe."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import yaml

from paceline.cli.config.dialogue import BACK, Back, Choice
from paceline.cli.config.interview import confirm, interview
from paceline.cli.config.machine import Machine
from paceline.cli.config.questions import QUESTIONS, Situation
from paceline.config import resolve
from paceline.config.schema.names import all_settings
from paceline.config.sources.writing import as_yaml
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tests.unit.cli.conftest import Paceline

LAPTOP = Machine(
    devices=0, device_name="cpu", processes=2, precisions=frozenset({"no", "fp16", "bf16"}), has_deepspeed=False
)
ONE_GPU = Machine(
    devices=1, device_name="GPU", processes=1, precisions=frozenset({"no", "fp16", "bf16"}), has_deepspeed=True
)
OLD_GPUS = Machine(
    devices=4, device_name="old GPU", processes=4, precisions=frozenset({"no", "fp16"}), has_deepspeed=True
)


@dataclass
class Script:
    """Answers by key; takes the default where there is none, and notes what was asked."""

    answers: Mapping[str, object]
    shows_summary: bool = False
    asked: list[str] = field(default_factory=list)
    offered: dict[str, list[object]] = field(default_factory=dict)
    defaults: dict[str, object] = field(default_factory=dict)

    def choose(self, key: str, text: str, choices: list[Choice], default: int) -> object | Back:
        assert text.endswith(("?", ")"))
        self.asked.append(key)
        self.offered[key] = [choice.value for choice in choices]
        self.defaults[key] = choices[default].value
        wanted = self.answers.get(key, choices[default].value)
        assert wanted in self.offered[key]
        return wanted

    def write(self, key: str, text: str, default: str, check: Callable[[str], str]) -> str | Back:
        assert text.endswith(("?", ")"))
        self.asked.append(key)
        self.defaults[key] = default
        typed = str(self.answers.get(key, default))
        assert check(typed) == ""
        return typed

    def finish(self) -> None:
        pass


def run(machine: Machine, folder: Path, **answers: object) -> tuple[Script, dict[str, object]]:
    """Answer by the keys' own names, check that what comes out is accepted, and return it."""
    script = Script(answers)
    result = interview(script, machine, folder / "config.yaml")  # type: ignore[arg-type]
    assert result is not None
    file = folder / "config.yaml"
    file.write_text(as_yaml(result), encoding="utf-8")
    resolved = resolve(flags={}, env={}, file=file)
    values = {key: value for key, value, _ in resolved.explain()}
    for key, value in result.items():
        if key != "deepspeed_config.deepspeed_config_file":
            assert str(values[key]).casefold() == str(value).casefold() or isinstance(values[key], tuple)
    return script, result


def test_a_laptop_is_asked_little(tmp_path: Path) -> None:
    script, result = run(LAPTOP, tmp_path, num_processes="1")
    assert script.asked == ["num_machines", "num_processes", "mixed_precision", "gradient_accumulation_steps"]
    assert script.defaults["mixed_precision"] == "no"
    assert result["num_processes"] == 1
    script, _ = run(LAPTOP, tmp_path)
    assert script.offered["strategy"] == ["auto", "ddp", "fsdp"]


def test_several_machines_are_asked_where_they_meet(tmp_path: Path) -> None:
    script, result = run(LAPTOP, tmp_path, num_machines="2", machine_rank="1", main_process_ip="10.0.0.1")
    assert script.asked[:6] == [
        "num_machines",
        "machine_rank",
        "main_process_ip",
        "main_process_port",
        "rdzv_backend",
        "num_processes",
    ]
    assert (script.defaults["main_process_port"], script.defaults["num_processes"]) == ("29500", "4")
    assert (result["num_machines"], result["machine_rank"], result["num_processes"]) == (2, 1, 4)


def test_machines_that_come_and_go_are_offered_their_rendezvous(tmp_path: Path) -> None:
    _, result = run(LAPTOP, tmp_path, num_machines="2:4", main_process_ip="10.0.0.1", rdzv_backend="c10d")
    assert (result["num_machines"], result["num_processes"]) == ("2:4", 8)


def test_one_device_is_not_asked_for_processes(tmp_path: Path) -> None:
    script, result = run(ONE_GPU, tmp_path, strategy="deepspeed", zero_stage="3", offload_param_device="nvme")
    assert "num_processes" not in script.asked
    assert "offload_param_nvme_path" in script.asked
    assert script.offered["strategy"] == ["auto", "single", "fsdp", "deepspeed"]
    assert script.defaults["mixed_precision"] == "bf16"
    assert result["deepspeed_config.offload_param_nvme_path"] == "/local_nvme"


def test_devices_without_bf16_are_not_offered_it(tmp_path: Path) -> None:
    script, result = run(OLD_GPUS, tmp_path, strategy="fsdp", fsdp_auto_wrap_policy="SIZE_BASED_WRAP")
    assert script.offered["mixed_precision"] == ["no", "fp16"]
    assert script.defaults["mixed_precision"] == "fp16"
    assert script.defaults["num_processes"] == "4"
    assert "fsdp_min_num_params" in script.asked
    assert "gpu_ids" not in script.asked
    assert result["dynamo_config.dynamo_backend"] == "auto"


def test_fewer_processes_than_devices_ask_which(tmp_path: Path) -> None:
    script, result = run(OLD_GPUS, tmp_path, num_processes="2")
    assert script.defaults["gpu_ids"] == "0,1"
    assert result["gpu_ids"] == "0,1"


def test_the_processor_can_be_chosen_beside_devices(tmp_path: Path) -> None:
    script, result = run(OLD_GPUS, tmp_path, use_cpu=True)
    assert result["use_cpu"] is True
    assert script.defaults["num_processes"] == "2"
    assert script.defaults["mixed_precision"] == "no"
    assert "dynamo_backend" not in script.asked


def test_what_deepspeeds_json_says_is_not_asked(tmp_path: Path) -> None:
    json_file = tmp_path / "ds.json"
    json_file.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}))
    script, result = run(ONE_GPU, tmp_path, strategy="deepspeed", deepspeed_config_file=str(json_file))
    assert "zero_stage" not in script.asked
    assert "mixed_precision" not in script.asked
    assert "gradient_accumulation_steps" in script.asked
    assert result["deepspeed_config.deepspeed_config_file"] == str(json_file)


def test_compiling_asks_for_more(tmp_path: Path) -> None:
    script, _ = run(ONE_GPU, tmp_path, dynamo_backend="inductor")
    assert script.asked[-1] == "dynamo_use_regional_compilation"


def test_going_back_forgets_what_came_after(tmp_path: Path) -> None:
    class Hesitant(Script):
        def choose(self, key: str, text: str, choices: list[Choice], default: int) -> object | Back:
            if key == "fsdp_offload_params" and key not in self.asked:
                self.asked.append(key)
                self.answers = {}
                return BACK
            return super().choose(key, text, choices, default)

    script = Hesitant({"strategy": "fsdp"})
    result = interview(script, LAPTOP, tmp_path / "x.yaml")  # type: ignore[arg-type]
    assert script.asked.count("strategy") == 2
    assert result is not None
    assert result["strategy"] == "auto"
    assert not [key for key in result if key.startswith("fsdp_config")]


def test_going_back_at_the_first_question_asks_it_again(tmp_path: Path) -> None:
    class Impatient(Script):
        def write(self, key: str, text: str, default: str, check: Callable[[str], str]) -> str | Back:
            if not self.asked:
                self.asked.append(key)
                return BACK
            return super().write(key, text, default, check)

    script = Impatient({})
    assert interview(script, LAPTOP, tmp_path / "x.yaml") is not None  # type: ignore[arg-type]
    assert script.asked[:2] == ["num_machines", "num_machines"]


def test_answers_that_do_not_fit_together_are_refused_at_the_end(tmp_path: Path) -> None:
    """A later answer may put an earlier one right, so that only the whole can be judged."""
    now = Situation(LAPTOP, {"use_cpu": True, "gpu_ids": "0"})
    assert now.problems(now.answers)
    with pytest.raises(ConfigError, match="gpu_ids"):
        confirm(Script({}), now, tmp_path / "x.yaml")  # type: ignore[arg-type]
    watched = Script({}, shows_summary=True)
    assert confirm(watched, now, tmp_path / "x.yaml") is BACK  # type: ignore[arg-type]
    assert watched.offered["file"] == [BACK, False], "there is nothing to write"


def test_every_question_is_of_the_schema() -> None:
    assert {question.key for question in QUESTIONS} <= all_settings().keys()
    for question in QUESTIONS:
        assert set(question.only) <= {str(choice) for choice in question.setting.shape.choices}


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch, paceline: Paceline) -> Callable[..., object]:
    """Call `paceline config` with lines on its standard input."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def call(text: str, *arguments: str) -> object:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return paceline("config", *arguments)

    return call


def test_answers_from_a_pipe(answered: Paceline, paceline: Paceline, tmp_path: Path, script: Path) -> None:
    answer = answered("1\n4\n<\n2\nfsdp\ntrue\n\n\n\nbf16\n\n", "--config_file", "mine.yaml")
    assert answer.code == 0, answer.err
    assert "strategy [auto]: fsdp" in answer.out
    written = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert written["num_processes"] == 2
    assert written["fsdp_config"]["fsdp_offload_params"] is True
    assert "fsdp_auto_wrap_policy" not in written["fsdp_config"], "what is left open is not written"
    assert "# Micro-batches per optimizer step." in (tmp_path / "mine.yaml").read_text()
    assert paceline("config", "check", "mine.yaml").code == 0
    dry = paceline("launch", "--config_file", "mine.yaml", "--dry-run", str(script))
    assert dry.code == 0
    assert dry.config["strategy"] == "fsdp"
    assert len(dry.commands) == 2


def test_empty_lines_take_the_defaults_and_launch_finds_the_file(
    answered: Paceline, paceline: Paceline, tmp_path: Path, script: Path
) -> None:
    answer = answered("\n" * 20)
    assert answer.code == 0, answer.err
    file = tmp_path / "home" / ".cache" / "paceline" / "default_config.yaml"
    assert str(file) in answer.out
    assert paceline("config", "check").out.startswith(f"{file}: fine")
    assert paceline("launch", "--dry-run", str(script)).code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "ended before the question for num_machines"),
        ("1\n2\n", "ended before the question for strategy"),
        ("1\n2\nfdsp\n", "The answer for strategy was 'fdsp'"),
        ("0\n", "at least 1"),
        ("1\nmany\n", "a whole number"),
        ("1\n1\n\n\nand more\n", "'and more' answers no question"),
    ],
)
def test_lines_that_do_not_fit_write_nothing(answered: Paceline, tmp_path: Path, text: str, words: str) -> None:
    answer = answered(text, "--config_file", "mine.yaml")
    assert answer.code == 2
    assert words in answer.err
    assert not (tmp_path / "mine.yaml").exists()


def test_the_place_in_paceline_home(answered: Paceline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_HOME", str(tmp_path / "own"))
    monkeypatch.setenv("PACELINE_CONFIG_FILE", "other.yaml")
    answer = answered("\n" * 20)
    assert answer.code == 0
    assert "PACELINE_CONFIG_FILE is set" in answer.err
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["default_config.yaml"]
    again = answered("\n" * 20)
    assert "default_config.yaml.bak" in again.out
