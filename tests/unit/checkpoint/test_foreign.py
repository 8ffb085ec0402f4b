"""Folders that Accelerate, DeepSpeed and torch wrote, recorded by tests/data/foreign/make.py."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from paceline.checkpoint.foreign import (
    LazyTensors,
    PortableState,
    TensorSource,
    deepspeed,
    detect_format,
    open_foreign,
)
from paceline.checkpoint.foreign.pickles import Inert, load_pickled
from paceline.checkpoint.format.shards import Slot
from paceline.errors import CheckpointError

RECORDED = Path(__file__).parents[2] / "data" / "foreign"
NO_DECAY = ["gain", "fixed.bias", "hidden.bias", "norm.weight", "norm.bias", "back.bias"]
DECAY = ["tokens.weight", "hidden.weight", "back.weight"]
FOLDERS = {
    "accelerate": "accelerate",
    "accelerate_ddp": "accelerate",
    "accelerate_fsdp": "accelerate",
    "accelerate_fsdp_full": "accelerate",
    "dcp": "dcp",
    "deepspeed_0": "deepspeed",
    "deepspeed_1": "deepspeed",
    "deepspeed_1_bf16": "deepspeed",
    "deepspeed_2": "deepspeed",
    "deepspeed_3": "deepspeed",
    "universal": "deepspeed",
}


def read(name: str) -> PortableState:
    return open_foreign(RECORDED / name, [NO_DECAY + DECAY])


def expected(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and optimizer states by `NAME/SLOT`, as the writer saved them."""
    saved = load_file(RECORDED / name / "expected.safetensors")
    families: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for full, value in saved.items():
        family, _, rest = full.partition("/")
        families[family][rest] = value
    return families["model"], families["optimizer"]


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


@pytest.mark.parametrize(("name", "kind"), FOLDERS.items())
def test_formats_are_recognised(name: str, kind: str) -> None:
    assert detect_format(RECORDED / name) == kind


@pytest.mark.parametrize("name", FOLDERS)
def test_weights_are_read_whole_and_bit_equal(name: str) -> None:
    state = read(name)
    wanted, _ = expected(name)
    for key, value in wanted.items():
        if key == "head.weight" and name in ("accelerate", "accelerate_ddp"):
            continue  # tied to tokens.weight, and written once
        assert same(state.weights[state.ties.get(key, key)], value), key


def test_a_frozen_parameter_that_a_rank_has_no_piece_of_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_frozen(path: Path) -> Any:
        saved = load_pickled(path)
        if path.name.startswith("zero_pp_rank_1_") and "frozen_param_fragments" in saved:
            assert saved["frozen_param_fragments"]
            saved["frozen_param_fragments"] = {}
        return saved

    monkeypatch.setattr(deepspeed, "load_pickled", without_frozen)
    with pytest.raises(CheckpointError, match=r"not hold all of fixed\.weight\. 18 of 36 elements are missing"):
        read("deepspeed_3")


@pytest.mark.parametrize("name", FOLDERS)
def test_moments_are_bit_equal_under_the_parameters_names(name: str) -> None:
    state = read(name)
    _, wanted = expected(name)
    (optimizer,) = state.optimizers
    assert set(optimizer.slots) == {*NO_DECAY, *DECAY}
    for full, value in wanted.items():
        owner, _, slot = full.rpartition("/")
        assert same(optimizer.slots[owner][slot], value), full
        assert optimizer.slots[owner].slot(slot).shape == tuple(value.shape)


@pytest.mark.parametrize("name", FOLDERS)
def test_steps_and_groups_are_known(name: str) -> None:
    state = read(name)
    (optimizer,) = state.optimizers
    assert state.step == optimizer.steps == 3
    assert [sorted(group["params"]) for group in optimizer.groups] == [sorted(NO_DECAY), sorted(DECAY)]
    assert [group["weight_decay"] for group in optimizer.groups] == [0.0, 0.1]
    assert {tensors["step"].shape for tensors in optimizer.slots.values()} == {torch.Size([])}
    scheduled = 6 if name == "accelerate_ddp" else 3  # Accelerate steps it once for each process
    assert optimizer.groups[0]["lr"] == pytest.approx(1e-2 / (1 + scheduled))


def test_accelerate_brings_scheduler_generators_and_custom_objects() -> None:
    state = read("accelerate_ddp")
    assert state.schedulers[0]["last_epoch"] == 6
    assert sorted(state.generators) == [0, 1]
    torch.manual_seed(41)
    assert torch.equal(state.generators[1]["torch"], torch.get_rng_state())
    np.random.seed(7)
    saved: Any = np.random.get_state()
    assert np.array_equal(np.asarray(state.generators[1]["numpy"][1]), saved[1])
    assert state.custom[0]["seen"] == 12
    assert state.custom[0]["table"].tolist() == [0, 1, 2]


def test_checkpoints_of_the_trainer_are_read_too(tmp_path: Path) -> None:
    """The same things under other names; under DeepSpeed its folder lies beside them."""
    for name, other in (("optimizer.bin", "optimizer.pt"), ("scheduler.bin", "scheduler.pt")):
        shutil.copy(RECORDED / "accelerate" / name, tmp_path / other)
    shutil.copy(RECORDED / "accelerate" / "model.safetensors", tmp_path)
    drawn = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(drawn, tmp_path / "rng_state.pth")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3, "epoch": 1.5, "best_metric": null}')
    state = open_foreign(tmp_path, [NO_DECAY + DECAY])
    assert (state.kind, state.step, state.epoch) == ("accelerate", 3, 1)
    assert len(state.weights) == 11
    assert state.optimizers[0].steps == 3
    assert state.schedulers[0]["last_epoch"] == 3
    assert torch.equal(state.generators[0]["torch"], torch.get_rng_state())
    for name in ("optimizer.pt", "model.safetensors"):
        (tmp_path / name).unlink()
    shutil.copytree(RECORDED / "deepspeed_3", tmp_path, dirs_exist_ok=True)
    state = open_foreign(tmp_path)
    assert len(state.optimizers[0].slots) == 9
    assert len(state.schedulers) == len(state.generators) == 1


def test_a_numbered_optimizer_without_names_is_skipped() -> None:
    state = open_foreign(RECORDED / "accelerate")
    assert not state.optimizers
    assert any("optimizer.bin" in note and "names" in note for note in state.notes)


def test_a_wrong_number_of_names_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"9 parameters in groups of \[6, 3\]"):
        open_foreign(RECORDED / "accelerate", [DECAY])


def test_wrong_order_of_names_would_be_seen() -> None:
    """The comparison above can fail: the same file under the model's order gives other moments."""
    state = open_foreign(RECORDED / "accelerate", [DECAY + NO_DECAY])
    _, wanted = expected("accelerate")
    assert not same(state.optimizers[0].slots["gain"]["exp_avg"], wanted["gain/exp_avg"])


def test_client_state_of_deepspeed_is_named_as_left() -> None:
    assert any("seen" in note for note in read("deepspeed_2").notes)


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    assert detect_format(tmp_path) is None
    with pytest.raises(CheckpointError, match="not a checkpoint of a known format"):
        open_foreign(tmp_path)


# Files that would run something


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"state": Hostile(marker)}, tmp_path / "optimizer.bin")
    with pytest.raises(CheckpointError, match=r"names (posix|nt).system"):
        open_foreign(tmp_path)
    assert not marker.exists()


def test_hostile_metadata_of_dcp_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(CheckpointError, match=r"names (posix|nt).system"):
        open_foreign(tmp_path)
    assert not marker.exists()


def test_metadata_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    shutil.copytree(RECORDED / "dcp", tmp_path / "dcp")
    path = tmp_path / "dcp" / ".metadata"
    # Two names of the same length, so that the pickle stays whole.
    path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"../../out.pt"))
    with pytest.raises(CheckpointError, match="beside it"):
        open_foreign(tmp_path / "dcp")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_value_inside_dcp_that_would_run_something_is_refused(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    marker = tmp_path / "ran"
    save({"step": Hostile(marker)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(CheckpointError, match=r"names (posix|nt).system"):
        open_foreign(tmp_path / "dcp")
    assert not marker.exists()


def test_old_and_damaged_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.bin"
    path.write_bytes(pickle.dumps({"state": Hostile(tmp_path / "ran")}))
    with pytest.raises(CheckpointError, match="older or damaged"):
        open_foreign(tmp_path)
    torch.save({"state": torch.zeros(3)}, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError):
        open_foreign(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_script_module_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "optimizer.bin")
    with zipfile.ZipFile(tmp_path / "optimizer.bin", "a") as file:
        file.writestr("optimizer/constants.pkl", b"")
    with pytest.raises(CheckpointError):
        open_foreign(tmp_path)


def test_objects_of_the_writers_become_inert_records() -> None:
    (path,) = RECORDED.glob("deepspeed_2/global_step3/zero_pp_rank_0*")
    saved = load_pickled(path)
    assert isinstance(saved["optimizer_state_dict"]["zero_stage"], Inert)
    assert saved["optimizer_state_dict"]["zero_stage"].args == (2,)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    shutil.copytree(RECORDED / "deepspeed_2", tmp_path / "run")
    next(tmp_path.glob("run/global_step3/zero_pp_rank_1*")).unlink()
    with pytest.raises(CheckpointError, match="1 of 2 ranks"):
        open_foreign(tmp_path / "run")


def test_our_own_without_its_manifest_is_broken_not_foreign(tmp_path: Path) -> None:
    for name in ("model.safetensors", "training.json"):
        (tmp_path / name).touch()
    assert detect_format(tmp_path) is None


def test_looking_at_names_and_shapes_reads_nothing() -> None:
    def read() -> Tensor:
        raise AssertionError("read")

    tensors = LazyTensors({"weight": TensorSource(Slot((3,), torch.float32), read)})
    assert "weight" in tensors
    assert "bias" not in tensors
    assert list(tensors) == ["weight"]
    assert tensors.slot("weight").shape == (3,)
