"""Weights in files: the layout of offload folders, safetensors by position, checkpoints into models."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from paceline.errors import PlacementError
from paceline.placement import (
    OffloadedWeightsLoader,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
    offload_state_dict,
)
from paceline.placement.loading import checkpoint_files, load_offloaded_weights, load_state_dict
from paceline.placement.offload_folder import load_offloaded_weight, offload_weight, save_offload_index
from paceline.placement.weight_file import SafetensorsFile
from tests.unit.placement.towers import Tower, ids, tower

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids())
    return found


def test_the_layout_of_a_folder(tmp_path: Path) -> None:
    """What Accelerate writes: raw bytes, names and shapes. A folder of either can be read by the other."""
    weights = {"a.weight": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(3, dtype=torch.int64)}
    offload_state_dict(tmp_path, {**weights, "c": torch.tensor([1.0]).bfloat16()})
    assert json.loads((tmp_path / "index.json").read_text()) == {
        "a.weight": {"dtype": "float32", "shape": [1, 2]},
        "b": {"dtype": "int64", "shape": []},
        "c": {"dtype": "bfloat16", "shape": [1]},
    }
    assert (tmp_path / "a.weight.dat").read_bytes() == b"\x00\x00\x80\x3f\x00\x00\x00\x40"
    assert (tmp_path / "b.dat").read_bytes() == b"\x03" + b"\x00" * 7
    assert (tmp_path / "c.dat").read_bytes() == b"\x80\x3f"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_weights_come_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = (torch.rand(shape) * 100).to(dtype)
    index = offload_weight(weight, "w", tmp_path, {})
    assert index is not None
    again = load_offloaded_weight(tmp_path / "w.dat", index["w"])
    assert again.dtype == dtype
    assert again.shape == weight.shape
    assert again.reshape(-1).view(torch.uint8).tolist() == weight.reshape(-1).view(torch.uint8).tolist()
    save_file({"w": weight}, tmp_path / "w.safetensors")
    found = SafetensorsFile(tmp_path / "w.safetensors").slices()["w"].tensor()
    assert found.dtype == dtype
    assert found.reshape(-1).view(torch.uint8).tolist() == weight.reshape(-1).view(torch.uint8).tolist()


def test_writing_to_a_weight_does_not_reach_its_file(tmp_path: Path) -> None:
    offload_state_dict(tmp_path, {"w": torch.ones(3)})
    loader = OffloadedWeightsLoader(save_folder=tmp_path)
    loader["w"].zero_()
    assert loader["w"].tolist() == [1, 1, 1]


def test_entries_are_added_to_an_index(tmp_path: Path) -> None:
    save_offload_index({}, tmp_path)
    assert not list(tmp_path.iterdir())
    for name in ("a", "b"):
        save_offload_index(offload_weight(torch.ones(1), name, tmp_path, {}), tmp_path)
    assert sorted(OffloadedWeightsLoader(save_folder=tmp_path)) == ["a", "b"]
    model = nn.ParameterDict({"a": torch.zeros(1), "b": torch.zeros(1)})
    load_offloaded_weights(model, json.loads((tmp_path / "index.json").read_text()), tmp_path)
    assert model["a"].item() == model["b"].item() == 1


def test_memory_wins_over_disk_and_links_lead_to_safetensors(tmp_path: Path) -> None:
    save_file({"stored": torch.arange(4.0), "other": torch.ones(1)}, tmp_path / "w.safetensors")
    index = {
        "a": {"safetensors_file": str(tmp_path / "w.safetensors"), "weight_name": "stored", "dtype": "float16"},
        "b": {"safetensors_file": str(tmp_path / "w.safetensors"), "weight_name": "gone"},
    }
    loader = OffloadedWeightsLoader(state_dict={"c": torch.zeros(1)}, index=index)
    assert len(loader) == 3
    assert loader["a"].tolist() == [0, 1, 2, 3]
    assert loader["a"].dtype == torch.float16
    with pytest.raises(PlacementError, match="has no tensor 'gone'"):
        loader["b"]
    with pytest.raises(PlacementError, match="got no weights"):
        OffloadedWeightsLoader()
    with pytest.raises(PlacementError, match=r"has no index\.json"):
        OffloadedWeightsLoader(save_folder=tmp_path)


def test_a_safetensors_file_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(3)}, path)
    file = SafetensorsFile(path)
    assert file.slices()["w"].tensor().tolist() == [1, 1, 1]
    content = tmp_path / "new.safetensors"
    save_file({"another": torch.zeros(50), "w": torch.full((3,), 2.0)}, content)
    path.write_bytes(content.read_bytes())  # in place: the same file
    assert file.slices()["w"].tensor().tolist() == [2, 2, 2]
    path.unlink()
    assert file.slices()["w"].tensor().tolist() == [2, 2, 2]


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, (5).to_bytes(8, "little") + b"{no!}", b"\x02" + b"\x00" * 7])
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(PlacementError):
        SafetensorsFile(tmp_path / "w.safetensors").slices()


def saved(folder: Path, kind: str, model: nn.Module) -> Path:
    """Save a model in one of four ways; return what to load."""
    folder.mkdir()
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"
    names = list(state)
    parts = {"one": names[::2], "two": names[1::2]}
    index = {name: f"{part}.{kind.partition(' ')[0]}" for part, each in parts.items() for name in each}
    for part, each in parts.items():
        content = {name: state[name] for name in each}
        if kind == "bin shards":
            torch.save(content, folder / f"{part}.bin")
        else:
            save_file(content, folder / f"{part}.safetensors")
    (folder / "some.index.json").write_text(json.dumps({"weight_map": index} if kind == "bin shards" else index))
    return folder if kind == "bin shards" else folder / "some.index.json"


KINDS = ["bin", "safetensors", "bin shards", "safetensors shards"]
MAPS: list[Any] = [
    {"": "cpu"},
    {"": "disk"},
    {"embedding": "cpu", "blocks": "disk", "head": "cpu"},
    {"embedding": "disk", "blocks.0": "cpu", "blocks.1": "disk", "blocks.2": "cpu", "blocks.3": "cpu", "head": "disk"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("buffers", [True, False])
def test_checkpoints_with_device_maps(tmp_path: Path, kind: str, buffers: bool) -> None:
    model = tower(tied=False)
    expected = logits(model)
    checkpoint = saved(tmp_path / "saved", kind, model)
    for number, device_map in enumerate(MAPS):
        with init_empty_weights():
            empty = Tower(tied=False).eval()
        folder = tmp_path / f"offload{number}"
        loaded = load_checkpoint_and_dispatch(
            empty, checkpoint, device_map, offload_folder=folder, offload_buffers=buffers, strict=True
        )
        assert torch.equal(logits(loaded), expected)
        assert torch.equal(logits(loaded), expected)
        # What is in safetensors files is not written again.
        assert bool(list(folder.glob("*.dat"))) == ("bin" in kind and "disk" in device_map.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_a_map_goes_where_the_model_is(tmp_path: Path, kind: str) -> None:
    model = tower(tied=True)
    other = tower(seed=1, tied=True)
    load_checkpoint_in_model(other, saved(tmp_path / "saved", kind, model))
    assert torch.equal(logits(other), logits(model))
    assert other.head.weight is other.embedding.weight


def test_a_checkpoint_that_was_deleted_serves_the_model_that_was_loaded(tmp_path: Path) -> None:
    model = tower(tied=False)
    checkpoint = saved(tmp_path / "saved", "safetensors", model)
    with init_empty_weights():
        empty = Tower(tied=False).eval()
    loaded = load_checkpoint_and_dispatch(empty, checkpoint, {"": "cpu"})
    shutil.rmtree(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))


def test_dtypes(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "saved", "safetensors", tower(tied=False))
    with init_empty_weights():
        model = Tower(tied=False)
    device_map = {"embedding": "cpu", "blocks": "disk", "head": "cpu"}
    load_checkpoint_in_model(
        model, checkpoint, device_map, tmp_path / "offload", "float16", keep_in_fp32_modules=["head", "inner"]
    )
    assert model.embedding.weight.dtype == torch.float16
    assert model.head.weight.dtype == torch.float32
    state = model.state_dict()
    assert state["blocks.0.inner.weight"].dtype == torch.float32
    assert state["blocks.0.outer.weight"].dtype == torch.float16
    assert state["blocks.0.norm.num_batches_tracked"].dtype == torch.int64
    index = json.loads((tmp_path / "offload" / "index.json").read_text())
    assert index["blocks.0.outer.weight"]["dtype"] == "float16"
    loader = OffloadedWeightsLoader(save_folder=tmp_path / "offload")
    assert loader["blocks.0.outer.weight"].dtype == torch.float16


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_names_that_do_not_fit(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tower(tied=False)
    state = dict(model.state_dict())
    del state["head.weight"]
    state["surplus"] = torch.ones(1)
    path = tmp_path / f"w.{kind}"
    if kind == "bin":
        torch.save(state, path)
    else:
        save_file(state, path)
    with caplog.at_level(logging.WARNING):
        load_checkpoint_in_model(Tower(tied=False), path, {"": "cpu"})
    assert "surplus of the checkpoint" in caplog.text
    assert "has no head.weight" in caplog.text
    with pytest.raises(PlacementError, match=r"head\.weight"):
        load_checkpoint_in_model(Tower(tied=False), path, {"": "cpu"}, strict=True)
    del state["surplus"]
    # A tied weight that is there under its other name is not missing.
    torch.save(state, tmp_path / "tied.bin")
    load_checkpoint_in_model(Tower(tied=True), tmp_path / "tied.bin", {"": "cpu"}, strict=True)


def test_8_bit_weights_are_refused_with_another_way(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="from_pretrained and its BitsAndBytesConfig"):
        load_checkpoint_in_model(Tower(), tmp_path, {"": "cpu"}, offload_8bit_bnb=True)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="does not exist"):
        checkpoint_files(tmp_path / "nothing")
    with pytest.raises(PlacementError, match=r"of indices .*: none"):
        checkpoint_files(tmp_path)
    for name in ("a.index.json", "b.index.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(PlacementError, match=r"a\.index\.json, b\.index\.json"):
        checkpoint_files(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors", metadata={"format": "tf"})
    with pytest.raises(PlacementError, match="framework 'tf'"):
        load_state_dict(tmp_path / "w.safetensors")
    with pytest.raises(PlacementError, match="no folder for them"):
        load_checkpoint_in_model(tower(), tmp_path / "w.safetensors", {"": "disk"})
    save_file({"head.weight": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(PlacementError, match=r"head\.weight have the shape \(1,\); it has \(16, 8\)"):
        load_checkpoint_in_model(tower(), tmp_path / "w.safetensors", {"": "cpu"})


def test_a_way_to_choose_devices_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="'fair'"):
        load_checkpoint_and_dispatch(tower(), tmp_path, "fair")


@pytest.mark.parametrize("way", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_ways_to_choose_devices(tmp_path: Path, way: str) -> None:
    model = tower(tied=False)
    checkpoint = saved(tmp_path / "saved", "safetensors", model)
    with init_empty_weights():
        empty = Tower(tied=False).eval()
    limits: dict[int | str, float | str] = {"cpu": 4000}
    loaded: Any = load_checkpoint_and_dispatch(empty, checkpoint, way, limits, offload_folder=tmp_path / "offload")
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(logits(loaded), logits(model))
