"""The Trainer on real ranks: the same training on any layout, and after a resume."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_on_ranks
from tests.support.trainer import farthest, run

DEEPSPEED = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {}),
    "fsdp": (2, {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Block"], "fsdp_version": 2}}),
    "deepspeed": (2, {"deepspeed": DEEPSPEED}),
}
WHOLE = {"global_batch_size": 8, "eval_strategy": "steps", "eval_steps": 5, "lr_scheduler_type": "cosine"}


def train(changes: dict[str, Any], folder: str, resume: bool | str | None = None) -> tuple[list[dict[str, Any]], str]:
    log, trainer = run({**WHOLE, **changes}, folder, resume=resume)
    return log, trainer.accelerator.strategy.name


@pytest.mark.parametrize("most", [4, 1], ids=["accumulation 1 or 2", "accumulation 4 or 8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_training_on_every_layout(layout: str, most: int, tmp_path: Path) -> None:
    if layout == "deepspeed":
        pytest.importorskip("deepspeed", reason="pip install 'paceline[deepspeed]'")
    ranks, changes = LAYOUTS[layout]
    batch = {"per_device_train_batch_size": most}
    [(alone, _)] = run_on_ranks(1, train, batch, str(tmp_path / "alone"))
    together, strategy = run_on_ranks(ranks, train, {**batch, **changes}, str(tmp_path / "together"))[0]
    assert strategy == layout
    assert farthest(alone, together) < 1e-5
    assert [entry["eval_samples"] for entry in alone if "eval_samples" in entry] == [21.0] * 4


def test_a_mean_of_means_is_another_training(tmp_path: Path) -> None:
    """The known-wrong variant: without weights the split over ranks and micro-batches shows."""
    wrong = {"average_tokens_across_devices": False, "per_device_train_batch_size": 1}
    [(alone, _)] = run_on_ranks(1, train, {**wrong, "per_device_train_batch_size": 8}, str(tmp_path / "alone"))
    together, _ = run_on_ranks(2, train, wrong, str(tmp_path / "together"))[0]
    assert farthest(alone, together) > 1e-3


def resumed(changes: dict[str, Any], folder: str, drop: str) -> list[dict[str, Any]]:
    """Train to the end, forget what came after a checkpoint, and train to the end again."""
    whole, _ = train(changes, folder)
    for path in Path(folder).glob("checkpoint-*"):
        if path.name == drop:
            break
    else:
        raise AssertionError(f"no {drop} in {folder}")
    again, _ = train(changes, folder, resume=str(Path(folder) / drop))
    last = whole[-1]["train_loss"]
    assert abs(again[-1]["train_loss"] - last) < 1e-6
    return [*whole, *again]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_training_is_the_one_that_never_stopped(layout: str, tmp_path: Path) -> None:
    if layout == "deepspeed":
        pytest.importorskip("deepspeed", reason="pip install 'paceline[deepspeed]'")
    ranks, changes = LAYOUTS[layout]
    # Six steps a pass: the checkpoint after step 9 lies within the second one, and within a log interval of 2.
    changes = {**changes, "save_strategy": "steps", "save_steps": 9, "logging_steps": 2, "max_steps": 14}
    both = run_on_ranks(ranks, resumed, changes, str(tmp_path), "checkpoint-9")[0]
    half = len(both) // 2
    assert farthest(both[:half], both[half:]) < (1e-6 if layout == "deepspeed" else 1e-9)


def test_true_takes_the_newest_whole_checkpoint_on_another_number_of_ranks(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 6, "max_steps": 18, "per_device_train_batch_size": 2}
    folder = tmp_path / "run"
    whole, _ = run_on_ranks(2, train, changes, str(folder))[0]
    shutil.rmtree(folder / "checkpoint-18")
    (folder / "checkpoint-12" / "manifest.json").unlink()
    [(again, _)] = run_on_ranks(1, train, changes, str(folder), True)
    assert farthest(whole, again) < 1e-5
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-12",
        "checkpoint-18",
        "checkpoint-6",
    ]


def best(changes: dict[str, Any], folder: str) -> tuple[str | None, list[str], float, float]:
    saved = {"save_strategy": "steps", "save_steps": 5, "load_best_model_at_end": True, "save_total_limit": 1}
    _, trainer = run({**WHOLE, "learning_rate": 0.3, **saved, **changes}, folder)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    measured = trainer.evaluate()["eval_loss"]
    left = sorted(path.name for path in Path(folder).glob("checkpoint-*"))
    assert trainer.state.best_global_step == min(losses, key=lambda step: losses[step])
    return trainer.state.best_model_checkpoint, left, measured, min(losses.values())


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
def test_the_best_is_kept_and_loaded(layout: str, weights_only: bool, tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[layout]
    changes = {**changes, "save_only_model": weights_only}
    folder, left, measured, least = run_on_ranks(ranks, best, changes, str(tmp_path))[0]
    assert folder is not None
    assert Path(folder).name in left
    assert len(left) <= 2
    assert measured == pytest.approx(least, abs=1e-6)


def script(folder: Path, step: int) -> int:
    """Run the script that is asked to make room after a step; 0 resumes it."""
    launch = [sys.executable, "-m", "paceline", "launch", "--cpu", "--num_processes", "2"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*launch, str(root / "tests" / "ranks" / "trainer_script.py"), str(folder), str(step)],
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode in (0, 75), done.stderr[-3000:]
    return done.returncode


@pytest.mark.timeout(400)
def test_a_signal_saves_and_the_rest_is_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert script(folder, 60) == 75
    [saved] = folder.glob("checkpoint-*")
    assert 60 <= int(saved.name.removeprefix("checkpoint-")) < 600
    assert script(folder, 0) == 0
    again = json.loads((folder / "log.json").read_text(encoding="utf-8"))
    assert script(tmp_path / "whole", 5000) == 0
    whole = json.loads((tmp_path / "whole" / "log.json").read_text(encoding="utf-8"))
    assert farthest(whole, again) < 1e-9
