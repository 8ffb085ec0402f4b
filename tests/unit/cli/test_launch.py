"""`paceline launch`: how its words become a configuration and a command, without starting anything."""

from __future__ import annotations

import shlex
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.config.files import FOUNDING

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.cli.conftest import Paceline

FSDP = FOUNDING.replace("fsdp_cpu_offload: false", "fsdp_cpu_offload: {offload}")


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    (folder / name).write_text(textwrap.dedent(text).lstrip())
    return name


# A dry run


def test_a_dry_run_prints_ranks_and_variables_and_starts_nothing(
    paceline: Paceline, script: Path, tmp_path: Path
) -> None:
    answer = paceline("launch", "--num_processes", "3", "--cpu", "--dry-run", script.name, "--lr", "1e-3")
    assert answer.code == 0
    assert answer.lines[0].startswith("3 processes on this machine")
    assert answer.commands == [["train.py", "--lr", "1e-3"]] * 3
    assert answer.variables["WORLD_SIZE"] == "3"
    assert [f"RANK={rank} LOCAL_RANK={rank}" in answer.out for rank in range(3)] == [True] * 3
    assert answer.config["use_cpu"] is True
    assert not (tmp_path / "it_ran").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_without_flags_the_machine_is_looked_at(paceline: Paceline, script: Path) -> None:
    answer = paceline("launch", "--cpu", "--dry-run", script.name)
    assert len(answer.commands) == 2, "two processes on a processor"


@pytest.mark.parametrize("offload", [False, True])
def test_a_file_of_accelerate_works_as_it_stands(
    paceline: Paceline, script: Path, tmp_path: Path, offload: bool
) -> None:
    file = write(tmp_path, FSDP.format(offload=str(offload).lower()))
    answer = paceline("launch", "--config_file", file, "--cpu", "--dry-run", script.name)
    assert answer.code == 0, answer.err
    remarks = [line for line in answer.err.splitlines() if "CPU cores" not in line]
    assert remarks == []
    assert len(answer.commands) == 4
    assert answer.config["mixed_precision"] == "bf16"
    assert answer.config["strategy"] == "fsdp"
    assert answer.config["fsdp_config"]["cpu_offload"] is offload
    assert answer.config["fsdp_config"]["transformer_cls_names_to_wrap"] == ["LlamaDecoderLayer"]


def test_the_default_file_is_found(paceline: Paceline, script: Path, tmp_path: Path) -> None:
    home = tmp_path / "home" / ".cache" / "paceline"
    home.mkdir(parents=True)
    write(home, "num_processes: 3\nmixed_precision: bf16\n", "default_config.yaml")
    answer = paceline("launch", "--cpu", "--dry-run", script.name)
    assert len(answer.commands) == 3
    assert answer.config["mixed_precision"] == "bf16"


def test_flags_beat_variables_which_beat_the_file(
    paceline: Paceline, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, "num_processes: 1\nmixed_precision: fp16\ngradient_accumulation_steps: 2\n")
    monkeypatch.setenv("PACELINE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("PACELINE_GRADIENT_ACCUMULATION_STEPS", "3")
    answer = paceline(
        "launch", "--config_file", file, "--gradient-accumulation-steps=4", "--cpu", "--dry-run", script.name
    )
    config = answer.config
    assert (config["num_processes"], config["mixed_precision"]) == (1, "bf16")
    assert config["gradient_accumulation_steps"] == 4


def test_a_file_for_fsdp_1_is_translated_aloud(paceline: Paceline, script: Path, tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        distributed_type: FSDP
        num_processes: 2
        fsdp_config:
          fsdp_version: 1
          fsdp_sharding_strategy: SHARD_GRAD_OP
          fsdp_offload_params: true
        """,
    )
    answer = paceline("launch", "--config_file", file, "--cpu", "--dry-run", script.name)
    assert answer.code == 0
    notes = answer.err.splitlines()
    assert all(note.startswith(f"paceline: {file}:") for note in notes)
    assert any("fsdp_sharding_strategy SHARD_GRAD_OP" in note and "false" in note for note in notes)
    assert answer.config["fsdp_config"]["reshard_after_forward"] is False
    quiet = paceline("launch", "-q", "--config_file", file, "--cpu", "--dry-run", script.name)
    assert (quiet.code, quiet.err) == (0, "")


# Words


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--use_fsdp"], "strategy", "fsdp"),
        (["--use-fsdp", "true"], "strategy", "fsdp"),
        (["--use_fsdp=true"], "strategy", "fsdp"),
        (["--use_fsdp", "--fsdp-offload-params"], "fsdp_config.cpu_offload", True),
        (["--use_fsdp", "--fsdp_offload_params", "True"], "fsdp_config.cpu_offload", True),
        (["--use_fsdp", "--fsdp_offload-params=false"], "fsdp_config.cpu_offload", False),
        (["--use_fsdp", "--fsdp_offload_params", "no"], "fsdp_config.cpu_offload", False),
        (["--debug"], "debug", True),
        (["--debug", "yes"], "debug", True),
        (["--debug", "0"], "debug", False),
        (["--debug", "off"], "debug", False),
        (["--mixed-precision", "bf16"], "mixed_precision", "bf16"),
        (["--mixed_precision=bf16"], "mixed_precision", "bf16"),
        (["--distributed_type", "MULTI_CPU"], "strategy", "ddp"),
        (["--strategy", "fsdp"], "strategy", "fsdp"),
        (["--use_deepspeed"], "strategy", "deepspeed"),
        (["--use_deepspeed", "--zero_stage", "3"], "deepspeed_config.zero_stage", 3),
        (["--timeout", "90.5"], "timeout", 90.5),
        (["--dynamo_backend", "inductor"], "dynamo_config.backend", "inductor"),
    ],
    ids=str,
)
def test_flags(paceline: Paceline, script: Path, words: list[str], key: str, value: object) -> None:
    answer = paceline("launch", "--num_processes", "2", "--cpu", *words, "--dry-run", script.name)
    assert answer.code == 0, answer.err
    found: Any = answer.config
    for part in key.split("."):
        found = found[part]
    assert found == value
    assert answer.commands == [["train.py"]] * 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--num_processes", "9", "--cpu", "false", "--help", "-m", "-q"],
        ["--mixed_precison", "--dry-run", "--use_fsdp=true"],
        ["--", "x", "--", "y"],
        ["--use-fsdp", "two words", "", "it's", '"', "$HOME", "*", "é"],
        ["-", "true", "no"],
    ],
    ids=str,
)
def test_the_scripts_arguments_are_its_own(paceline: Paceline, script: Path, arguments: list[str]) -> None:
    answer = paceline("launch", "--num_processes", "2", "--cpu", "--dry-run", script.name, *arguments)
    assert answer.code == 0, answer.err
    assert answer.commands == [["train.py", *arguments]] * 2
    assert answer.config["num_processes"] == 2


@pytest.mark.parametrize(("word", "noted"), [("--dry-run", True), ("--num_processes=2", True), ("--seed", False)])
def test_a_flag_of_the_launcher_behind_the_script_is_noted(
    paceline: Paceline, script: Path, word: str, noted: bool
) -> None:
    answer = paceline("launch", "--num_processes=1", "--cpu", "--dry_run", script.name, word)
    assert answer.code == 0, answer.err
    assert (f"the script gets {word}: flags of the launcher come before the script" in answer.err) == noted


def test_two_dashes_end_the_flags(paceline: Paceline, script: Path) -> None:
    answer = paceline("launch", "--num_processes=1", "--cpu", "--dry_run", "--", script.name, "--cpu")
    assert answer.code == 0, answer.err
    assert answer.commands == [["train.py", "--cpu"]]


def test_modules_and_programs(paceline: Paceline, tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "train.py").write_text("raise SystemExit('imported')")
    for flag in ("-m", "--module"):
        answer = paceline("launch", "--num_processes=1", "--cpu", "--dry-run", flag, "pack.train", "-m", "x")
        assert answer.code == 0, answer.err
        assert answer.commands == [["--module", "pack.train", "-m", "x"]]
    answer = paceline("launch", "--num_processes=1", "--cpu", "--dry-run", "--no-python", "env", "--module")
    assert answer.commands == [["--program", "env", "--module"]]
    answer = paceline("launch", "-m", "--no_python", "pack.train")
    assert answer.code == 2
    assert "exclude each other" in answer.err


# Into a job of Slurm


def test_no_flag_is_lost_on_the_way_into_a_job(paceline: Paceline, script: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("mixed_precision: bf16\n")
    flags = ["--num_processes", "2", "--gradient-accumulation-steps=3", "--use_fsdp", "--cpu", "--log_dir", "logs"]
    words = [*flags, "--config_file", "own.yaml", "-t", "--quiet", "--slurm", "--dry_run"]
    answer = paceline("launch", *words, script.name, "--lr", "1 2")
    assert answer.code == 0, answer.err
    line = next(line for line in answer.lines if " -m paceline launch " in line)
    given = shlex.split(line.rpartition(" -m paceline launch ")[2])
    assert sorted(given[:-3]) == sorted(
        [
            f"--log_dir={tmp_path}/logs",
            "--tee",
            "--quiet",
            f"--config_file={tmp_path}/own.yaml",
            "--num_processes=2",
            "--gradient_accumulation_steps=3",
            "--use_fsdp=true",
            "--cpu=true",
        ]
    )
    assert given[-3:] == ["train.py", "--lr", "1 2"]
    module = paceline("launch", "--slurm", "--dry_run", "--no_python", "env")
    assert " launch --no_python env" in module.out


@pytest.mark.parametrize(
    "words", [["--mpirun_ccl", "1"], ["--use_deepspeed", "--deepspeed_hostfile", "hosts"]], ids=["mpirun", "deepspeed"]
)
def test_a_job_of_slurm_is_started_by_slurm_alone(paceline: Paceline, script: Path, words: list[str]) -> None:
    answer = paceline("launch", "--cpu", "--num_processes", "2", *words, "--slurm", "--dry_run", script.name)
    assert answer.code != 0
    assert "Slurm starts a launcher on each machine" in answer.err


# What is refused: exit code 2, and nothing starts


def test_every_problem_of_a_file_is_named_with_its_line(paceline: Paceline, script: Path, tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        distributed_type: FSDP
        fsdp_config:
          fsdp_versoin: 2
          fsdp_offload_params: maybe
        mixed_precision: bf15
        num_processes: two
        """,
    )
    answer = paceline("launch", "--config_file", file, "--timeout", "soon", script.name)
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("paceline: 5 problems in the configuration; nothing was started")
    for place in ("run.yaml:3", "run.yaml:4", "run.yaml:5", "run.yaml:6", "--timeout"):
        assert answer.err.count(f"  {place}: ") == 1, answer.err
    assert "did you mean fsdp_version?" in answer.err
    assert "did you mean bf16?" in answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mixed_precison", "bf16"], "--mixed_precision"),
        (["--num-proceses", "2"], "--num_processes"),
        (["--num_processes"], "requires an argument"),
        (["--use_fsdp", "--fsdp_version", "3"], "--fsdp_version"),
        (["--mixed_precision", "fp8", "--cpu"], "fp8 on the CPU"),
        (["--use_deepspeed", "--zero_stage", "4"], "--zero_stage"),
        (["--use_fsdp", "--multi_gpu"], "--multi_gpu"),
        (["--multi_gpu"], "that type trains on devices"),
        (["--zero_stage", "2"], "--zero_stage"),
        (["--gpu_ids", "0,1"], "gpu_ids"),
        (["--config_file", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
    ],
    ids=str,
)
def test_wrong_words(paceline: Paceline, script: Path, tmp_path: Path, words: list[str], said: str) -> None:
    ends_in_a_flag = words == ["--num_processes"]
    answer = paceline("launch", "--cpu", *words, *(() if ends_in_a_flag else (script.name,)))
    assert answer.code == 2
    assert said in answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / "it_ran").exists()


def test_a_script_that_is_not_there(paceline: Paceline, script: Path) -> None:
    answer = paceline("launch", "--cpu", "trian.py")
    assert answer.code == 2
    assert "Did you mean 'train.py'?" in answer.err


def test_no_script_at_all(paceline: Paceline) -> None:
    answer = paceline("launch")
    assert answer.code == 2
    assert "SCRIPT" in answer.err


def test_a_variable_that_nobody_knows(
    paceline: Paceline, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACELINE_MIXED_PRECISON", "bf16")
    answer = paceline("launch", "--cpu", script.name)
    assert answer.code == 2
    assert "PACELINE_MIXED_PRECISON" in answer.err
    assert "PACELINE_MIXED_PRECISION" in answer.err
    assert not (tmp_path / "it_ran").exists()


# Flags of other launchers


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("--role=trainer", "--role here: all ranks have the same role; leave it out."),
        ("--no-tpu-cluster", "leave it out."),
        ("--fp16", "write --mixed_precision fp16."),
        ("--nproc-per-node=4", "write --num_processes, the number over all machines."),
        ("--master_addr=head", "write --main_process_ip and --main_process_port."),
    ],
)
def test_a_flag_of_another_launcher_is_refused_with_the_way_out(
    paceline: Paceline, script: Path, flag: str, instead: str
) -> None:
    answer = paceline("launch", flag, script.name)
    assert answer.code == 2
    assert instead in answer.err
    assert "Did you mean" not in answer.err


@pytest.mark.parametrize("words", [["-t", "3"], ["--tee", "3"], ["--tee=3"], ["--tee"], ["-t"], ["--tee", "0"]])
def test_tee_may_have_the_number_that_accelerate_gives_it(paceline: Paceline, script: Path, words: list[str]) -> None:
    answer = paceline("launch", "--cpu", *words, "--dry-run", script.name, "-t", "5")
    assert answer.code == 0, answer.err
    assert answer.commands == [["train.py", "-t", "5"]] * 2


def test_tee_of_one_stream_is_refused(paceline: Paceline, script: Path) -> None:
    answer = paceline("launch", "--cpu", "--tee", "1", "--dry-run", script.name)
    assert (answer.code, "1 selects one stream; paceline shows both" in answer.err) == (2, True)


# Packages that are not installed


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import of these raises ModuleNotFoundError, as where they are not installed."""
    for name in ("deepspeed", "torchao"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("without_packages")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_deepspeed"], "--use_deepspeed: strategy: deepspeed needs the package deepspeed; it is not installed"),
        (["--strategy", "deepspeed"], "--strategy: deepspeed needs the package deepspeed"),
        (["--use_deepspeed"], "run: pip install 'paceline[deepspeed]'"),
        (["--mixed_precision", "fp8"], "--mixed_precision: fp8 needs the package torchao; it is not installed"),
        (["--mixed_precision", "fp8", "--fp8_emulate", "true"], "run: pip install 'paceline[torchao]'"),
    ],
)
def test_a_missing_package_is_found_before_any_rank_starts(
    paceline: Paceline, script: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    answer = paceline("launch", *flags, "--cpu", script.name)
    assert answer.code == 2
    assert message in answer.err
    assert "nothing was started" in answer.err
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.usefixtures("without_packages")
def test_a_missing_package_is_reported_with_all_other_problems(paceline: Paceline, script: Path) -> None:
    answer = paceline("launch", "--use_deepspeed", "--num_processes", "0", script.name)
    assert "2 problems" in answer.err
    assert "deepspeed needs the package deepspeed" in answer.err


@pytest.mark.usefixtures("without_packages")
def test_commands_that_start_no_rank_need_no_package(paceline: Paceline, tmp_path: Path) -> None:
    file = write(tmp_path, "distributed_type: DEEPSPEED\nmixed_precision: bf16\n")
    shown = paceline("config", "show", "--config_file", file)
    assert shown.code == 0
    assert "run.yaml:1: strategy: deepspeed needs the package deepspeed" in shown.err
    assert paceline("config", "convert", file, "-o", "new.yaml").code == 0
    checked = paceline("config", "check", file)
    assert checked.code == 2
    assert "run.yaml:1: strategy: deepspeed needs the package deepspeed" in checked.out


def test_fp8_without_a_gpu_is_found_before_any_rank_starts(
    paceline: Paceline, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "torchao"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    answer = paceline("launch", "--mixed_precision", "fp8", script.name)
    assert answer.code == 2
    assert "--mixed_precision: fp8 was requested, but the ranks train on the CPU; fp8 needs an NVIDIA GPU" in answer.err
    assert not (tmp_path / "it_ran").exists()
    # Under the switch the program's own Accelerator decides: torchao computes on a CPU as well.
    assert paceline("launch", "--mixed_precision", "fp8", "--as_accelerate", "true", script.name).code == 0
    assert (tmp_path / "it_ran").exists()


def test_a_program_that_may_not_be_executed(paceline: Paceline, tmp_path: Path) -> None:
    write(tmp_path, "echo started\n", "run.sh")
    answer = paceline("launch", "--cpu", "--no_python", "./run.sh")
    assert answer.code == 2
    assert "The program './run.sh' is not executable. Run chmod +x ./run.sh" in answer.err
    (tmp_path / "run.sh").chmod(0o755)
    answer = paceline("launch", "--cpu", "--no_python", "run.sh")
    assert "The program 'run.sh' is not in PATH. Write ./run.sh" in answer.err
    assert "There is no program 'nothing.sh'" in paceline("launch", "--cpu", "--no_python", "nothing.sh").err
