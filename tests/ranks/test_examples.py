"""The examples, run for real in every way that their first lines promise."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from paceline.errors import PREEMPTED
from tests.support.engines import slowly

EXAMPLES = Path(__file__).parents[2] / "examples"

PYTHON = [sys.executable]
LAUNCH = [sys.executable, "-m", "paceline", "launch", "--cpu", "--num_processes", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
WAYS = {
    "python": PYTHON,
    "launch": LAUNCH,
    "torchrun": TORCHRUN,
    "sample file": [*LAUNCH, "--config_file", str(EXAMPLES / "fsdp.yaml")],
    "fsdp bf16": [*LAUNCH, "--use_fsdp", "--mixed_precision", "bf16"],
}
DEMO = "language_model.py"
TINY = ["--steps", "12", "--width", "32", "--layers", "2", "--heads", "2", "--context", "32"]
TINY += ["--bytes", "60000", "--sample", "4"]


def environment(folder: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")}
    return clean | {"OMP_NUM_THREADS": "1", "HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""}


def run(folder: Path, way: str, example: str, *arguments: str) -> str:
    done = subprocess.run(
        [*WAYS[way], str(EXAMPLES / example), *arguments],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def language_model(folder: Path, way: str) -> tuple[float, float, dict[str, tuple[int, ...]]]:
    """Validation losses before and after, and the shapes of the weights that were written."""
    batch = "8" if way == "python" else "4"
    text = run(folder, way, "language_model.py", *TINY, "--batch-size", batch, "--output", "weights")
    found = re.findall(r"validation loss: (\d+\.\d+) -> (\d+\.\d+)", text)
    assert len(found) == 1, text
    state = load_file(folder / "weights" / "model.safetensors")
    return float(found[0][0]), float(found[0][1]), {name: tuple(t.shape) for name, t in state.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float, dict[str, tuple[int, ...]]]:
    return language_model(tmp_path_factory.mktemp("alone"), "python")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["launch", "torchrun", "fsdp bf16"])
def test_the_language_model_learns_the_same_everywhere(
    way: str, tmp_path: Path, alone: tuple[float, float, dict[str, tuple[int, ...]]]
) -> None:
    before, after, shapes = language_model(tmp_path, way)
    assert after < before - 0.1
    tolerance = 0.05 if "bf16" in way else 2e-3
    assert (before, after) == pytest.approx(alone[:2], abs=tolerance)
    assert shapes == alone[2]


@pytest.mark.slow
def test_the_demo_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    arguments = [*TINY, "--steps", "150", "--batch-size", "4", "--save-every", "5", "--output", "weights"]
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole", "launch", DEMO, *arguments, "--save-every", "1000")
    command = [*LAUNCH, str(EXAMPLES / DEMO), *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path), start_new_session=True)
    deadline = time.monotonic() + 90
    while not (tmp_path / "weights" / "checkpoints" / "checkpoint_1").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(100) == PREEMPTED
    went_on = run(tmp_path, "launch", DEMO, *arguments, "--resume")
    assert re.search(r"resuming from weights/checkpoints/checkpoint_\d+", went_on)
    ends = [re.findall(r"validation loss: \S+ -> (\S+)", text) for text in (whole, went_on)]
    assert ends[0] == ends[1]


def test_the_weights_have_the_models_own_names(
    alone: tuple[float, float, dict[str, tuple[int, ...]]],
) -> None:
    shapes = alone[2]
    assert shapes["blocks.1.attention.qkv.weight"] == (96, 32)
    assert len({shapes.get("tokens.weight"), shapes.get("head.weight")} - {None}) == 1
    assert not [name for name in shapes if "module" in name or "_orig_mod" in name]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["launch", *slowly(["python", "fsdp bf16"])])
def test_every_test_image_is_counted_once(way: str, tmp_path: Path) -> None:
    # Looked for without importing it, which would set variables in this process.
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("the images ship with scikit-learn, which is not installed")
    text = run(tmp_path, way, "vision.py", "--epochs", "6")
    epochs = re.findall(r"epoch (\d+): (\d+) of (\d+) test images correct", text)
    assert [int(epoch) for epoch, *_ in epochs] == list(range(1, 7))
    # 1,797 images, every fifth from the first on: 360.
    assert {int(seen) for *_, seen in epochs} == {360}
    assert int(epochs[-1][1]) / 360 > 0.95


TRAINER = ["--max_steps", "8", "--width", "32", "--layers", "2", "--context", "32", "--text_bytes", "60000"]
TRAINER += ["--eval_steps", "4", "--save_steps", "4", "--logging_steps", "2", "--learning_rate", "1e-2", "--output_dir"]


@pytest.mark.slow
def test_the_trainer_trains_a_language_model_under_the_sample_configuration(tmp_path: Path) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("pip install 'paceline[transformers]'")
    arguments = [str(EXAMPLES / "trainer_language_model.yaml"), *TRAINER]
    text = run(tmp_path, "sample file", "trainer_language_model.py", *arguments, "run")
    assert re.search(r"strategy +fsdp", text)
    assert "2 LlamaDecoderLayer" in text
    losses = [float(loss) for loss in re.findall(r"{eval_loss: (\d+\.\d+)", text)]
    assert losses[1] < losses[0] < 5.5
    state = load_file(tmp_path / "run" / "model.safetensors")
    assert state["model.embed_tokens.weight"].shape == (256, 32)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    again = run(
        tmp_path,
        "python",
        "trainer_language_model.py",
        *arguments,
        "run",
        "--resume_from_checkpoint",
        "true",
        "--per_device_train_batch_size",
        "32",
    )
    assert "perplexity" in again
    assert float(re.findall(r"{eval_loss: (\d+\.\d+)", again)[-1]) == pytest.approx(losses[-1], abs=0.05)


@pytest.mark.slow
def test_the_trainer_counts_every_line_once(tmp_path: Path) -> None:
    short = ["--num_train_epochs", "1", "--max_steps", "30", "--eval_strategy", "steps", "--eval_steps", "30"]
    short += ["--save_strategy", "steps", "--save_steps", "30", "--per_device_eval_batch_size", "24"]
    text = run(tmp_path, "launch", "text_classification.py", *short)
    [(right, counted)] = re.findall(r"(\d+\.\d)% of (\d+) held-out lines classified correctly", text)
    assert int(counted) == 500
    assert float(right) > 60
