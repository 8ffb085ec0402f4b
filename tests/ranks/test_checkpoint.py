"""A training state goes to disk under one layout and comes back under another, bit by bit, and training goes on."""

from __future__ import annotations

import itertools
import json
import random
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from paceline import Accelerator, ProjectConfiguration, checkpoint
from paceline.checkpoint import open_checkpoint
from paceline.errors import CheckpointError, PacelineError, SteppingError
from tests.support.engines import needs_deepspeed, with_deepspeed
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks
from tests.support.state import Whole, assert_same_state, take_state
from tests.support.training import DDP, FSDP, FSDP_FOUR, HSDP, SINGLE, ZERO, Layout, build, make_optimizer

if TYPE_CHECKING:
    from collections.abc import Iterator

DDP_THREE = Layout("ddp3", 3, "ddp")
ZERO_1, ZERO_2, ZERO_3 = ZERO[1], ZERO[2], ZERO[3]
ZERO_3_FOUR = Layout("zero3x4", 4, "deepspeed", {"zero_stage": 3})
SAMPLES, GLOBAL_BATCH = 96, 12


class Run:
    """One training over a shuffled loader, that can be saved between any two steps."""

    def __init__(self, layout: Layout, seed: int = 0, device: str = "cpu", **arguments: Any) -> None:
        torch.manual_seed(17)
        self.accelerator = build(layout, device, **arguments)
        model: Any = TinyTransformer(seed=seed)
        optimizer: Any = make_optimizer(model)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
        data = TensorDataset(make_tokens(SAMPLES), torch.arange(SAMPLES))
        generator = torch.Generator().manual_seed(5)
        loader: Any = DataLoader(data, GLOBAL_BATCH // layout.ranks, shuffle=True, generator=generator)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        self.losses: list[float] = []
        self.ids: list[list[int]] = []
        self.batches = self.epochs()

    def epochs(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def train(self, steps: int) -> None:
        """Take steps, over the end of an epoch too."""
        for tokens, ids in itertools.islice(self.batches, steps):
            loss = token_losses(self.model(tokens), tokens).mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.losses.append(float(self.accelerator.reduce(loss.detach(), "mean")))
            self.ids.append(sorted(self.accelerator.gather(ids).tolist()))


def save_and_go_on(layout: Layout, folder: str, device: str = "cpu") -> tuple[Whole, list[float], list[list[int]]]:
    steps = 5
    run = Run(layout, device=device)
    run.train(steps)
    run.accelerator.save_state(folder)
    state = take_state(run.accelerator)
    run.train(6)
    return state, run.losses[steps:], run.ids[steps:]


def load_and_go_on(
    layout: Layout, folder: str, device: str = "cpu"
) -> tuple[Whole, list[float], list[list[int]], float]:
    run = Run(layout, seed=9, device=device)
    run.accelerator.load_state(folder)
    state = take_state(run.accelerator)
    rate = run.scheduler.get_last_lr()[0]
    run.train(6)
    return state, run.losses, run.ids, rate


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SINGLE, FSDP),
        (DDP, SINGLE),
        (FSDP, FSDP),
        *[
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in [
                (FSDP, DDP_THREE),
                (FSDP_FOUR, HSDP),
                (SINGLE, SINGLE),
                (DDP, DDP),
                (DDP, DDP_THREE),
                (FSDP, HSDP),
                (FSDP_FOUR, DDP),
                (HSDP, FSDP),
            ]
        ],
        *[pytest.param(*pair, marks=needs_deepspeed) for pair in [(ZERO_3, ZERO_1), (DDP, ZERO_2)]],
        *[
            pytest.param(*pair, marks=[needs_deepspeed, pytest.mark.slow])
            for pair in [
                (ZERO_1, ZERO_1),
                (ZERO_2, ZERO_3),
                (ZERO_3, ZERO_3),
                (ZERO_2, SINGLE),
                (FSDP, ZERO_3_FOUR),
                (ZERO_3_FOUR, FSDP),
            ]
        ],
    ],
    ids=str,
)
def test_a_checkpoint_is_loaded_by_another_layout(one: Layout, other: Layout, tmp_path: Path) -> None:
    folder = str(tmp_path / "state")
    saved = run_on_ranks(one.ranks, save_and_go_on, one, folder)
    state, losses, ids = saved[0]
    loaded = run_on_ranks(other.ranks, load_and_go_on, other, folder)
    for got, went_on, saw, rate in loaded:
        assert_same_state(got, state)
        assert saw == ids
        assert rate == pytest.approx(1e-2 * (1 - 0.9 * 5 / 12))
        assert went_on == pytest.approx(losses, abs=1e-5)
        if one is other:
            assert went_on == losses


def files_of(layout: Layout, folder: str) -> None:
    run = Run(layout)
    run.train(3)
    run.accelerator.save_state(folder)


@pytest.mark.parametrize("layout", [SINGLE, FSDP, *with_deepspeed([ZERO_2])], ids=str)
def test_weights_are_plain_safetensors(layout: Layout, tmp_path: Path) -> None:
    run_on_ranks(layout.ranks, files_of, layout, str(tmp_path / "state"))
    weights = load_file(tmp_path / "state" / "model.safetensors")
    names = {name for name, _ in TinyTransformer().named_parameters()}
    assert weights.keys() == {*names, "scale"}
    model = TinyTransformer(seed=4)
    model.load_state_dict(weights, strict=False)
    checkpoint = open_checkpoint(tmp_path / "state")
    checkpoint.verify()
    checked_by_a_stranger(checkpoint.folder)
    manifest = checkpoint.manifest
    assert (manifest.step, manifest.epoch, manifest.samples, manifest.world_size) == (3, 0, 36, layout.ranks)
    assert manifest.strategy == layout.strategy
    assert manifest.ties == {"model/head.weight": "model/tokens.weight"}
    moments = load_file(tmp_path / "state" / "optimizer.safetensors")
    assert moments["tokens.weight/exp_avg"].shape == weights["tokens.weight"].shape
    assert torch.equal(checkpoint.read("optimizer/norm.bias/step"), torch.tensor(3.0))


def test_files_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    for layout in (DDP, FSDP):
        run_on_ranks(2, files_of, layout, str(tmp_path / layout.name))
    shapes = [
        {
            name: (record.shape, record.dtype, record.file)
            for name, record in open_checkpoint(path).manifest.tensors.items()
        }
        for path in (tmp_path / "ddp2", tmp_path / "fsdp2")
    ]
    assert shapes[0] == shapes[1]
    assert not [path for path in tmp_path.iterdir() if "." in path.name]


class Counter:
    """An object of a script, with everything that a state may hold."""

    def __init__(self) -> None:
        self.state: dict[Any, Any] = {"best": float("-inf"), "seen": [1, 2], 3: "three", "none": None}
        self.average = torch.zeros(3, dtype=torch.bfloat16)

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state, self.average = state["state"], state["average"]


def custom_objects(folder: str) -> tuple[dict[str, Any], list[float]]:
    run = Run(DDP)
    counter = Counter()
    run.accelerator.register_for_checkpointing(counter)
    counter.state["best"], counter.average = 0.25, torch.tensor([1.0, 2.0, 0.5], dtype=torch.bfloat16)
    run.train(1)
    random.seed(run.accelerator.process_index)
    np.random.seed(run.accelerator.process_index)
    run.accelerator.save_state(folder)
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    other = Run(DDP, seed=3)
    found = Counter()
    other.accelerator.register_for_checkpointing(found)
    random.seed(99)
    other.accelerator.load_state(folder)
    assert drawn == [random.random(), float(np.random.rand()), float(torch.rand(()))]
    assert found.average.dtype == torch.bfloat16
    return found.state, [*found.average.tolist(), *drawn]


def test_objects_of_the_script_and_random_generators_come_back(tmp_path: Path) -> None:
    results = run_on_ranks(2, custom_objects, str(tmp_path / "state"))
    for state, values in results:
        assert state == {"best": 0.25, "seen": [1, 2], 3: "three", "none": None}
        assert values[:3] == [1.0, 2.0, 0.5]
    assert results[0][1][3:5] != results[1][1][3:5]


class Unfit:
    def state_dict(self) -> dict[str, Any]:
        return {"inner": [0, {"lock": object()}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError


def refusals(folder: str) -> None:
    run = Run(DDP)
    with pytest.raises(CheckpointError, match=r"without a folder.*automatic_checkpoint_naming"):
        run.accelerator.save_state()
    for batch, _ in run.loader:
        run.accelerator.backward(token_losses(run.model(batch), batch).mean())
        with pytest.raises(SteppingError, match=r"after backward\(\) and before optimizer\.step"):
            run.accelerator.save_state(folder)
        run.optimizer.step()
        break
    run.accelerator.register_for_checkpointing(Unfit())
    with pytest.raises(Exception, match=r"custom_0/state\.inner\.1\.lock is a object|could not be written"):
        run.accelerator.save_state(folder)


def test_what_cannot_be_saved_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    run_on_ranks(2, refusals, str(tmp_path / "state"))
    assert list(tmp_path.iterdir()) == []


def numbered(folder: str) -> list[str]:
    config = ProjectConfiguration(project_dir=folder, automatic_checkpoint_naming=True, total_limit=2)
    run = Run(DDP, project_config=config)
    assert run.accelerator.load_state() is None
    names = []
    for _ in range(4):
        run.train(1)
        names.append(Path(run.accelerator.save_state()).name)
    again = Run(DDP, project_config=config)
    loaded = again.accelerator.load_state()
    assert loaded is not None
    names.append(Path(loaded).name)
    again.train(1)
    names.append(Path(again.accelerator.save_state()).name)
    for one in (run, again):
        one.accelerator.on_preemption(None)
    return names


def test_numbers_go_on_from_the_disk_and_old_checkpoints_go(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "best").mkdir(parents=True)
    names = run_on_ranks(2, numbered, str(tmp_path))[0]
    assert names == [f"checkpoint_{n}" for n in (0, 1, 2, 3, 3, 4)]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best", "checkpoint_3", "checkpoint_4"}


def in_the_background(layout: Layout, folder: str, device: str = "cpu") -> tuple[list[float], list[float]]:
    run = Run(layout, device=device)
    run.train(3)
    run.accelerator.save_state(folder, blocking=False)
    run.train(5)
    run.accelerator.wait_for_save()
    run.accelerator.free_memory()
    again = Run(layout, seed=8, device=device)
    again.accelerator.load_state(folder)
    again.train(5)
    return run.losses[3:], again.losses


@pytest.mark.parametrize("layout", [SINGLE, DDP, FSDP, *with_deepspeed([ZERO_2, ZERO_3])], ids=str)
def test_training_goes_on_while_a_state_is_written(layout: Layout, tmp_path: Path) -> None:
    for losses, again in run_on_ranks(layout.ranks, in_the_background, layout, str(tmp_path / "state")):
        assert again == losses


def checked_by_a_stranger(folder: Path) -> list[str]:
    """The files of a checkpoint, once each has the CRC-32 that its manifest says."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for name, record in files.items():
        data = (folder / name).read_bytes()
        assert (len(data), zlib.crc32(data)) == (record["size"], record["crc32"]), name
    assert {path.name for path in folder.iterdir()} == {*files, "manifest.json"}
    return sorted(files)


def node_local(layout: Layout, folder: str) -> tuple[Whole, Whole, list[float], list[float]]:
    run = Run(layout)
    own_folder = Path(folder) / f"disk{run.accelerator.process_index}" / "state"
    own_folder.parent.mkdir(parents=True)
    run.accelerator.wait_for_everyone()
    run.train(3)
    run.accelerator.save_state(own_folder)
    state = take_state(run.accelerator)
    run.train(3)
    again = Run(layout, seed=8)
    again.accelerator.load_state(own_folder)
    loaded = take_state(again.accelerator)
    again.train(3)
    return state, loaded, run.losses[3:], again.losses


@pytest.mark.parametrize("layout", [DDP, FSDP], ids=str)
def test_ranks_may_have_disks_of_their_own(layout: Layout, tmp_path: Path) -> None:
    for state, loaded, losses, again in run_on_ranks(2, node_local, layout, str(tmp_path)):
        assert_same_state(loaded, state)
        assert again == losses
    manifests = [json.loads((tmp_path / f"disk{n}" / "state" / "manifest.json").read_text()) for n in range(2)]
    assert [manifest["shared"] for manifest in manifests] == [False, False]
    assert manifests[0]["id"] == manifests[1]["id"]
    for n in range(2):
        # Also where pieces lie on another disk only.
        assert "model.safetensors" in checked_by_a_stranger(tmp_path / f"disk{n}" / "state")


def hooks_on_the_main_process(folder: str) -> list[int]:
    run = Run(DDP)
    accelerator = run.accelerator

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        if accelerator.is_main_process:
            (Path(output_dir) / "unet").mkdir()
            torch.save(accelerator.unwrap_model(models[0]).state_dict(), Path(output_dir) / "unet" / "weights.pt")
            weights.pop()

    def load(models: list[Any], input_dir: str) -> None:
        weights = torch.load(Path(input_dir) / "unet" / "weights.pt", weights_only=True)
        accelerator.unwrap_model(models.pop()).load_state_dict(weights)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    run.train(1)
    accelerator.save_state(folder)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.train(1)
    accelerator.load_state(folder)
    assert all(torch.equal(old, new) for old, new in zip(before, run.model.parameters(), strict=True))

    def fail(models: list[Any], weights: list[Any], output_dir: str) -> None:
        if accelerator.is_main_process:
            raise KeyError("unet")

    accelerator.register_save_state_pre_hook(fail)
    with pytest.raises(CheckpointError, match="rank 0: KeyError: 'unet'"):
        accelerator.save_state(folder)
    return [len([name for name in open_checkpoint(folder).manifest.tensors if name.startswith("model/")])]


def test_a_hook_may_work_on_the_main_process_only(tmp_path: Path) -> None:
    assert run_on_ranks(2, hooks_on_the_main_process, str(tmp_path / "state")) == [[0], [0]]
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def weights_that_rank_0_cannot_write(folder: str) -> str:
    accelerator = Accelerator(cpu=True, strategy="ddp")
    model = accelerator.prepare(torch.nn.Linear(2, 1))
    failing = mock.patch.object(checkpoint, "save_weights", side_effect=RuntimeError("no luck"))
    with failing, pytest.raises(PacelineError) as error:
        accelerator.save_model(model, folder)
    assert isinstance(error.value.__cause__, RuntimeError) == accelerator.is_main_process
    return str(error.value)


def test_whatever_stops_rank_0_from_writing_weights_is_raised_on_all_ranks(tmp_path: Path) -> None:
    for message in run_on_ranks(2, weights_that_rank_0_cannot_write, str(tmp_path / "weights")):
        assert message.endswith("weights. RuntimeError: no luck.")
