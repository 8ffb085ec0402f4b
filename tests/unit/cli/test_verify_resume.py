"""`paceline verify-resume` tells scripts that resume exactly from those that do not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from paceline.config import Recording, resolve
from paceline.config.resolved import Resolved

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.cli.conftest import Paceline

SCRIPT = """
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
from paceline import Accelerator, ProjectConfiguration

names = ProjectConfiguration(project_dir="out", automatic_checkpoint_naming=True, total_limit=2)
accelerator = Accelerator(project_config=names)
torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
data = TensorDataset(torch.randn(24, 4), torch.randn(24, 1))
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=4, shuffle=True))
if "fail" in sys.argv:
    raise ValueError("no such data")
if "forget" not in sys.argv:
    accelerator.load_state()
resumed = loader.state_dict()["samples"]
if "reseed" in sys.argv and resumed:
    torch.manual_seed(99)
if "restart" in sys.argv and resumed:
    loader.set_epoch(7)
step = 0
while step < 100:
    for x, y in loader:
        accelerator.backward(((model(x) - y) ** 2).mean())
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 4 == 0:
            accelerator.save_state(blocking="background" not in sys.argv)
"""


STEPS = ("--steps", "9", "--kill_at", "6")


def check(
    folder: Path,
    *words: str,
    flags: tuple[str, ...] = ("--num_processes", "1"),
    steps: tuple[str, ...] = STEPS,
    source: str = SCRIPT,
) -> tuple[int, list[str]]:
    """Check the script in a process of its own, since torch elastic leaves files open; code and lines."""
    (folder / "train.py").write_text(source)
    home = {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")}
    program = [sys.executable, "-m", "paceline", "verify-resume", "--cpu", *flags, *steps]
    done = subprocess.run(
        [*program, "train.py", *words], cwd=folder, env=home, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.splitlines()


@pytest.mark.slow
def test_a_script_that_resumes_exactly_passes(tmp_path: Path) -> None:
    code, lines = check(tmp_path)
    assert code == 0, lines
    assert "resumed  from the checkpoint of step 4, continued to step 9" in lines
    assert lines[-1].startswith("PASS     11 batches and losses")


@pytest.mark.slow
def test_steps_that_are_faster_than_a_save_in_the_background(tmp_path: Path) -> None:
    # The kill comes one step after the only save has begun.
    code, lines = check(tmp_path, "background", steps=("--steps", "7", "--kill_at", "5"))
    assert code == 0, lines
    assert "resumed  from the checkpoint of step 4, continued to step 7" in lines


@pytest.mark.parametrize(
    ("word", "says"),
    [
        pytest.param("reseed", "differs  step 5, rank 0, after the resume: loss", marks=pytest.mark.slow),
        ("restart", "instead of sample 20 of epoch 0"),
        pytest.param(
            "forget",
            "did not load out/checkpoints/checkpoint_0, which was complete when the run was killed: "
            "call accelerator.load_state()",
            marks=pytest.mark.slow,
        ),
        pytest.param("fail", "no such data", marks=pytest.mark.slow),
    ],
)
def test_a_script_that_does_not_fails_with_the_first_differences(word: str, says: str, tmp_path: Path) -> None:
    code, lines = check(tmp_path, word)
    assert code == 1
    assert says in "\n".join(lines)
    assert lines[-1].startswith("FAIL")


def test_a_script_that_saves_later_than_the_kill_is_told_so(tmp_path: Path) -> None:
    code, lines = check(tmp_path, steps=("--steps", "5", "--kill_at", "3"))
    assert code == 1
    assert lines[-1] == (
        "FAIL     the run saved no complete checkpoint in its first 3 steps: use --kill_at 25 --steps 40, "
        "or save more often"
    )


TRAINER = """
import os, sys, torch
from transformers import Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def forward(self, x, labels):
        return {"loss": ((self.layer(x) - labels) ** 2).mean()}

torch.manual_seed(1)
data = [{"x": torch.randn(4), "labels": torch.randn(1)} for _ in range(64)]
arguments = TrainingArguments(
    "out", per_device_train_batch_size=4, max_steps=50, save_steps=2, report_to="none", disable_tqdm=True, use_cpu=True
)
resume = "resume" in sys.argv and os.path.isdir("out") and any("checkpoint-" in name for name in os.listdir("out"))
Trainer(Model(), arguments, train_dataset=data).train(resume_from_checkpoint=resume)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "flags", "says"),
    [
        ((), (), "recorded no backward pass: .* needs --as_accelerate"),
        ((), ("--as_accelerate",), r"did not load out/checkpoint-\d+, .*trainer.train\(resume_from_checkpoint=True\)"),
        (("resume",), ("--as_accelerate",), "PASS"),
    ],
    ids=["accelerate", "forgets", "resumes"],
)
def test_a_script_with_the_trainer_of_transformers(
    words: tuple[str, ...], flags: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    code, lines = check(tmp_path, *words, flags=("--num_processes", "1", *flags), source=TRAINER)
    assert re.search(says, lines[-1]), lines
    assert code == (0 if words else 1)


@pytest.mark.slow
def test_a_script_without_paceline(tmp_path: Path) -> None:
    code, lines = check(tmp_path, flags=("--num_processes", "1"), source="print('trained')\n")
    assert code == 1
    assert lines[-1].endswith("the script does not import paceline, and only what an Accelerator trains is recorded")


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("background",)], ids=["blocking", "background"])
def test_two_ranks_under_fsdp(words: tuple[str, ...], tmp_path: Path) -> None:
    code, lines = check(tmp_path, *words, flags=("--num_processes", "2", "--use_fsdp"))
    assert code == 0, lines


def test_the_kill_lies_between(paceline: Paceline, script: Path) -> None:
    answer = paceline("verify-resume", "--steps", "5", "--kill_at", "9", str(script))
    assert answer.code == 2
    assert "at least 1 and less than --steps" in answer.err


def test_a_recording_travels_to_the_workers() -> None:
    resolved = resolve(flags={}, env={}, file=None)
    assert Resolved.from_json(resolved.to_json()).recording is None
    asked = Resolved(resolved.config, resolved.origins, (), Recording("notes", 9, 6))
    assert Resolved.from_json(asked.to_json()).recording == Recording("notes", 9, 6)
