"""Every format into every other, and back: the same bits under the same names."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paceline.checkpoint import open_checkpoint
from paceline.checkpoint.foreign import (
    LazyTensors,
    PortableOptimizer,
    PortableState,
    TensorSource,
    open_any,
    open_foreign,
)
from paceline.checkpoint.foreign.writers import WRITERS, total_bytes
from paceline.checkpoint.format.shards import Slot
from paceline.errors import CheckpointError
from tests.data.foreign.make import Net, groups_of
from tests.unit.checkpoint.test_foreign import DECAY, NO_DECAY, RECORDED, same

NAMES = [NO_DECAY + DECAY]
SOURCES = ["accelerate_ddp", "accelerate_fsdp", "deepspeed_2", "deepspeed_3", "dcp"]


def convert(state: PortableState, out: Path, to: str) -> PortableState:
    progress: list[int] = []
    WRITERS[to](state, out, progress.append)
    assert sum(progress) > 0
    return open_any(out, NAMES)


def assert_equal(one: PortableState, other: PortableState) -> None:
    aliases = set(one.ties) | set(other.ties)
    assert set(one.weights) - aliases <= set(other.weights)
    for name in set(one.weights) - aliases:
        assert same(one.weights[name], other.weights[name]), name
    (first,), (second,) = one.optimizers, other.optimizers
    assert first.slots.keys() == second.slots.keys()
    for name, tensors in first.slots.items():
        assert set(tensors) == set(second.slots[name])
        for slot in tensors:
            assert same(tensors[slot], second.slots[name][slot]), f"{name}: {slot}"
    for group, expected in zip(first.groups, second.groups, strict=True):
        assert group["params"] == expected["params"]
        assert (group["lr"], group["weight_decay"]) == (expected["lr"], expected["weight_decay"])
    assert one.step == other.step == 3


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("source", SOURCES)
def test_what_is_converted_holds_the_same_bits(source: str, to: str, tmp_path: Path) -> None:
    state = open_foreign(RECORDED / source, NAMES)
    found = convert(state, tmp_path / "out", to)
    assert_equal(state, found)
    assert len(found.schedulers) == len(state.schedulers)


@pytest.mark.parametrize("to", ["accelerate", "fsdp", "deepspeed"])
def test_our_own_goes_out_and_comes_back(to: str, tmp_path: Path) -> None:
    converted = convert(open_foreign(RECORDED / "accelerate_ddp", NAMES), tmp_path / "ours", "paceline")
    assert_equal(converted, convert(converted, tmp_path / to, to))
    again = convert(open_any(tmp_path / to, NAMES), tmp_path / "again", "paceline")
    assert_equal(converted, again)


def test_our_own_keeps_everything_else(tmp_path: Path) -> None:
    state = open_foreign(RECORDED / "accelerate_ddp", NAMES)
    found = convert(state, tmp_path / "ours", "paceline")
    open_checkpoint(tmp_path / "ours").verify()
    assert found.schedulers == state.schedulers
    assert sorted(found.generators) == [0, 1]
    assert torch.equal(found.generators[1]["torch"], state.generators[1]["torch"])
    assert found.custom[0]["seen"] == 12
    assert torch.equal(found.custom[0]["table"], state.custom[0]["table"])


def test_plain_torch_loads_what_is_written_for_it(tmp_path: Path) -> None:
    state = open_foreign(RECORDED / "deepspeed_3", NAMES)
    convert(state, tmp_path, "accelerate")
    optimizer = torch.optim.AdamW(groups_of(Net()))
    for mmap in (False, True):
        optimizer.load_state_dict(torch.load(tmp_path / "optimizer.bin", weights_only=True, mmap=mmap))
    first = optimizer.param_groups[0]["params"][1]
    assert torch.equal(optimizer.state[first]["exp_avg"], state.optimizers[0].slots["fixed.bias"]["exp_avg"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_loads_what_is_written_for_fsdp(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    state = open_foreign(RECORDED / "deepspeed_3", NAMES)
    convert(state, tmp_path, "fsdp")
    weights = {name: torch.full_like(value, 7.0) for name, value in Net().state_dict().items()}
    load({"model": weights}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0")
    for name, value in weights.items():
        assert same(value, state.weights[state.ties.get(name, name)]), name


@pytest.mark.parametrize("to", WRITERS)
def test_few_tensors_at_a_time_are_in_memory(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.checkpoint.foreign.writers._FILE_BYTES", 4 * 4000)
    alive: list[weakref.ref[np.ndarray[Any, Any]]] = []
    most = 0

    def read() -> Tensor:
        nonlocal most
        memory = np.zeros(1000, dtype=np.float32)  # whoever holds the tensor in any form holds this
        alive.append(weakref.ref(memory))
        most = max(most, sum(1 for ref in alive if ref() is not None))
        return torch.from_numpy(memory)

    source = TensorSource(Slot((1000,), torch.float32), read)
    names = [f"layer{index}.weight" for index in range(30)]
    state = PortableState(kind="made up", folder=tmp_path, weights=LazyTensors(dict.fromkeys(names, source)))
    slots = {name: LazyTensors({"exp_avg": source, "exp_avg_sq": source}) for name in names}
    state.optimizers = [PortableOptimizer(slots, {}, [{"lr": 0.1, "params": names}])]
    WRITERS[to](state, tmp_path / to, lambda _: None)
    assert len(alive) == 90
    assert most <= 8


def test_the_size_is_known_before(tmp_path: Path) -> None:
    state = open_foreign(RECORDED / "dcp")
    assert total_bytes(state) == sum(
        value.numel() * value.element_size()
        for tensors in (state.weights, *state.optimizers[0].slots.values())
        for value in tensors.values()
    )


def test_a_name_that_leads_outside_is_refused_for_deepspeed(tmp_path: Path) -> None:
    state = open_foreign(RECORDED / "dcp")
    state.weights.sources["../../elsewhere"] = state.weights.sources["gain"]
    with pytest.raises(CheckpointError, match="elsewhere"):
        WRITERS["deepspeed"](state, tmp_path / "out", lambda _: None)
    assert not any(tmp_path.iterdir())


def test_two_models_are_refused_for_deepspeed(tmp_path: Path) -> None:
    state = open_foreign(RECORDED / "dcp")
    state.weights.sources["model_1/weight"] = state.weights.sources["gain"]
    with pytest.raises(CheckpointError, match="2 models"):
        WRITERS["deepspeed"](state, tmp_path, lambda _: None)


@pytest.mark.parametrize("name", ["a/b", "..", ""])
def test_no_weight_is_written_outside_of_a_folder_of_its_own(tmp_path: Path, name: str) -> None:
    state = PortableState(kind="test", folder=tmp_path)
    state.weights = LazyTensors({name: TensorSource.of(torch.ones(2))})
    with pytest.raises(CheckpointError, match=f"A weight is named '{name}'"):
        WRITERS["deepspeed"](state, tmp_path / "out", lambda _: None)
    assert not (tmp_path / "out").exists()
