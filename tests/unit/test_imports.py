"""What an import costs: each promise is checked in a process of its own."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = {"torch", "pydantic", "transformers", "deepspeed", "numpy", "yaml", "safetensors", "tqdm", "psutil"}
UNASKED = {"accelerate", "deepspeed", "sklearn", "tensorboard", "transformers", "datasets", "matplotlib"}


@functools.cache
def modules_after(statement: str) -> frozenset[str]:
    """The modules loaded after one statement in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    return frozenset(done.stdout.split())


def test_the_check_itself_can_fail() -> None:
    assert "json" in modules_after("import json")
    assert "json" not in modules_after("pass")


def test_the_package_alone_loads_nothing_heavy() -> None:
    loaded = modules_after("import paceline")
    assert "paceline" in loaded
    assert not HEAVY & loaded
    assert not [name for name in loaded if name.startswith("paceline.")]


def test_the_version_and_the_list_of_names_load_nothing_heavy() -> None:
    assert not HEAVY & modules_after("import paceline; paceline.__version__, dir(paceline)")


def test_errors_load_nothing_heavy() -> None:
    assert not HEAVY & modules_after("from paceline import PacelineError")


@pytest.mark.parametrize(
    "statement",
    [
        "import paceline.config",
        "from paceline import FullyShardedDataParallelPlugin",
        "import paceline.environment.world",
    ],
)
def test_configuration_needs_no_torch(statement: str) -> None:
    loaded = modules_after(statement)
    assert not {"torch", "numpy", "transformers", "deepspeed"} & loaded


def test_the_accelerator_loads_no_optional_package() -> None:
    loaded = modules_after("from paceline import Accelerator")
    assert "torch" in loaded
    assert not UNASKED & loaded
    assert "paceline.strategies.fsdp.strategy" not in loaded, "a strategy is imported when it is chosen"
    assert "paceline.cli" not in loaded


def test_the_trainer_loads_no_optional_package() -> None:
    loaded = modules_after("from paceline import Trainer, TrainingArguments")
    assert not UNASKED & loaded
    assert not {"torch._inductor", "torch._dynamo", "torch.distributed.checkpoint"} & (
        loaded - modules_after("import torch")
    )


def test_the_accelerator_loads_little_beyond_torch() -> None:
    """Heavy parts of torch that `import torch` leaves out stay out until a strategy needs them."""
    extra = modules_after("from paceline import Accelerator") - modules_after("import torch")
    heavy = {"torch._inductor", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"}
    assert not heavy & extra


def test_the_accelerator_leaves_the_schema_and_dtensor_to_the_first_use() -> None:
    """Together they took half a second, seven times what is left."""
    loaded = modules_after("from paceline import Accelerator")
    extra = loaded - modules_after("import torch")
    assert not {"pydantic", "yaml", "sympy", "rich", "torch.distributed.tensor"} & extra
    foreign = {name.partition(".")[0] for name in extra} - {"paceline"} - set(sys.stdlib_module_names)
    assert foreign <= {"safetensors", "typing_extensions"}, foreign
    assert len([name for name in extra if name.startswith("torch.")]) <= 2
    assert len(extra) < 85


def test_an_accelerator_on_one_cpu_needs_none_of_torchs_heavy_parts() -> None:
    built = modules_after("from paceline import Accelerator; Accelerator(cpu=True)")
    heavy = ("torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo")
    assert not set(heavy) & (built - modules_after("import torch"))


def test_a_constant_of_the_configuration_does_not_load_the_schema() -> None:
    assert "pydantic" not in modules_after("from paceline.config.schema.shapes import TRUE_WORDS")


def call_of(arguments: list[str]) -> str:
    """Statements that call the command line in silence."""
    return f"""
sys.argv = ["paceline", *{arguments!r}]
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
    try:
        from paceline.cli import main
        main()
    except SystemExit as ended:
        assert not ended.code or len(sys.argv) == 1
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    loaded = modules_after(call_of(arguments))
    assert "click" in loaded
    assert not {"torch", "numpy", "pydantic"} & loaded


def test_help_comes_at_once() -> None:
    """Best of five, since other work may run beside the tests."""
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "paceline", "--help"], capture_output=True, text=True, timeout=800, check=True
        )
        took.append(time.perf_counter() - begun)
        assert "launch" in done.stdout
        assert "env" in done.stdout
        if took[-1] < 1.5:
            break
    assert min(took) < 1.5, f"paceline --help took {min(took):.2f} s"


@pytest.mark.parametrize(
    "arguments",
    [
        ["config", "--help"],
        ["config", "show", "--help"],
        ["config", "show", "--num_processes", "2", "--config_file", "one.yaml"],
        ["config", "check", "one.yaml"],
        ["config", "convert", "one.yaml"],
        ["config", "default", "--config_file", "new.yaml"],
        ["config", "schema"],
        ["completion", "bash"],
        ["report", "run"],
        ["launch", "--help"],
    ],
    ids=" ".join,
)
def test_commands_that_start_nothing_need_no_torch(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text("num_processes: 1\n", encoding="utf-8")
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text('{"step": 1, "loss": 1}\n', encoding="utf-8")
    loaded = modules_after(call_of(arguments))
    assert "paceline.cli.click_helpers" in loaded
    assert not {"torch", "numpy", "questionary"} & loaded
