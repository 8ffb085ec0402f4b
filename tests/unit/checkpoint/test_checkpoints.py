"""Checkpoints that something happened to: each is an error that says what, or is passed over for an older one."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, TensorDataset

from paceline import Accelerator, ProjectConfiguration
from paceline.checkpoint import TensorShard, find_checkpoints, newest_checkpoint, open_checkpoint
from paceline.checkpoint.folder import remove_leftovers
from paceline.checkpoint.format.json_state import from_plain, to_plain
from paceline.checkpoint.format.layout import TensorShape, lay_out
from paceline.checkpoint.io.staging import Stager
from paceline.checkpoint.save_load import load_shards
from paceline.collectives import SoloGroup
from paceline.errors import (
    CheckpointError,
    ConfigError,
    DamagedCheckpointError,
    ForeignOptimizerError,
    PacelineError,
    StateError,
)
from tests.support.engines import slowly
from tests.unit.checkpoint.test_foreign import RECORDED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Run:
    """A tiny training in this process, whose checkpoints are numbered if it has a project."""

    def __init__(self, project: Path | None = None, **settings: Any) -> None:
        config = ProjectConfiguration()
        if project is not None:
            config = ProjectConfiguration(
                project_dir=str(project), automatic_checkpoint_naming=True, save_on_signals=(), **settings
            )
        self.accelerator = Accelerator(cpu=True, strategy="single", project_config=config)
        torch.manual_seed(1)
        model: Any = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.1)
        loader: Any = DataLoader(TensorDataset(torch.randn(12, 3)), 2, shuffle=True)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.batches = iter(self.loader)

    def step(self) -> None:
        (x,) = next(self.batches)
        self.accelerator.backward(self.model(x).square().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with two whole checkpoints."""
    run = Run(tmp_path)
    for _ in range(2):
        run.step()
        run.accelerator.save_state()
    return tmp_path


def newest(project: Path) -> Path:
    return project / "checkpoints" / "checkpoint_1"


def truncate(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    os.truncate(path, path.stat().st_size - 4)


def flip_in(name: str, where: int) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[where] ^= 1
        (folder / name).write_bytes(data)

    return flip


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-20])


def link_outside(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.rename(folder.parent.parent / "elsewhere")
    path.symlink_to(folder.parent.parent / "elsewhere")


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "manifest.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return write


WEIGHT = "model/0.weight"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, r"1 of 4 files: optimizer\.safetensors has [\d,]+ of [\d,]+ bytes"),
    "flipped": (flip_in("model.safetensors", -3), r"model\.safetensors is damaged: elements \d+ to \d+ of model/"),
    "flipped-state": (flip_in("training.json", 30), r"training\.json .* is damaged"),
    "flipped-rank": (flip_in("rank-00000.json", 30), r"rank-00000\.json .* is damaged"),
    "missing": (remove, r"model\.safetensors is missing"),
    "no-manifest": (lose_manifest, r"has no manifest\.json"),
    "cut-manifest": (cut_manifest, r"manifest is damaged"),
    "link": (link_outside, r"model\.safetensors is a link.*cp -rL"),
    "future": (edit(lambda d: d.update(format=9)), r"manifest has format 9.*reads formats 1 to 2"),
    "outside": (
        edit(lambda d: d["files"].update({"../../etc/passwd": d["files"]["training.json"]})),
        r"names the file '\.\./\.\./etc/passwd'",
    ),
    "oversized": (edit(lambda d: d["tensors"][WEIGHT].update(shape=[10**9, 10**6])), r"does not fit into"),
    "negative": (edit(lambda d: d["tensors"][WEIGHT].update(offset=-8)), r"does not fit into"),
    "over": (
        edit(lambda d: d["tensors"]["model/0.bias"].update(offset=d["tensors"][WEIGHT]["offset"] + 4)),
        r"model/0\.bias and model/0\.weight overlap in model\.safetensors",
    ),
    "less": (edit(lambda d: d["files"]["training.json"].update(size=-1)), r"size of training\.json is -1 bytes"),
    "gap": (edit(lambda d: d["tensors"][WEIGHT].update(pieces=[])), r"lacks pieces of model/0\.weight"),
    "overlap": (edit(lambda d: d["tensors"][WEIGHT]["pieces"].append([0, 3, 1])), r"out of order"),
    "dtype": (edit(lambda d: d["tensors"][WEIGHT].update(dtype="save")), r"dtype 'save', which torch does not have"),
    "endless": (edit(lambda d: d["files"]["training.json"].update(size=float("inf"))), r"manifest is damaged"),
    "shape": (edit(lambda d: d["tensors"][WEIGHT].update(shape="4x3")), r"manifest is damaged"),
    "no-list": (edit(lambda d: d.pop("files")), r"manifest is damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_says_what_is_wrong(project: Path, fault: str) -> None:
    damage, words = FAULTS[fault]
    damage(newest(project))
    with pytest.raises(DamagedCheckpointError, match=words):
        Run(project).accelerator.load_state(newest(project))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_newest_whole_one_is_taken_instead(project: Path, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = Run(project)
    whole.accelerator.load_state(project / "checkpoints" / "checkpoint_0")
    FAULTS[fault][0](newest(project))
    run = Run(project)
    with caplog.at_level(logging.WARNING):
        loaded = run.accelerator.load_state()
    assert loaded == str(project / "checkpoints" / "checkpoint_0")
    assert torch.equal(run.weights(), whole.weights())
    skipped = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(skipped) == 1
    assert "skipped checkpoint_1: " in skipped[0]
    assert f"{newest(project)} cannot be loaded" not in skipped[0]
    # Nothing was lost: the damaged one is still there, and the next gets a number above it.
    run.step()
    assert Path(run.accelerator.save_state()).name == "checkpoint_2"
    assert newest(project).exists()


def test_no_whole_checkpoint_is_an_error_and_not_a_new_start(project: Path) -> None:
    for folder in (project / "checkpoints").iterdir():
        truncate(folder)
    with pytest.raises(DamagedCheckpointError, match="has 2 checkpoints, and none is complete"):
        Run(project).accelerator.load_state()


def test_verify_finds_a_flipped_byte_anywhere(project: Path) -> None:
    folder = newest(project)
    open_checkpoint(folder).verify()
    names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    assert len(names) == 4
    for name in names:
        size = (folder / name).stat().st_size
        for where in {0, size // 2, size - 1}:
            flip_in(name, where)(folder)
            with pytest.raises(DamagedCheckpointError, match="damaged"):
                open_checkpoint(folder).verify()
            flip_in(name, where)(folder)
    progress: list[int] = []
    open_checkpoint(folder).verify(progress.append)
    assert sum(progress) == sum((folder / name).stat().st_size for name in names)


def test_verify_checks_a_file_and_its_pieces_apart(project: Path) -> None:
    folder = newest(project)
    manifest = (folder / "manifest.json").read_text()
    edit(lambda d: d["files"]["model.safetensors"].update(crc32=1))(folder)
    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors of .* is damaged\. The checksum of the file"):
        open_checkpoint(folder).verify()
    (folder / "manifest.json").write_text(manifest)
    edit(lambda d: d["tensors"][WEIGHT]["pieces"][0].__setitem__(2, 1))(folder)
    with pytest.raises(DamagedCheckpointError, match=r"elements 0 to \d+ of model/0\.weight are not what was written"):
        open_checkpoint(folder).verify()


def test_foreign_folders_and_leftovers_are_left_out(project: Path) -> None:
    checkpoints = project / "checkpoints"
    (checkpoints / "best").mkdir()
    (checkpoints / "notes.txt").write_text("mine")
    (checkpoints / "checkpoint_9.partial-0123abcd").mkdir()
    assert [found.folder.name for found in find_checkpoints(project)] == ["checkpoint_1", "checkpoint_0"]
    assert [found.folder.name for found in find_checkpoints(checkpoints)] == ["checkpoint_1", "checkpoint_0"]
    Run(project).accelerator.save_state()
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"best", "notes.txt", "checkpoint_0", "checkpoint_1", "checkpoint_2"}


def test_what_was_being_replaced_is_found(project: Path) -> None:
    folder = newest(project)
    kept = folder.with_name("checkpoint_1.replaced-0123abcd")
    folder.rename(kept)
    assert open_checkpoint(folder).manifest.step == 2
    remove_leftovers(folder, all_names=False)
    assert folder.exists()
    assert not kept.exists()


def test_a_folder_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    run = Run()
    run.step()
    run.accelerator.save_state(tmp_path / "mine")
    run.step()
    run.accelerator.save_state(tmp_path / "mine")
    assert open_checkpoint(tmp_path / "mine").manifest.step == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_other_things_in_the_folder_stay(tmp_path: Path) -> None:
    run = Run()
    folder = tmp_path / "mine"
    (folder / "epoch_0").mkdir(parents=True)
    (folder / "epoch_0" / "deep.txt").write_text("deep")
    (folder / "tokenizer.json").write_text("{}")
    for step in (1, 2):
        run.step()
        run.accelerator.save_state(folder)
        assert open_checkpoint(folder).manifest.step == step
        assert (folder / "tokenizer.json").read_text() == "{}"
        assert (folder / "epoch_0" / "deep.txt").read_text() == "deep"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_kill_while_other_things_go_over_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(name)
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == "b.txt":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        run.accelerator.save_state(folder)
    monkeypatch.undo()
    assert open_checkpoint(folder).manifest.step == 0
    run.accelerator.save_state(folder)
    assert [(folder / name).read_text() for name in ("a.txt", "b.txt")] == ["a.txt", "b.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_folder_that_a_script_works_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    work = tmp_path / "project" / "src"
    work.mkdir(parents=True)
    (work / "train.py").write_text("mine")
    monkeypatch.chdir(work)
    for name in (".", "..", str(tmp_path)):
        with pytest.raises(CheckpointError, match="the working directory of this process, or a parent of it"):
            run.accelerator.save_state(name)
    with pytest.raises(CheckpointError, match=r"train\.py is a file"):
        run.accelerator.save_state("train.py")
    assert (work / "train.py").read_text() == "mine"


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    run = Run()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    for _ in range(2):
        run.accelerator.save_state(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert open_checkpoint(tmp_path / "scratch").manifest.step == 0
    assert {path.name for path in tmp_path.iterdir()} == {"link", "scratch"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_noticed_before_the_first_byte(small_disk: Path) -> None:
    run = Run(small_disk)
    with pytest.raises(CheckpointError, match=r"needs 16\.78 MB, and 4\.19 MB are free.*nothing was written"):
        run.accelerator.save_state()
    assert list((small_disk / "checkpoints").iterdir()) == []


def test_a_disk_that_cannot_be_written_to_is_an_error(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        Run(small_disk).accelerator.save_state()


@pytest.mark.parametrize("blocking", [True, False])
def test_a_write_that_fails_half_way_leaves_what_was_there(project: Path, blocking: bool) -> None:
    run = Run(project)
    run.step()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large"):  # noqa: PT012 - one of the two raises
            run.accelerator.save_state(blocking=blocking)
            run.accelerator.wait_for_save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in (project / "checkpoints").iterdir()} == {"checkpoint_0", "checkpoint_1"}
    found = newest_checkpoint(project)
    assert found is not None
    found.verify()


def test_saves_in_the_background_get_numbers_of_their_own(tmp_path: Path) -> None:
    run = Run(tmp_path, save_in_background=True)
    names = []
    for _ in range(3):
        run.step()
        names.append(Path(run.accelerator.save_state()).name)
    run.accelerator.wait_for_save()
    assert names == ["checkpoint_0", "checkpoint_1", "checkpoint_2"]
    steps = [found.checkpoint.manifest.step for found in find_checkpoints(tmp_path) if found.checkpoint]
    assert steps == [3, 2, 1]


ENDING = """
import sys
import torch
from paceline import Accelerator
accelerator = Accelerator(cpu=True, strategy="single")
model = torch.nn.Linear(1000, 1000)
model = accelerator.prepare(model)
accelerator.save_state(sys.argv[1], blocking=False)
{end}
"""


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), *slowly([("pass", 0), ("raise ValueError", 1)])])
def test_the_end_of_the_program_waits_for_the_save(tmp_path: Path, end: str, code: int) -> None:
    command = [sys.executable, "-c", ENDING.format(end=end), str(tmp_path / "state")]
    assert subprocess.run(command, capture_output=True, text=True).returncode == code
    open_checkpoint(tmp_path / "state").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_failed_save_is_logged_at_the_end_of_the_program(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("mine")
    command = [sys.executable, "-c", ENDING.format(end="pass"), str(tmp_path / "state")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "the last save failed: The checkpoint" in done.stderr
    assert "state is a file" in done.stderr


def test_a_failed_save_in_the_background_comes_up_at_a_step(project: Path) -> None:
    run = Run(project)
    run.step()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        run.accelerator.save_state(blocking=False)
        for thread in threading.enumerate():
            if thread.name == "paceline-save":
                thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(CheckpointError, match="File too large"):
        run.step()


def test_memory_is_freed_after_a_failed_save_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    run.step()
    (tmp_path / "state").write_text("mine")
    run.accelerator.save_state(tmp_path / "state", blocking=False)
    strategy = run.accelerator.strategy
    released: list[Stager] = []
    monkeypatch.setattr(Stager, "release", lambda self: released.append(self))
    with pytest.raises(CheckpointError, match="is a file"):
        run.accelerator.free_memory()
    assert len(released) == 1
    run.accelerator.prepare(torch.nn.Linear(2, 1))
    assert run.accelerator.strategy is not strategy


def test_signals_are_watched_after_a_failed_save_in_the_background(tmp_path: Path) -> None:
    project = ProjectConfiguration(project_dir=str(tmp_path), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, strategy="single", project_config=project)
    accelerator.prepare(torch.nn.Linear(2, 1))
    (tmp_path / "checkpoints").write_text("mine")
    accelerator.save_state(blocking=False)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(CheckpointError):
        accelerator.free_memory()
    is_watched = signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, handler)
    accelerator.on_preemption(None)
    assert is_watched


def test_what_a_refused_prepare_has_added_is_in_no_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, strategy="single")
    plain, loader = torch.nn.Linear(3, 1), DataLoader(TensorDataset(torch.randn(12, 3)), 2)
    with pytest.raises(ForeignOptimizerError):
        accelerator.prepare(plain, torch.optim.SGD(torch.nn.Linear(3, 1).parameters(), lr=0.1), loader)
    model, optimizer, batches = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1), loader)
    for (x,) in batches:
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(tmp_path / "state")
    again = Accelerator(cpu=True, strategy="single")
    plain = torch.nn.Linear(3, 1)
    loaded, _, _ = again.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1), loader)
    again.load_state(tmp_path / "state")
    assert torch.equal(loaded.weight, model.weight)


def test_a_file_that_cannot_be_opened_leaves_none_open(project: Path) -> None:
    checkpoint = open_checkpoint(newest(project))
    records = checkpoint.manifest.tensors
    shards = {name: TensorShard.whole(torch.empty(record.shape)) for name, record in records.items()}
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in ("model", "optimizer"):
        path = checkpoint.folder / f"{name}.safetensors"
        path.rename(path.with_suffix(".hidden"))
        with pytest.raises(CheckpointError, match=path.name):
            load_shards(checkpoint, shards, SoloGroup())
        path.with_suffix(".hidden").rename(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_other_objects_are_counted(project: Path) -> None:
    other = Accelerator(cpu=True, strategy="single")
    other.prepare(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)))
    folder = newest(project)
    with pytest.raises(StateError, match=r"1 optimizer, and this run has 0"):
        other.load_state(folder)


def test_strict_loading_names_both_sides(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    saver = Accelerator(cpu=True, strategy="single")
    saved = saver.prepare(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)))
    saver.save_state(project / "weights")
    other = Accelerator(cpu=True, strategy="single")
    model = other.prepare(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Identity(), torch.nn.Linear(4, 1)))
    words = r"missing from it: model/2\.weight, model/2\.bias; only in it: model/1\.weight, model/1\.bias"
    with pytest.raises(CheckpointError, match=words):
        other.load_state(project / "weights")
    before = model[2].weight.detach().clone()
    with caplog.at_level(logging.WARNING):
        other.load_state(project / "weights", strict=False)
    assert "missing from it: model/2.weight" in caplog.text
    assert torch.equal(model[0].weight, saved[0].weight)
    assert torch.equal(model[2].weight, before)


def test_hooks_write_into_the_checkpoint_and_take_models_over(project: Path) -> None:
    run = Run(project)
    seen: list[str] = []

    def save(models: list[Any], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        seen.extend(weights[0])
        (Path(folder) / "adapter.bin").write_bytes(b"mine")
        weights.pop()
        models.pop()

    def load(models: list[Any], folder: str) -> None:
        assert (Path(folder) / "adapter.bin").read_bytes() == b"mine"
        models.pop()

    handle = run.accelerator.register_save_state_pre_hook(save)
    run.step()
    folder = run.accelerator.save_state(blocking=False)
    handle.remove()
    handle.remove()
    assert seen == ["0.weight", "0.bias", "1.weight", "1.bias"]
    checkpoint = open_checkpoint(folder)
    assert "adapter.bin" in checkpoint.manifest.files
    assert not [name for name in checkpoint.manifest.tensors if name.startswith("model/")]
    again = Run(project)
    before = again.weights()
    again.accelerator.register_load_state_pre_hook(load)
    again.accelerator.load_state(folder)
    assert torch.equal(again.weights(), before)
    assert again.optimizer.state[next(iter(again.model.parameters()))]["step"] == 1


def test_files_of_hooks_in_folders_of_their_own_are_checked_too(project: Path) -> None:
    run = Run(project)

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        for name in ("unet/inner/weights.bin", "my notes (1).txt", ".hidden"):
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())

    run.accelerator.register_save_state_pre_hook(save)
    folder = Path(run.accelerator.save_state())
    checkpoint = open_checkpoint(folder)
    assert {"unet/inner/weights.bin", "my notes (1).txt", ".hidden"} < checkpoint.manifest.files.keys()
    checkpoint.verify()
    (folder / "unet/inner/weights.bin").write_bytes(b"unet/inner/weights.bun")
    with pytest.raises(DamagedCheckpointError, match=r"unet/inner/weights\.bin of .* is damaged"):
        open_checkpoint(folder).verify()
    (folder / "unet").rename(project / "elsewhere")
    with pytest.raises(DamagedCheckpointError, match=r"unet/inner/weights\.bin is missing"):
        open_checkpoint(folder)
    (folder / "unet").symlink_to(project / "elsewhere")
    with pytest.raises(DamagedCheckpointError, match=r"unet/inner/weights\.bin is a link or lies behind one.*cp -rL"):
        open_checkpoint(folder)


def test_a_hook_that_fails_is_named_and_nothing_is_left(project: Path) -> None:
    run = Run(project)
    files: dict[str, int] = {}
    run.accelerator.register_save_state_pre_hook(lambda models, weights, folder: files["unet"])
    with pytest.raises(CheckpointError, match=r"rank 0: KeyError: 'unet'") as caught:
        run.accelerator.save_state()
    assert isinstance(caught.value.__cause__, KeyError)
    assert {path.name for path in (project / "checkpoints").iterdir()} == {"checkpoint_0", "checkpoint_1"}


def test_what_is_prepared_is_loaded_when_not_strict(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator(cpu=True, strategy="single")
    model: Any = accelerator.prepare(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)))
    with pytest.raises(StateError, match=r"holds 1 optimizer, and this run has 0.*load with strict=False"):
        accelerator.load_state(newest(project))
    with caplog.at_level(logging.WARNING):
        accelerator.load_state(newest(project), strict=False)
    assert "holds 1 optimizer, and this run has 0: the first 0 were loaded" in caplog.text
    assert torch.equal(model[0].weight.cpu(), open_checkpoint(newest(project)).read("model/0.weight"))


def test_another_kind_of_optimizer_is_refused(project: Path) -> None:
    accelerator = Accelerator(cpu=True, strategy="single")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    accelerator.prepare(model, optimizer, DataLoader(TensorDataset(torch.randn(12, 3)), 2, shuffle=True))
    for strict in (True, False):
        with pytest.raises(StateError, match=r"has betas, eps, but the one in this run has dampening, momentum"):
            accelerator.load_state(newest(project), strict=strict)


def test_a_data_set_of_another_size_is_reported(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator(cpu=True, strategy="single")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer, DataLoader(TensorDataset(torch.randn(14, 3)), 2, shuffle=True))
    with caplog.at_level(logging.WARNING):
        accelerator.load_state(newest(project))
    assert "within an epoch of 12 samples, but the data set has 14 now" in caplog.text


def test_arguments_of_accelerate(project: Path) -> None:
    accelerator = Run(project).accelerator
    accelerator.save_state(safe_serialization=True)
    accelerator.load_state(load_kwargs={}, map_location="cpu")
    with pytest.raises(PacelineError, match=r"save_state\(safe_serialization=False\)"):
        accelerator.save_state(safe_serialization=False)
    with pytest.raises(PacelineError, match=r"load_kwargs=\{'weights_only': False\}"):
        accelerator.load_state(load_kwargs={"weights_only": False})
    with pytest.raises(PacelineError, match=r"map_location='cuda:1'"):
        accelerator.load_state(map_location="cuda:1")


def test_the_folder_may_be_given_beside_the_configuration(tmp_path: Path) -> None:
    numbering = ProjectConfiguration(automatic_checkpoint_naming=True, save_on_signals=())
    accelerator = Accelerator(cpu=True, strategy="single", project_dir=tmp_path, project_config=numbering)
    assert accelerator.project_dir == str(tmp_path)
    assert accelerator.project_configuration.automatic_checkpoint_naming
    with pytest.raises(ConfigError, match="true without project_dir; checkpoints are numbered in that folder"):
        Accelerator(cpu=True, project_config=numbering)
    with pytest.raises(ConfigError, match=r"iteration: was set to 7 on an existing .*iteration=7"):
        setattr(accelerator.project_configuration, "iteration", 7)  # noqa: B010 - a type checker refuses it too


def test_the_parent_folder_of_checkpoints_is_recognized(project: Path) -> None:
    with pytest.raises(CheckpointError, match=r"name one of them, such as .*checkpoint_1"):
        Run(project).accelerator.load_state(project)


def test_a_run_of_another_library_is_passed_over_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(RECORDED / "accelerate", tmp_path / "checkpoints" / "checkpoint_4")
    run = Run(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert run.accelerator.load_state() is None
    assert "skipped checkpoint_4: another library wrote it; load_state('" in caplog.text
    assert Path(run.accelerator.save_state()).name == "checkpoint_5"
    assert Path(run.accelerator.load_state() or "").name == "checkpoint_5"


def test_a_folder_beside_automatic_names_is_refused(project: Path) -> None:
    with pytest.raises(CheckpointError, match="the folder would be ignored"):
        Run(project).accelerator.save_state(project / "x")


def test_objects_that_cannot_be_registered_are_listed(project: Path) -> None:
    with pytest.raises(StateError, match=r"int \(number 0\), object \(number 1\), the class Linear \(number 2\)"):
        Run(project).accelerator.register_for_checkpointing(3, object(), torch.nn.Linear)


def test_states_go_through_json() -> None:
    tensors: dict[str, torch.Tensor] = {}
    state = {
        "a": [1, 2.5, None, (True, "x")],
        7: torch.tensor([1, 2]),
        "n": {"b": torch.ones((), dtype=torch.bfloat16)},
    }
    document = json.loads(json.dumps(to_plain(state, "custom_0/state", tensors)))
    back = from_plain(document, tensors)
    assert back["a"] == state["a"]
    assert torch.equal(back[7], torch.tensor([1, 2]))
    assert torch.equal(back["n"]["b"], torch.ones((), dtype=torch.bfloat16))
    inline = from_plain(json.loads(json.dumps(to_plain(state, "loader_0"))))
    assert torch.equal(inline[7], back[7])
    assert torch.equal(inline["n"]["b"], back["n"]["b"])
    with pytest.raises(StateError, match=r"loader_0\.inner\.0 is a set"):
        to_plain({"inner": [{1, 2}]}, "loader_0")


def test_types_and_names_survive() -> None:
    state: dict[Any, Any] = {
        (1, "x"): {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
        "array": np.arange(3.0),
        "size": torch.Size([2, 3]),
        "number": np.float32(0.5),
        "__tuple__": [1],
    }
    rooms: list[dict[str, torch.Tensor] | None] = [{}, None]
    for tensors in rooms:
        back = from_plain(json.loads(json.dumps(to_plain(state, "custom_0/state", tensors))), tensors)
        assert back.keys() == state.keys()
        assert [float(back[(1, "x")]["a.b"]), float(back[(1, "x")]["a"]["b"])] == [1, 0]
        assert isinstance(back["array"], np.ndarray)
        assert np.array_equal(back["array"], state["array"])
        assert (back["size"], back["number"], back["__tuple__"]) == ((2, 3), 0.5, [1])


@dataclasses.dataclass
class Nested:
    """What a script may keep its settings in."""

    decay: float


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.eye(2).to_sparse(), "tensor that is sparse, nested or quantized"),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged), "NestedTensor"),
        (torch.ones(2, device="meta"), "tensor on the meta device"),
        (Nested(0.5), r"dataclass, Nested\..*dataclasses\.asdict"),
        (b"raw", "bytes"),
        (np.array(["a"]), "array of <U1, which torch does not have"),
        (np.datetime64("2026-01-01"), "datetime64"),
    ],
)
def test_what_json_and_tensors_do_not_hold_is_named(value: Any, kind: str) -> None:
    with pytest.raises(StateError, match=rf"custom_0/state\.x is a {kind}"):
        to_plain({"x": value}, "custom_0/state", {})


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(True),
        torch.tensor(2.5, dtype=torch.float64),
        torch.arange(4.0).view(2, 2).t(),
        torch.ones(3, 0),
        torch.tensor([1 + 2j, 3 - 1j]),
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        torch.tensor(1 + 2j, dtype=torch.complex128),
        torch.tensor([3], dtype=torch.uint16),
        torch.nn.Parameter(torch.ones(2)),
    ],
    ids=lambda value: f"{str(value.dtype)[6:]}-{list(value.shape)}",
)
def test_tensors_of_every_kind_come_back(value: torch.Tensor) -> None:
    choices: list[dict[str, torch.Tensor] | None] = [{}, None]
    for tensors in choices:
        back = from_plain(json.loads(json.dumps(to_plain([value], "custom_0/state", tensors))), tensors)[0]
        assert back.dtype == value.dtype
        assert back.shape == value.shape
        assert torch.equal(back.resolve_neg(), value.detach().resolve_conj().resolve_neg())
        if tensors:
            assert all(not tensor.is_conj() and not tensor.is_neg() for tensor in tensors.values())


@pytest.mark.parametrize(
    "value",
    [
        np.array(2.5),
        np.arange(6).reshape(2, 3)[:, ::-1],
        np.array([True, False]),
        np.array([1 + 2j]),
        np.zeros((0, 2), np.float16),
    ],
    ids=lambda value: f"{value.dtype}-{value.shape}",
)
def test_arrays_of_every_kind_come_back(value: Any) -> None:
    choices: list[dict[str, torch.Tensor] | None] = [{}, None]
    for tensors in choices:
        back = from_plain(json.loads(json.dumps(to_plain([value], "custom_0/state", tensors))), tensors)[0]
        assert isinstance(back, np.ndarray)
        assert (back.dtype, back.shape) == (value.dtype, value.shape)
        assert np.array_equal(back, value)


def test_numbers_of_every_kind_come_back() -> None:
    state = [1 + 2j, np.complex64(1 - 1j), np.bool_(True), np.int64(7), float("inf"), 2**80, {"__complex__": [1, 2]}]
    assert from_plain(json.loads(json.dumps(to_plain(state, "custom_0/state", {})))) == state
    assert np.isnan(from_plain(json.loads(json.dumps(to_plain([float("nan")], "custom_0/state"))))[0])


def test_big_states_are_spread_over_files_that_an_index_lists(tmp_path: Path) -> None:
    shapes = {f"model/{index}": TensorShape((5, 3), "float32") for index in range(5)}
    shapes["model/empty"] = TensorShape((0, 3), "bool")
    files, places = lay_out(shapes, file_bytes=120)
    assert [file.name for file in files] == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    for file in files:
        (tmp_path / file.name).write_bytes(file.header + bytes(file.data_bytes))
        with safe_open(tmp_path / file.name, framework="pt") as opened:
            assert {name: tuple(opened.get_tensor(name).shape) for name in opened.keys()} == {  # noqa: SIM118
                name: entry.shape for name, entry in file.entries.items()
            }
    assert places["model/3"].file == files[1].name
    assert places["model/3"].offset == len(files[1].header) + 60


@pytest.mark.parametrize("blocking", [True, False])
def test_a_dtype_that_the_files_cannot_hold_is_named(tmp_path: Path, blocking: bool) -> None:
    accelerator = Accelerator(cpu=True, strategy="single")
    model = torch.nn.Linear(2, 1)
    model.register_buffer("phases", torch.ones(3, dtype=torch.complex128))
    accelerator.prepare(model)
    with pytest.raises(CheckpointError, match=r"model/phases .* complex128.*view_as_real"):
        accelerator.save_state(tmp_path / "state", blocking=blocking)
    assert not list(tmp_path.iterdir())
