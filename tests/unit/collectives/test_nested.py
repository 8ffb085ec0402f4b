from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from paceline.collectives import (
    concatenate,
    find_batch_size,
    leaves,
    map_tensors,
    send_to_device,
    slice_tensors,
)
from paceline.errors import CollectiveError

ONE = torch.ones(1)


class Pair(NamedTuple):
    a: Any
    b: Any


class Counted(list[Any]):
    """A list whose constructor asks for something else."""

    def __init__(self, count: int) -> None:
        super().__init__([ONE] * count)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    name: str


class ModelOutput(OrderedDict[str, Any]):
    """Like the outputs of model libraries: attributes and items in one, no `update`, no `__delitem__`."""

    def __init__(self, *, logits: Any, loss: Any = None) -> None:
        super().__init__()
        self["logits"] = logits
        if loss is not None:
            self["loss"] = loss

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("a model output cannot be updated")


class Encoding(UserDict[str, Any]):
    """Like a tokenizer's batch: a `UserDict` with `to`, and an attribute beside its items."""

    encodings = "none"

    def to(self, device: str) -> Encoding:
        self.moved = device
        return self


class ReadOnly(Mapping[str, Any]):
    def __init__(self, items: dict[str, Any]) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def double(data: Any) -> Any:
    return map_tensors(lambda tensor: tensor * 2, data)


@pytest.mark.parametrize(
    "data",
    [
        [ONE], (ONE,), Pair(ONE, "b"), {"k": ONE}, OrderedDict(k=ONE), UserDict({"k": ONE}),
        ReadOnly({"k": ONE}), MappingProxyType({"k": ONE}), Frozen(ONE, "n"), Counted(1),
        ModelOutput(logits=ONE), defaultdict[str, Any](int, {"k": ONE}),
        torch.nn.utils.rnn.PackedSequence(ONE, torch.ones(1, dtype=torch.int64)),
    ],
    ids=lambda data: type(data).__name__,
)  # fmt: skip
def test_types_are_kept(data: Any) -> None:
    result = double(data)
    assert type(result) is type(data)
    assert result is not data
    assert next(iter(leaves(result)))[1].item() == 2
    assert next(iter(leaves(data)))[1] is ONE, "the original changed"


def test_what_a_container_knows_besides_its_items() -> None:
    encoding = Encoding({"ids": ONE})
    encoding.encodings = "kept"
    assert double(encoding).encodings == "kept"
    assert double(defaultdict(list, {"k": [ONE]}))["new"] == []
    output = double(ModelOutput(logits=ONE, loss=ONE))
    assert output.logits.item() == output["logits"].item() == 2


def test_leaves_have_paths() -> None:
    data = {"a": [1, Pair(2, 3)], "d": Frozen(ONE, "n")}
    found = [("a", 0), ("a", 1, "a"), ("a", 1, "b"), ("d", "x"), ("d", "name")]
    assert [path for path, _ in leaves(data)] == found


def test_send_to_device() -> None:
    data: dict[str, Any] = {"x": [ONE, "text"], "y": Pair(ONE, 1), "keep": ONE, "deep": [{"keep": ONE}]}
    moved = send_to_device(data, "meta", skip_keys="keep")
    assert moved["x"][0].is_meta
    assert moved["y"].a.is_meta
    assert (moved["x"][1], moved["y"].b) == ("text", 1)
    assert moved["keep"] is ONE
    assert moved["deep"][0]["keep"] is ONE
    assert data["x"][0] is ONE
    assert send_to_device(data, "meta", non_blocking=True)["keep"].is_meta


def test_send_to_device_asks_objects_with_to() -> None:
    encoding = Encoding({"ids": ONE, "keep": ONE})
    assert send_to_device([encoding], "meta")[0].moved == "meta"
    skipping = send_to_device(encoding, "meta", skip_keys=["keep"])
    assert skipping["ids"].is_meta
    assert skipping["keep"] is ONE
    assert send_to_device(torch.nn.Linear, "meta") is torch.nn.Linear

    class Broken:
        def to(self, device: str, non_blocking: bool = False) -> None:
            raise TypeError("broken for its own reasons")

    with pytest.raises(TypeError, match="own reasons"):
        send_to_device(Broken(), "meta")


def test_find_batch_size() -> None:
    assert find_batch_size({"loss": torch.tensor(1.0), "x": ["a", torch.ones(4, 2)]}) == 4
    with pytest.raises(CollectiveError, match="dict without any tensor"):
        find_batch_size({"loss": torch.tensor(1.0)})


def test_slice_and_concatenate() -> None:
    data: dict[str, Any] = {"x": torch.arange(6).view(3, 2), "y": [torch.tensor(1), "s"]}
    head, rest = slice_tensors(data, slice(0, 1)), slice_tensors(data, slice(1, None))
    joined = concatenate([head, rest])
    assert joined["x"].tolist() == data["x"].tolist()
    assert joined["y"][0].tolist() == [1, 1]
    assert joined["y"][1] == "s"
    assert type(concatenate([Pair(ONE, ONE)] * 2)) is Pair
    with pytest.raises(CollectiveError, match="Batch 1"):
        concatenate([{"a": ONE}, {"b": ONE}])
    with pytest.raises(CollectiveError, match="empty list"):
        concatenate([])
