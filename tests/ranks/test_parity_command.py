"""`paceline parity` passes a script that is right on several processes, and finds what is wrong with others."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from paceline.cli.script_checks.comparison import BASES, Training, compare, explain

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import sys, torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset
from paceline import Accelerator, DataLoaderConfiguration, set_seed

words = set(sys.argv[1:])
if "unseeded" not in words:
    set_seed(7)
accelerator = Accelerator(
    gradient_accumulation_steps=2 if "accumulate" in words else 1,
    dataloader_config=DataLoaderConfiguration(
        split_batches="split" in words, dispatch_batches=True if "dispatch" in words else None
    ),
)
hidden = torch.nn.BatchNorm1d(8) if "batchnorm" in words else torch.nn.LayerNorm(8)
if "otherweights" in words:
    torch.manual_seed(accelerator.num_processes)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), hidden, torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
lr = 1e-2 * (accelerator.num_processes if "rate" in words else 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
torch.manual_seed(3)
rows, wanted = torch.randn(52, 4), torch.randn(52, 1)

class Noisy(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.randn(4), y

class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(rows, wanted))

data = Noisy(rows, wanted) if "noisy" in words else TensorDataset(rows, wanted)
loader = DataLoader(data, batch_size=4, shuffle=True)
if "sampler" in words:
    loader = DataLoader(data, batch_sampler=type("Mine", (BatchSampler,), {"__iter__": lambda self: BatchSampler.__iter__(self)})(RandomSampler(data), 4, False))
if "stream" in words:
    loader = DataLoader(Stream(), batch_size=4, drop_last=True, num_workers=2 if "workers" in words else 0)
if "after" in words:
    loader = accelerator.prepare(loader)
steps = 3 * len(loader) if words & {"before", "after"} else 20
warmup = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 10)
falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, falling], [10]) if "warmup" in words else falling
model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
if "unprepared" not in words:
    loader = accelerator.prepare(loader)
for epoch in range(100):
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = (model(x) - y).pow(2)
            if "weighted" in words:
                accelerator.backward(loss.sum(), weight=loss.numel())
            else:
                accelerator.backward(loss.sum() if "sum" in words else loss.mean())
            if "clip" in words and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
"""  # noqa: E501


def check(folder: Path, *words: str, flags: tuple[str, ...] = (), steps: int = 8) -> tuple[int, str]:
    """Check the script in a process of its own, since torch elastic leaves files open; code and output."""
    (folder / "train.py").write_text(SCRIPT)
    home = {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")}
    program = [sys.executable, "-m", "paceline", "parity", "--cpu", "--num_processes", "2", "--steps", str(steps)]
    done = subprocess.run(
        [*program, *flags, "train.py", *words], cwd=folder, env=home, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_right_script_passes(tmp_path: Path) -> None:
    code, said = check(tmp_path, "accumulate", "clip", flags=("--use_fsdp",))
    assert code == 0, said
    assert "ran      8 steps on 1 process, 8 on 2 (fsdp)" in said
    assert "dropout was turned off" in said
    assert "PASS" in said


@pytest.mark.slow
def test_batch_norm_without_synchronisation_is_found(tmp_path: Path) -> None:
    code, said = check(tmp_path, "batchnorm", steps=3)
    assert code == 1
    assert "differs  step 1: the loss" in said
    assert "batch normalisation (module.1)" in said


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--use_fsdp",)], ids=["ddp", "fsdp"])
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("split",),
        ("after",),
        ("before", "split"),
        ("sampler",),
        ("stream",),
        ("dispatch",),
        ("stream", "dispatch"),
        ("weighted", "accumulate"),
        ("unseeded",),
    ],
    ids=" ".join,
)
def test_right_scripts(words: tuple[str, ...], flags: tuple[str, ...], tmp_path: Path) -> None:
    code, said = check(tmp_path, *words, flags=flags, steps=20)
    assert code == 0, said


@pytest.mark.parametrize("more", [(), ("warmup",)], ids=["at once", "after a warmup"])
def test_a_schedule_from_a_loader_before_prepare_is_found(more: tuple[str, ...], tmp_path: Path) -> None:
    """Also where its steps show no difference yet."""
    code, said = check(tmp_path, "before", *more, steps=3)
    assert code == 1, said
    kind, one, several = ("SequentialLR", 31, 49) if more else ("LinearLR", 21, 39)
    assert f"differs  the optimizer steps that {kind} was made for: {one} on one process, {several} on several" in said
    assert "usually  the length of the schedule comes from a loader before prepare" in said


@pytest.mark.slow
def test_deepspeed(tmp_path: Path) -> None:
    code, said = check(tmp_path, "accumulate", flags=("--use_deepspeed", "--zero_stage", "2"))
    assert code == 0, said


@pytest.mark.slow
def test_mixed_precision(tmp_path: Path) -> None:
    code, said = check(tmp_path, flags=("--mixed_precision", "bf16"))
    assert code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("sum", "reduction='sum'"),
        ("rate", "the learning rate is 2 times as high on 2 processes"),
        ("unprepared", "the batches came from no prepared loader"),
        ("otherweights", "start from different weights"),
        ("noisy", "augmentation"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--use_fsdp",)], ids=["ddp", "fsdp"])
def test_wrong_scripts(word: str, says: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    code, said = check(tmp_path, word, flags=flags, steps=4)
    assert code == 1, said
    assert says in said


@pytest.mark.slow
def test_what_cannot_be_checked_says_what_to_do(tmp_path: Path) -> None:
    code, said = check(tmp_path, "stream", "workers", steps=4)
    assert code != 0
    assert "A stream is read by 2 workers" in said
    assert "Set num_workers to 0 or 1 for this check" in said


@pytest.mark.slow
def test_dropout_that_is_kept(tmp_path: Path) -> None:
    code, said = check(tmp_path, flags=("--keep_dropout",), steps=4)
    assert code == 1
    assert "dropout: each rank draws its own mask" in said


# The comparison alone, on notes as the recorders write them


def notes(ranks: int, **changes: Any) -> dict[int, list[dict[str, Any]]]:
    """Three steps of two samples for each rank of two, or of one that plays both."""
    found: dict[int, list[dict[str, Any]]] = {}
    for rank in range(ranks):
        lines: list[dict[str, Any]] = [{"kind": "start", "ranks": ranks, "seeded": True, "matmul": "highest"}]
        lines.append({"kind": "model", "weights": {"0.w": 1}, "batch_norms": []})
        for step in range(3):
            rows = [10 * step + n for n in range(4)]
            rows = rows if ranks == 1 else rows[2 * rank : 2 * rank + 2]
            loss = {"loss": 1.0, "weight": None, "epoch": 0, "samples": 4 * step + 4, "rows": rows, "shapes": [[3]]}
            lines.append({"kind": "loss", "step": step, "micro": 0, "labels": None, **loss, **changes.get("loss", {})})
            numbers = {"norm": 2.0, "rates": [0.1], **changes.get("step", {})}
            lines.append({"kind": "step", "optimizer": 0, "step": step, **numbers})
        found[rank] = lines
    return found


def reasons(**changes: Any) -> str:
    """What is said about two runs of which that on two ranks is changed."""
    one, several = Training.read(notes(1)), Training.read(notes(2, **changes))
    first = next(differences for differences in compare(one, several, BASES["no"]) if differences)
    return explain(several, first, dropout_kept=False)[0]


def test_runs_that_agree() -> None:
    assert not any(compare(Training.read(notes(1)), Training.read(notes(2)), BASES["no"]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss": {"loss": 0.5}}, "reduction='sum'"),
        ({"loss": {"loss": 2.0}}, "multiplies it by their number"),
        ({"loss": {"rows": [0, 1]}}, "the same samples"),
        ({"loss": {"loss": 1.1, "labels": 3, "shapes": [[5]]}}, "no known cause"),
        ({"step": {"norm": 4.0}}, "the gradient is 2 times as large"),
        ({"step": {"norm": 2.2}}, "outside of the prepared"),
        ({"step": {"rates": [0.2]}}, "the learning rate is 2 times as high"),
    ],
)
def test_what_usually_is_behind_a_difference(changes: dict[str, Any], says: str) -> None:
    assert says in reasons(**changes)
