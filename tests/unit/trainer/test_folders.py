"""Where a Trainer writes: folders that are used already, and the home folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from paceline import Trainer, TrainingArguments
from paceline.errors import CheckpointError
from paceline.trainer import get_last_checkpoint
from tests.support.ranks import run_on_ranks
from tests.support.trainer import Sentences, arguments, run, tagger

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def test_a_new_training_is_refused_among_checkpoints_of_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, trainer = run(SAVING, str(tmp_path))
    with pytest.raises(CheckpointError, match="has checkpoint-2, checkpoint-4 of another"):
        run(SAVING, str(tmp_path))
    # Nothing is mixed by one that saves nothing, nor by a resume, which says what lies ahead of it.
    run({"max_steps": 4}, str(tmp_path))
    assert "of a run that went further" not in caplog.text
    run(SAVING, str(tmp_path), resume=str(tmp_path / "checkpoint-2"))
    assert "has checkpoint-4 of a run that went further" in caplog.text
    # A further training of the same Trainer replaces its own.
    trainer.train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    shutil.rmtree(tmp_path / "checkpoint-4")
    run(SAVING, str(tmp_path))


def refused(folder: str) -> str:
    """Each rank has a folder of its own, and rank 1 does not see the checkpoints."""
    run({**SAVING, "max_steps": 2}, folder)
    args = TrainingArguments(**arguments(folder, **SAVING))
    trainer = Trainer(tagger(), args, train_dataset=Sentences(16, 1))
    if not trainer.is_world_process_zero():
        trainer.args.output_dir = f"{folder}-elsewhere"
    with pytest.raises(CheckpointError) as raised:
        trainer.train()
    return str(raised.value)


def test_all_ranks_refuse(tmp_path: Path) -> None:
    said = run_on_ranks(2, refused, str(tmp_path / "run"))
    assert all("has checkpoint-2 of another" in text for text in said)


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    _, trainer = run(SAVING, "~/run")
    assert trainer.args.output_dir == str(tmp_path / "run")
    trainer.save_model("~/weights")
    assert (tmp_path / "weights" / "model.safetensors").is_file()
    (tmp_path / "args.yaml").write_text("learning_rate: 0.5\n", encoding="utf-8")
    assert TrainingArguments.from_file("~/args.yaml").learning_rate == 0.5
    more: dict[str, Any] = {**SAVING, "max_steps": 6}
    _, trainer = run(more, "~/run", resume="~/run/checkpoint-4")
    assert trainer.state.global_step == 6
    assert not (tmp_path / "~").exists()


def started(folder: str, **changes: Any) -> int:
    """What a script does that can be started again at any time; return the steps that it begins with."""
    args = TrainingArguments(**arguments(folder, **{**SAVING, **changes}))
    trainer = Trainer(tagger(), args, train_dataset=Sentences(16, 1))
    last = get_last_checkpoint(args.output_dir)
    trainer.train(resume_from_checkpoint=last)
    return 0 if last is None else int(last.rpartition("-")[2])


def test_a_script_can_be_started_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    assert started(str(folder)) == 0
    assert started(str(folder), max_steps=8) == 4
    # One that is damaged is skipped, and what a crash left of one has another name.
    (folder / "checkpoint-8" / "manifest.json").unlink()
    (folder / "checkpoint-10.partial-01234567").mkdir()
    assert started(str(folder), max_steps=8) == 6
    assert "skipped checkpoint-8" in caplog.text
    assert get_last_checkpoint(folder) == str(folder / "checkpoint-8")


def test_without_a_checkpoint_true_says_what_begins_and_resumes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*get_last_checkpoint\(output_dir\)"):
        run(SAVING, str(tmp_path), resume=True)
