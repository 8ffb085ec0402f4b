"""Settings that a script does not use, because it trains with the Accelerator of another library."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from paceline.config import resolve

if TYPE_CHECKING:
    from pathlib import Path

FILE = """
distributed_type: FSDP
mixed_precision: bf16
num_processes: 2
use_cpu: true
gradient_accumulation_steps: 1
fsdp_config:
  fsdp_version: 2
  fsdp_transformer_layer_cls_to_wrap: Block
dynamo_config:
  dynamo_backend: 'NO'
"""
ACCELERATE = """
class Accelerator:
    def __init__(self, mixed_precision=None, *, cpu=False):
        self.cpu = cpu
"""
WHO = "paceline: Accelerate's own Accelerator reads nothing of paceline's configuration. Not used: "
BUILDS = """
import inspect
from accelerate import Accelerator
class Own(Accelerator):
    pass
print(list(inspect.signature(Accelerator.__init__).parameters))
print(Own(cpu=True).cpu, Accelerator("no").cpu, Accelerator.__init__.__name__, flush=True)
"""


def with_accelerate(folder: Path) -> None:
    """Put a package of that name beside the script, which has what matters of it."""
    package = folder / "accelerate"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("from .accelerator import Accelerator\n")
    (package / "accelerator.py").write_text(ACCELERATE)


def run(folder: Path, source: str, *, rank: str = "0", file: str = FILE, **flags: Any) -> tuple[str, str]:
    (folder / "script.py").write_text(textwrap.dedent(source))
    (folder / "run.yaml").write_text(file)
    handed = resolve(flags=flags, env={}, file=folder / "run.yaml").to_json()
    variables = {"PACELINE_CONFIG": handed, "RANK": rank, "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "paceline.launch.worker", "script.py"],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_what_a_file_says_is_named_once(tmp_path: Path) -> None:
    with_accelerate(tmp_path)
    out, error = run(tmp_path, BUILDS)
    assert out.splitlines() == ["['self', 'mixed_precision', 'cpu']", "True False __init__"]
    [line] = error.splitlines()
    assert line.startswith(WHO)
    for setting in (
        f"strategy fsdp ({tmp_path}/run.yaml:2)",
        f"mixed_precision bf16 ({tmp_path}/run.yaml:3)",
        f"fsdp_config.fsdp_transformer_layer_cls_to_wrap ({tmp_path}/run.yaml:9)",
    ):
        assert setting in line
    assert "num_processes" not in line
    assert "dynamo" not in line
    assert "from paceline import Trainer, TrainingArguments" in line


def test_a_flag_is_named_too(tmp_path: Path) -> None:
    with_accelerate(tmp_path)
    _, error = run(tmp_path, BUILDS, file="num_processes: 1\n", mixed_precision="bf16", cpu=True)
    assert f"{WHO}mixed_precision bf16 (--mixed_precision). Write" in error


@pytest.mark.parametrize(
    ("source", "options"),
    [
        pytest.param(BUILDS, {"rank": "1"}, id="another rank"),
        pytest.param(BUILDS, {"file": "num_processes: 1\nmixed_precision: 'no'\n"}, id="nothing that it could use"),
        pytest.param("import accelerate\n", {}, id="imported alone"),
        pytest.param("print(1)\n", {}, id="neither"),
        pytest.param(
            "import paceline\nkept = paceline.Accelerator()\n" + BUILDS,
            {"file": "mixed_precision: bf16\nuse_cpu: true\n"},
            id="beside one of ours",
        ),
    ],
)
def test_where_there_is_nothing_to_say(source: str, options: dict[str, str], tmp_path: Path) -> None:
    with_accelerate(tmp_path)
    assert "Not used" not in run(tmp_path, source, **options)[1]


def test_an_accelerator_of_ours_that_is_imported_alone_uses_nothing(tmp_path: Path) -> None:
    with_accelerate(tmp_path)
    _, error = run(tmp_path, "from paceline import Accelerator as Ours\n" + BUILDS)
    assert error.count(WHO) == 1


TRAINS = """
import torch, transformers, warnings
warnings.filterwarnings("ignore")
class Model(torch.nn.Linear):
    def forward(self, x, labels=None):
        return {"loss": super().forward(x).mean()}
rows = [{"x": torch.ones(2), "labels": 0}] * 8
args = transformers.TrainingArguments(
    output_dir="out", max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True
)
trainer = transformers.Trainer(Model(2, 1), args, train_dataset=rows)
print("built", flush=True)
trainer.train()
print("trained", flush=True)
"""


@pytest.mark.timeout(300)
def test_a_script_of_the_transformers_trainer_is_told_before_it_trains(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="pip install 'paceline[transformers]'")
    pytest.importorskip("accelerate", reason="pip install accelerate")
    (tmp_path / "script.py").write_text(TRAINS)
    (tmp_path / "run.yaml").write_text(FILE)
    command = [sys.executable, "-m", "paceline", "launch", "--quiet", "--config_file", "run.yaml", "script.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    said = "Accelerate's own Accelerator, which the Trainer of transformers builds, reads nothing"
    assert done.stdout.count(said) == 1
    assert done.stdout.index(said) < done.stdout.index("trained")
    assert "strategy fsdp (run.yaml:2)" in done.stdout
