"""Weights on disk: whole files, each value once, nothing left of an earlier save."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from paceline.checkpoint import parse_size, save_weights
from paceline.errors import PacelineError, UsageError
from tests.support.models import TinyTransformer

if TYPE_CHECKING:
    from pathlib import Path


def load(folder: Path) -> dict[str, Tensor]:
    """Read a folder as `from_pretrained` would: through the index if there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return dict(load_file(folder / "model.safetensors"))
    shards = json.loads(index.read_text())["weight_map"]
    return {name: load_file(folder / file)[name] for name, file in shards.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


STATE = {f"layer{n}.weight": torch.full((25,), float(n)) for n in range(5)}  # 100 bytes each


def test_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    state = STATE | {
        "half": torch.ones(3, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }
    assert save_weights(state, folder) == [folder / "model.safetensors"]
    assert names(folder) == ["model.safetensors"]
    assert same(load(folder), state)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("limit", "files"), [(500, 1), ("0.5KB", 1), (499, 2), (400, 2), (300, 2), (200, 3), (199, 5), (1, 5)]
)
def test_files_are_no_larger_than_the_limit(tmp_path: Path, limit: str | int, files: int) -> None:
    written = save_weights(STATE, tmp_path, max_shard_size=limit)
    assert len(written) == files
    assert same(load(tmp_path), STATE)
    most = parse_size(limit)
    for path in written:
        tensors = load_file(path)
        assert sum(t.nbytes for t in tensors.values()) <= most or len(tensors) == 1


def test_the_index_says_where_everything_is(tmp_path: Path) -> None:
    written = save_weights(STATE, tmp_path, max_shard_size=250)
    assert [path.name for path in written] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 500}
    assert index["weight_map"] == {f"layer{n}.weight": f"model-0000{n // 2 + 1}-of-00003.safetensors" for n in range(5)}


def test_another_save_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "optimizer.safetensors").write_text("not ours")
    for limit in (100, 250, 10**6, 100, 10**6):
        written = save_weights(STATE, tmp_path, max_shard_size=limit)
        index = ["model.safetensors.index.json"] if len(written) > 1 else []
        wanted = [*(path.name for path in written), *index, "config.json", "optimizer.safetensors"]
        assert names(tmp_path) == sorted(wanted)
        assert same(load(tmp_path), STATE)


def test_a_tied_weight_is_written_once(tmp_path: Path) -> None:
    model = TinyTransformer()
    save_weights(model.state_dict(), tmp_path)
    loaded = load(tmp_path)
    assert set(model.state_dict()) - set(loaded) == {"head.weight"}
    # What is missing is tied again when the model is built, so nothing is lost.
    other = TinyTransformer(seed=1)
    missing = other.load_state_dict(loaded, strict=False)
    assert missing.missing_keys == ["head.weight"]
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_views_of_one_memory_are_written_apart(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "whole": base,
        "row": base[1],
        "transposed": base.T,
        "part": base[:, ::2],
        "reshaped": base.reshape(-1),
    }
    save_weights(state, tmp_path)
    assert same(load(tmp_path), state)


def test_a_small_view_of_large_memory_takes_little_room(tmp_path: Path) -> None:
    large = torch.zeros(1_000_000)
    [file] = save_weights({"part": large[10:20]}, tmp_path)
    assert file.stat().st_size < 1000


def test_saving_does_not_change_what_is_saved(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    [file] = save_weights(dict(model.named_parameters()), tmp_path)
    nn.init.zeros_(model.weight)
    assert same(load_file(file), before)
    assert model.weight.requires_grad


def test_a_weight_without_values_is_named(tmp_path: Path) -> None:
    state = STATE | {"ghost": torch.empty(3, device="meta")}
    with pytest.raises(PacelineError, match="The weight ghost is on the meta device"):
        save_weights(state, tmp_path)
    assert names(tmp_path) == []


def test_too_little_space_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_weights({"old": torch.ones(1)}, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=499))
    with pytest.raises(PacelineError, match="nothing was written"):
        save_weights(STATE, tmp_path)
    assert same(load(tmp_path), {"old": torch.ones(1)})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=500))
    save_weights(STATE, tmp_path)
    assert same(load(tmp_path), STATE)


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written under the real name is whole: the writing itself happens under another one."""
    save_weights({"old": torch.ones(1)}, tmp_path)

    def half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("paceline.checkpoint.io.weights.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        save_weights(STATE, tmp_path)
    assert same(dict(load_file(tmp_path / "model.safetensors")), {"old": torch.ones(1)})


def test_nothing_at_all(tmp_path: Path) -> None:
    save_weights({}, tmp_path)
    assert load(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        ("1B", 1),
        ("5GB", 5 * 10**9),
        ("512 MiB", 512 * 2**20),
        (" 1.5kb ", 1500),
        ("2TIB", 2 * 2**40),
        ("10gb", 10**10),
        ("1e3MB", 10**9),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "wrong", [0, -1, "", "5", "GB", "5 G B", "-5GB", "0GB", "0.1B", "5XB", "5,5GB", "5G", "1.2.3GB", "1e999GB"]
)
def test_wrong_sizes(wrong: str | int) -> None:
    with pytest.raises(UsageError, match="max_shard_size") as error:
        parse_size(wrong)
    assert repr(wrong) in str(error.value)
    assert "'5GB'" in str(error.value)


def test_a_wrong_size_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        save_weights(STATE, tmp_path, max_shard_size="huge")
    assert names(tmp_path) == []
