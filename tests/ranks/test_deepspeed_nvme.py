"""ZeRO-3 with parameters, or the state of the optimizer, on a disk: real files, and the training of a plain loop."""

from __future__ import annotations

import os
import warnings
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paceline import DummyOptim
from paceline.errors import PrepareError, StateError
from tests.support.engines import make, needs_deepspeed
from tests.support.ranks import run_on_ranks

pytestmark = needs_deepspeed

has_libaio = find_library("aio") is not None
# With libaio DeepSpeed compiles two operations, for minutes.
trains = pytest.mark.skipif(not has_libaio, reason="libaio is not installed")

# DeepSpeed leaves in memory what is smaller than 1 MiB on a rank.
WIDTH = 1024
OPTIONS: dict[str, Any] = {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.0}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))


def make_batch() -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))


def plain_losses(count: int, clip: float | None = None) -> list[float]:
    model, losses = make_model(), []
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    for _ in range(count):
        loss = model(make_batch()).square().mean()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def plugin_of(parts: list[str], folder: Path, *, described: bool, clip: float | None = None) -> dict[str, Any]:
    plugin: dict[str, Any] = {} if clip is None else {"gradient_clipping": clip}
    for part in parts:
        plugin |= {f"offload_{part}_device": "nvme", f"offload_{part}_nvme_path": str(folder)}
    if described:
        section = {"type": "AdamW", "params": OPTIONS}
        plugin["hf_ds_config"] = {"zero_optimization": {"stage": 3}, "optimizer": section}
    return plugin


class Run:
    """One training with something of it on the disk."""

    def __init__(
        self, parts: list[str], folder: Path, precision: str = "no", device: str = "cpu", clip: float | None = None
    ) -> None:
        # The optimizer's state goes to the disk under DeepSpeed's own optimizer only.
        described = "optimizer" in parts
        plugin = plugin_of(parts, folder, described=described, clip=clip)
        self.accelerator = make("zero3", deepspeed_plugin=plugin, mixed_precision=precision, cpu=device == "cpu")
        model: Any = make_model()
        optimizer: Any = (
            DummyOptim(model.parameters()) if described else torch.optim.AdamW(model.parameters(), **OPTIONS)
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            batch = make_batch().to(self.accelerator.device)
            mine = batch[self.accelerator.process_index :: self.accelerator.num_processes]
            loss = self.model(mine).square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(float(self.accelerator.reduce(loss.detach(), "mean")))
        return losses


def files_in(folder: Path) -> list[str]:
    return sorted(name for _, _, names in os.walk(folder) for name in names)


def parameters_on_disk(folder: str, device: str = "cpu") -> tuple[list[float], list[float], list[float], list[str]]:
    disk = Path(folder) / "disk"
    run = Run(["param"], disk, device=device)
    first, swapped = run.train(3), files_in(disk)
    run.accelerator.save_state(Path(folder) / "state")
    went_on = run.train(2)
    again = Run(["param"], disk, device=device)
    again.accelerator.load_state(Path(folder) / "state")
    return first, went_on, again.train(2), swapped


@trains
@pytest.mark.slow
def test_parameters_on_a_disk_train_and_resume(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    wanted = plain_losses(5)
    assert wanted[4] < 0.9 * wanted[0]
    for first, went_on, again, swapped in run_on_ranks(2, parameters_on_disk, str(tmp_path), timeout=900.0):
        assert [*first, *went_on] == pytest.approx(wanted, rel=1e-3)
        assert again == went_on
        assert len(swapped) >= 4, "nothing went to the disk"


def optimizer_on_disk(
    parts: list[str], precision: str, folder: str, device: str = "cpu"
) -> tuple[list[float], list[float], list[float], list[str], bool]:
    disk = Path(folder) / "disk"
    run = Run(parts, disk, precision, device)
    first, swapped = run.train(3), files_in(disk)
    run.accelerator.save_state(Path(folder) / "state")
    before = run.accelerator.get_state_dict(run.model)
    went_on = run.train(2)
    again = Run(parts, disk, precision, device)
    again.accelerator.load_state(Path(folder) / "state")
    loaded = again.accelerator.get_state_dict(again.model)
    same = all(torch.equal(value, loaded[name]) for name, value in before.items())
    resumed = again.train(2)
    again.accelerator.backward(again.model(make_batch().to(again.accelerator.device)).mean())
    with pytest.raises(StateError, match="Leave clipping to DeepSpeed"):
        again.accelerator.clip_grad_norm_(again.model.parameters(), 1.0)
    return first, went_on, resumed, swapped, same


@trains
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("parts", [["optimizer"], ["param", "optimizer"]], ids="+".join)
def test_an_optimizer_on_a_disk_trains_and_resumes(parts: list[str], precision: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    wanted = plain_losses(5)
    found = run_on_ranks(2, optimizer_on_disk, parts, precision, str(tmp_path), timeout=900.0)
    for first, went_on, again, swapped, same in found:
        assert [*first, *went_on] == pytest.approx(wanted, rel=1e-3 if precision == "no" else 5e-2)
        assert again == went_on
        assert same
        assert len(swapped) >= 4, "nothing went to the disk"


def clipped_on_disk(folder: str) -> list[float]:
    return Run(["optimizer"], Path(folder), clip=0.01).train(4)


@trains
@pytest.mark.slow
def test_an_optimizer_on_a_disk_is_clipped_by_the_configuration(tmp_path: Path) -> None:
    wanted = plain_losses(4, clip=0.01)
    assert wanted[3] != pytest.approx(plain_losses(4)[3], rel=1e-2), "clipping makes no difference here"
    for losses in run_on_ranks(2, clipped_on_disk, str(tmp_path), timeout=900.0):
        assert losses == pytest.approx(wanted, rel=1e-3)


def refusal(part: str, folder: str) -> str:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if AsyncIOBuilder().is_compatible(verbose=False):
            return ""
    accelerator = make("zero3", deepspeed_plugin=plugin_of([part], Path(folder), described=False))
    plugin = accelerator.strategy.context.config.deepspeed_config
    assert plugin is not None
    assert plugin.zero_section()[f"offload_{part}"] == {"device": "nvme", "nvme_path": folder}
    model: Any = make_model()
    with pytest.raises(PrepareError) as error:
        accelerator.prepare(model, torch.optim.AdamW(model.parameters(), **OPTIONS))
    return str(error.value)


@pytest.mark.skipif(has_libaio, reason="libaio is installed")
@pytest.mark.parametrize("part", ["param", "optimizer"])
def test_a_disk_without_libaio_says_what_is_missing(part: str, tmp_path: Path) -> None:
    for answer in run_on_ranks(2, refusal, part, str(tmp_path)):
        assert not answer or ("async_io" in answer and "libaio-dev" in answer), answer
