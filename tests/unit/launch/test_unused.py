"""Settings that a script does not use: it builds no Accelerator, or Accelerate's own, which does not learn of them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from paceline.config import resolve
from tests.unit.config.files import FOUNDING

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
NOT_SHARDED = "Accelerate shards on accelerators only; here the 2 ranks train whole replicas"
UNUSED = "paceline: the script built neither an Accelerator nor a Trainer, and nothing else reads these settings: "
COPIES = "paceline: 2 processes each ran the whole script: it builds neither an Accelerator nor a Trainer"
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


def run(
    folder: Path, source: str, *, rank: str = "0", size: str = "2", file: str = FILE, code: int = 0, **flags: Any
) -> tuple[str, str]:
    (folder / "script.py").write_text(textwrap.dedent(source))
    (folder / "run.yaml").write_text(file)
    handed = resolve(flags=flags, env={}, file=folder / "run.yaml").to_json()
    variables = {"PACELINE_CONFIG": handed, "RANK": rank, "WORLD_SIZE": size}
    variables |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "paceline.launch.worker", "script.py"],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def test_on_the_cpu_fsdp_is_not_sharded_by_accelerate(tmp_path: Path) -> None:
    with_accelerate(tmp_path)
    out, error = run(tmp_path, BUILDS)
    assert out.splitlines() == ["['self', 'mixed_precision', 'cpu']", "True False __init__"]
    [line] = error.splitlines()
    assert line.startswith(f"paceline: strategy fsdp ({tmp_path}/run.yaml:2): {NOT_SHARDED}")
    assert "--as_accelerate" in line


PLUGIN = """
from accelerate import Accelerator
class Own(Accelerator):
    def __init__(self, **kwargs):
        pass
Accelerator(mixed_precision="fp16")
"""


def test_what_the_script_says_beats_the_file_and_is_named(tmp_path: Path) -> None:
    with_accelerate(tmp_path)
    _, error = run(tmp_path, PLUGIN, file="num_processes: 2\nmixed_precision: bf16\n")
    assert (
        error.strip() == f"paceline: mixed_precision bf16 ({tmp_path}/run.yaml:2) is overridden: the script says fp16."
    )


def test_accumulation_that_the_trainer_does_not_read_is_an_error(tmp_path: Path) -> None:
    with_accelerate(tmp_path)
    (tmp_path / "accelerate" / "accelerator.py").write_text(
        "class Accelerator:\n    def __init__(self, gradient_accumulation_plugin=None):\n        pass\n"
    )
    source = "from accelerate import Accelerator\nAccelerator(gradient_accumulation_plugin=1)\nprint('built')\n"
    out, error = run(tmp_path, source, file="num_processes: 2\ngradient_accumulation_steps: 4\n", code=1)
    assert "built" not in out
    assert f"{tmp_path}/run.yaml:2: gradient_accumulation_steps: 4 is not used" in error
    assert "TrainingArguments(gradient_accumulation_steps=4)" in error


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_value_that_does_not_reach_accelerate_is_an_error_on_every_rank(rank: str, tmp_path: Path) -> None:
    with_accelerate(tmp_path)
    out, error = run(tmp_path, BUILDS, rank=rank, file="num_processes: 2\ntimeout: 60\n", code=1)
    assert "True False" not in out
    assert f"{tmp_path}/run.yaml:2: timeout: 60" in error


def test_a_script_that_builds_nothing_is_told_at_its_end(tmp_path: Path) -> None:
    _, error = run(tmp_path, "print(1)\n")
    copies, line = error.splitlines()
    assert copies.startswith(COPIES)
    assert line.startswith(UNUSED)
    for setting in (
        f"strategy fsdp ({tmp_path}/run.yaml:2)",
        f"mixed_precision bf16 ({tmp_path}/run.yaml:3)",
        f"fsdp_config.fsdp_transformer_layer_cls_to_wrap ({tmp_path}/run.yaml:9)",
    ):
        assert setting in line
    assert "num_processes" not in line
    assert "dynamo" not in line


def test_a_flag_is_named_too(tmp_path: Path) -> None:
    source, file = "import sys\nsys.exit(0)\n", "num_processes: 1\n"
    _, error = run(tmp_path, source, size="1", file=file, mixed_precision="bf16", cpu=True)
    assert error.strip() == f"{UNUSED}mixed_precision bf16 (--mixed_precision)"


OURS = """
import paceline
def main():
    paceline.Accelerator()
main()
"""


@pytest.mark.parametrize(
    ("source", "options"),
    [
        pytest.param(BUILDS, {"rank": "1"}, id="another rank with Accelerate's"),
        pytest.param("print(1)\n", {"rank": "1"}, id="another rank"),
        pytest.param(
            "print(1)\n", {"size": "1", "file": "num_processes: 1\nmixed_precision: 'no'\n"}, id="nothing to use"
        ),
        pytest.param("raise SystemExit(3)\n", {"code": 3}, id="failed"),
        pytest.param(OURS, {"size": "1", "file": "mixed_precision: bf16\nuse_cpu: true\n"}, id="one of ours"),
        pytest.param(BUILDS, {"file": "num_processes: 2\nuse_cpu: true\n"}, id="Accelerate's"),
    ],
)
def test_where_there_is_nothing_to_say(source: str, options: dict[str, Any], tmp_path: Path) -> None:
    if "accelerate" in source:
        with_accelerate(tmp_path)
    assert "paceline:" not in run(tmp_path, source, **options)[1]


@pytest.mark.parametrize("source", ["print(1)\n", "import torch.distributed\nraise SystemExit\n"])
def test_copies_of_a_script_that_connects_nothing_are_named_without_any_setting(source: str, tmp_path: Path) -> None:
    _, error = run(tmp_path, source, file="num_processes: 2\n")
    [line] = error.splitlines()
    assert line.startswith(COPIES)
    assert "each worked on all data" in line
    assert "--num_processes 1" in line
    assert run(tmp_path, source, rank="1", file="num_processes: 2\n")[1] == ""


GROUP = """
import torch.distributed as dist
dist.init_process_group("gloo", {arguments})
{end}
"""


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        pytest.param("init_method=f'file://{__file__}.store', rank=0, world_size=1", "", id="open"),
        pytest.param(
            "init_method=f'file://{__file__}.store', rank=0, world_size=1", "dist.destroy_process_group()", id="closed"
        ),
        pytest.param("store=dist.HashStore(), rank=0, world_size=1", "", id="with a store"),
    ],
)
def test_a_script_that_opens_its_own_process_group_hears_nothing(arguments: str, end: str, tmp_path: Path) -> None:
    source = GROUP.format(arguments=arguments, end=end)
    assert "paceline:" not in run(tmp_path, source, file="num_processes: 2\n")[1]


def test_an_accelerator_that_is_imported_alone_uses_nothing(tmp_path: Path) -> None:
    with_accelerate(tmp_path)
    source = "import accelerate\nfrom paceline import Accelerator\n"
    assert run(tmp_path, source)[1].count(UNUSED) == 1


TRAINS = """
import torch, transformers, warnings
from accelerate.utils import gather
warnings.filterwarnings("ignore")
config = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
rows = [{"input_ids": torch.arange(8) + row, "labels": torch.arange(8) + row} for row in range(16)]
args = transformers.TrainingArguments(
    output_dir="out", max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True
)
transformers.set_seed(0)
trainer = transformers.Trainer(transformers.LlamaForCausalLM(config), args, train_dataset=rows)
accelerator = trainer.accelerator
trainer.train()
parts = [getattr(p, "to_local", lambda p=p: p)().detach() for p in trainer.model.parameters()]
sums = gather(sum(part.double().sum() for part in parts).reshape(1)).tolist()
print(
    "TRAINED", accelerator.process_index, accelerator.num_processes, accelerator.mixed_precision,
    type(trainer.model_wrapped).__name__, len(set(sums)), flush=True,
)
"""
ON_TWO_CPUS = FOUNDING.replace("num_processes: 4", "num_processes: 2") + "use_cpu: true\n"


@pytest.mark.slow
def test_the_trainer_of_transformers_acts_on_the_file(tmp_path: Path) -> None:
    """The ranks train one model, in the file's precision; it says that it cannot shard before it trains."""
    pytest.importorskip("transformers", reason="pip install 'paceline[transformers]'")
    pytest.importorskip("accelerate", reason="pip install accelerate")
    (tmp_path / "script.py").write_text(TRAINS)
    (tmp_path / "run.yaml").write_text(ON_TWO_CPUS)
    command = [sys.executable, "-m", "paceline", "launch", "--quiet", "--config_file", "run.yaml", "script.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("TRAINED"))
    assert lines == [f"TRAINED {rank} 2 bf16 DistributedDataParallel 1" for rank in (0, 1)], done.stdout
    assert done.stdout.count(NOT_SHARDED) == 1
    assert done.stdout.index(NOT_SHARDED) < done.stdout.index("TRAINED")
