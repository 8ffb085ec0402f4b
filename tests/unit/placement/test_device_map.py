"""Which module goes to which device, by memory."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from paceline.errors import PlacementError
from paceline.placement import (
    check_device_map,
    clean_device_map,
    compute_module_sizes,
    get_balanced_memory,
    get_max_memory,
    infer_auto_device_map,
    init_empty_weights,
)
from paceline.placement.device_map import check_tied_parameters_on_same_device
from paceline.placement.sizes import convert_file_size_to_int, dtype_byte_size
from tests.unit.placement.towers import Block, Tower, tower


def layers(*widths: int) -> nn.Sequential:
    """Linear layers without bias: `width * 10` numbers each."""
    return nn.Sequential(
        OrderedDict((f"layer{index}", nn.Linear(10, width, bias=False)) for index, width in enumerate(widths))
    )


def test_devices_are_filled_in_order_and_the_first_keeps_room_for_a_layer() -> None:
    model = layers(10, 10, 10, 10, 10)
    assert infer_auto_device_map(model, {0: 1200, 1: 800, "cpu": 10**6}) == {
        "layer0": 0,
        "layer1": 0,
        "layer2": 1,
        "layer3": 1,
        "layer4": "cpu",
    }


def test_a_model_on_the_meta_device_has_a_map() -> None:
    with init_empty_weights():
        model = layers(10, 10)
    assert infer_auto_device_map(model, {0: 10**6}) == {"": 0}


def test_a_dtype_makes_a_model_smaller() -> None:
    model = layers(10, 10, 10, 10)
    assert infer_auto_device_map(model, {0: 900, "cpu": 10**6}, dtype="float16") == {"": 0}
    special = {"layer3.weight": torch.float32}
    found = infer_auto_device_map(model, {0: 900, "cpu": 10**6}, dtype=torch.float16, special_dtypes=special)
    assert found["layer3"] == "cpu"


def test_blocks_that_stay_whole() -> None:
    model = tower(blocks=3, tied=False)
    size = int(compute_module_sizes(model)["blocks.0"])
    limits: dict[Any, Any] = {0: int(3.1 * size), "cpu": 10**6}
    split = infer_auto_device_map(model, limits)
    whole = infer_auto_device_map(model, limits, no_split_module_classes="Block")
    assert any(name.count(".") > 1 for name in split)
    assert not any(name.count(".") > 1 for name in whole)
    check_device_map(model, whole)


def test_tied_weights_go_to_one_device_and_count_once() -> None:
    model = tower(blocks=6)
    chosen = infer_auto_device_map(model, {0: 5000, "cpu": 10**6}, ["Block"], offload_buffers=True)
    assert chosen["embedding"] == chosen["head"] == 0
    assert "cpu" in chosen.values()


def test_a_tensor_of_the_model_itself_that_is_tied() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(10, 10))
            self.first = nn.Linear(10, 20, bias=False)
            self.second = nn.Linear(10, 10, bias=False)
            self.third = nn.Linear(10, 20, bias=False)
            self.second.weight = self.weight

    chosen = infer_auto_device_map(Owner(), {0: 1210, "cpu": 10**6})
    check_device_map(Owner(), chosen)
    assert chosen["weight"] == chosen["second"] == 0


def test_no_name_counts_as_inside_another_one_that_ends_alike() -> None:
    """`0.` is a part of `2.0.weight`, but the module 0 has nothing to do with it."""
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)))
    model[2][1].weight = model[1].weight  # type: ignore[index]
    assert infer_auto_device_map(model, {0: 960, "cpu": 10**6}) == {"0": 0, "1": "cpu", "2": "cpu"}


def test_a_later_module_fills_a_device_that_is_too_small_for_the_next_one(caplog: pytest.LogCaptureFixture) -> None:
    model = layers(100, 10, 20)
    with caplog.at_level(logging.INFO):
        assert infer_auto_device_map(model, {0: 4700, "cpu": 10**6}) == {"": "cpu"}
    assert "insufficient memory: 0 (needs 4800 bytes)" in caplog.text
    assert infer_auto_device_map(model, {0: 4700, "cpu": 10**6}, fallback_allocation=True) == {
        "layer1": 0,
        "layer0": "cpu",
        "layer2": "cpu",
    }


def test_all_tensors_of_a_module_that_is_split_have_a_device() -> None:
    model = tower(blocks=2, tied=False)
    size = int(compute_module_sizes(model)["blocks.0"])
    chosen = infer_auto_device_map(model, {0: int(1.9 * size), "cpu": 10**6}, offload_buffers=True)
    assert any(name.endswith(".shift") for name in chosen)
    check_device_map(model, chosen)


def test_buffers_that_fit_nowhere_are_a_warning() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    model[1].register_buffer("large", torch.zeros(1000))
    limits: dict[Any, Any] = {0: 4500, "cpu": 10**6}
    with pytest.warns(UserWarning, match="offload_buffers=True"):
        infer_auto_device_map(model, limits)
    infer_auto_device_map(model, limits, offload_buffers=True)


def test_balanced_memory() -> None:
    model = layers(*[10] * 8)  # 3200 bytes
    assert get_balanced_memory(model, {0: 10**6, 1: 10**6}) == {0: 1600 + 500, 1: 10**6}
    assert get_balanced_memory(model, {0: 10**6, 1: 10**6, 2: 10**6}, low_zero=True) == {
        0: 0,
        1: 1600 + 500,
        2: 10**6,
    }
    assert get_balanced_memory(model, {"cpu": 7}) == {"cpu": 7}


def test_limits_are_read_and_checked() -> None:
    assert list(get_max_memory({"disk": 1, "cpu": "2GB", 1: "1MiB", 0: 5})) == [0, 1, "cpu", "disk"]
    with pytest.raises(PlacementError, match="max_memory has 'gpu'"):
        get_max_memory({"gpu": 1})
    assert get_max_memory()["cpu"] > 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("5gib", 5 * 2**30),
        (" 5 KB ", 5000),
        ("5e3MB", 5 * 10**9),
        ("5_000MB", 5 * 10**9),
        ("2TIB", 2**41),
        ("2048", 2048),
        ("5Gb", 625 * 10**6),
        ("5gb", 625 * 10**6),
    ],
)
def test_sizes_in_text(text: str, size: int) -> None:
    assert convert_file_size_to_int(text) == size


@pytest.mark.parametrize("wrong", ["5 apples", "", "GB", "-5GB", "5G", "5Gi", "5B", "1.2.3GB", "1e999GB", "nan", "inf"])
def test_what_is_no_size(wrong: str) -> None:
    with pytest.raises(PlacementError, match=f"'{wrong}'"):
        convert_file_size_to_int(wrong)


def test_sizes_of_dtypes() -> None:
    sizes: dict[Any, float] = {
        torch.bool: 1 / 8,
        torch.float8_e4m3fn: 1,
        torch.bfloat16: 2,
        "float32": 4,
        "int4": 0.5,
        "fp8": 1,
    }
    assert {dtype: dtype_byte_size(dtype) for dtype in sizes} == sizes
    with pytest.raises(PlacementError, match="'float17'"):
        dtype_byte_size("float17")


def test_maps_are_shortened_and_checked() -> None:
    assert clean_device_map({"a.x": 0, "a.y": 0, "b": 1}) == {"a": 0, "b": 1}
    model = layers(10, 10)
    with pytest.raises(PlacementError, match=r"no device for layer1\.weight"):
        check_device_map(model, {"layer0": 0})
    with pytest.warns(UserWarning, match=r"do not match any submodules of the model: \['layer9'\]"):
        check_device_map(model, {"": 0, "layer9": 0})
    check_device_map(model, {"layer0.weight": 0, "layer1": "cpu"})


def test_tied_weights_on_two_devices_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check_tied_parameters_on_same_device([["a.weight", "b.weight"]], {"a": 0, "b": "cpu"})
    assert "Tied parameters are on different devices" in caplog.text


def test_untied_weights_that_the_configuration_ties_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = Tower(tied=False)
    model.config = type("Config", (), {"tie_word_embeddings": True})()
    infer_auto_device_map(model, {"cpu": 10**6})
    assert "has no tied weights" in caplog.text


def test_every_step_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    infer_auto_device_map(nn.Sequential(Block(8), Block(8)), {0: 1500, "cpu": 10**6}, verbose=True)
    printed = capsys.readouterr().out
    assert "goes to 0" in printed
    assert "is split" in printed
    assert "does not fit on 0" in printed
