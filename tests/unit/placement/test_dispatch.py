"""Models spread by hand, and what happens to them afterwards; hooks."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paceline.errors import OffloadedModelError, PlacementError
from paceline.placement import (
    ModelHook,
    SequentialHook,
    WeightStream,
    add_hook_to_module,
    align_module_device,
    attach_layerwise_casting_hooks,
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    get_state_dict_offloaded_model,
    has_offloaded_params,
    init_empty_weights,
    init_on_device,
    remove_hook_from_module,
    remove_hook_from_submodules,
    set_module_tensor_to_device,
)
from tests.unit.placement.towers import ids, tower

CPU = torch.device("cpu")
MAP: dict[str, Any] = {"embedding": "cpu", "blocks.0": "cpu", "blocks.1": "disk", "blocks.2": "cpu", "head": "cpu"}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids())
    return found


@pytest.mark.parametrize("part", ["blocks.1", "blocks.1.inner", "blocks.1.norm", "embedding", "head"])
@pytest.mark.parametrize("tied", [True, False])
def test_any_part_may_be_on_disk(tmp_path: Path, part: str, tied: bool) -> None:
    model = tower(tied=tied)
    expected = logits(model)
    names = {name: "cpu" for name, _ in model.named_parameters(remove_duplicate=False)}
    names |= dict.fromkeys(model.state_dict(), "cpu")
    device_map: dict[str, Any] = {name: "disk" if f"{name}.".startswith(f"{part}.") else "cpu" for name in names}
    for stream in (None, WeightStream(devices=("cpu",))):
        spread = copy.deepcopy(model)
        dispatch_model(spread, device_map, offload_dir=tmp_path, stream=stream)
        assert torch.equal(logits(spread), expected)
        assert torch.equal(logits(spread), expected)


def test_a_module_that_uses_an_inner_weight_needs_all_at_once(tmp_path: Path) -> None:
    model = tower(blocks=3, reads_inner=True)
    expected = logits(model)
    dispatch_model(model, MAP, offload_dir=tmp_path, preload_module_classes=["Block"])
    assert torch.equal(logits(model), expected)


def test_moving_is_refused_and_a_copy_guards_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tower(blocks=3)
    expected = logits(model)
    dispatch_model(model, MAP, offload_dir=tmp_path)
    with pytest.raises(OffloadedModelError, match=r"Tower\.to\(\) was called"):
        model.to("cpu")
    assert "is moved" in caplog.text
    caplog.clear()
    twin = copy.deepcopy(model)
    remove_hook_from_submodules(model)
    # The twin's weights are still on disk.
    with pytest.raises(OffloadedModelError):
        twin.to("cpu")
    assert torch.equal(logits(twin), expected)
    caplog.clear()
    assert model.to("cpu") is model
    assert not caplog.records


def test_a_change_of_dtype_alone_does_not_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tower(blocks=3)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with caplog.at_level(logging.WARNING):
        model.to(torch.float64)
        assert not caplog.records
        model.to("cpu")
    assert len(caplog.records) == 1


def test_a_spread_model_can_be_pickled(tmp_path: Path) -> None:
    model = tower(blocks=3)
    expected = logits(model)
    dispatch_model(model, MAP, offload_dir=tmp_path, stream=WeightStream(devices=("cpu",)))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


def test_after_an_error_the_model_goes_on() -> None:
    class Failing(nn.Linear):
        fails = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.fails:
                raise ValueError("now")
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Failing(4, 4))
    x = torch.randn(2, 4)
    stream = WeightStream(devices=("cpu",))
    cpu_offload(model, CPU, stream=stream)
    for fails in (True, False, True, False):
        Failing.fails = fails
        if fails:
            with pytest.raises(ValueError, match="now"):
                model(x)
        else:
            assert model(x).shape == (2, 4)
    assert all(count == 0 for count in stream._in_use.values())


def test_a_folder_is_needed(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"puts blocks\.1 on disk"):
        dispatch_model(tower(blocks=3), MAP)
    with pytest.raises(PlacementError, match="no device for head"):
        dispatch_model(tower(blocks=3, tied=False), {"embedding": "cpu", "blocks": "cpu"})


def test_hooks_change_arguments_and_outputs() -> None:
    class Plus(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (args[0] + 1, *args[1:]), kwargs

    class Times(ModelHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return output * 10

    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    expected = layer(x + 1) * 10
    add_hook_to_module(layer, Plus())
    add_hook_to_module(layer, Times(), append=True)
    assert torch.equal(layer(x), expected)
    state: Any = layer
    assert isinstance(state._hf_hook, SequentialHook)
    assert list(inspect.signature(layer.forward).parameters) == ["input"]
    state._hf_hook.no_grad = True
    assert not layer(x).requires_grad
    add_hook_to_module(layer, Plus())  # replaces them
    assert torch.equal(layer(x), expected / 10)
    remove_hook_from_module(layer)
    assert "forward" not in vars(layer)
    assert not hasattr(layer, "_hf_hook")
    state.forward = lambda x: x
    add_hook_to_module(layer, Plus())
    remove_hook_from_module(layer)
    assert layer(x) is x  # what somebody had put there is back


def test_alignment_for_a_block() -> None:
    model = tower(blocks=2)
    cpu_offload(model, CPU)
    inner = model.get_submodule("blocks.0.inner")
    assert has_offloaded_params(inner)
    before: Any = inner.weight
    with align_module_device(inner, "cpu"):
        assert inner.weight.device == CPU
    assert inner.weight is before
    plain = nn.Linear(2, 2)
    with align_module_device(plain, "cpu"), align_module_device(plain):
        assert plain.weight.device == CPU


def test_whole_models_in_turn() -> None:
    first, hook = cpu_offload_with_hook(nn.Linear(2, 2), CPU)
    assert first(torch.ones(1, 2)).shape == (1, 2)
    hook.offload()
    hook.remove()
    assert not hasattr(first, "_hf_hook")


def test_building_on_a_device() -> None:
    with init_empty_weights():
        model = nn.BatchNorm1d(3)
    assert [model.weight.device.type, model.running_mean.device.type] == ["meta", "cpu"]  # type: ignore[union-attr]
    with init_empty_weights(include_buffers=True):
        model = nn.BatchNorm1d(3)
    assert model.running_mean.device.type == "meta"  # type: ignore[union-attr]
    with init_on_device(CPU):
        assert nn.Linear(2, 2).weight.device == CPU
    with pytest.raises(ZeroDivisionError), init_empty_weights():
        _ = 1 / 0
    assert nn.Linear(2, 2).weight.device == CPU


def test_one_tensor_to_a_device() -> None:
    layer = nn.Linear(2, 3)
    layer.weight.requires_grad_(False)
    set_module_tensor_to_device(layer, "weight", "meta")
    assert not layer.weight.requires_grad
    with pytest.raises(PlacementError, match="on the meta device"):
        set_module_tensor_to_device(layer, "weight", "cpu")
    with pytest.raises(PlacementError, match="no parameter or buffer of that name"):
        set_module_tensor_to_device(layer, "gone.weight", "cpu")
    with pytest.raises(PlacementError, match=r"The new values of weight have the shape \(1,\)"):
        set_module_tensor_to_device(layer, "weight", "cpu", value=torch.zeros(1))
    set_module_tensor_to_device(layer, "weight", "cpu", value=torch.ones(3, 2), dtype="float64")
    assert layer.weight.dtype == torch.float64


def test_layers_stored_in_a_small_dtype() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4)))
    attach_layerwise_casting_hooks(model, torch.float16, torch.float32, skip_modules_pattern="^2")
    assert [model[0].weight.dtype, model[1].weight.dtype] == [torch.float16, torch.float32]
    assert model.get_parameter("2.0.weight").dtype == torch.float32
    assert model(torch.randn(2, 4)).dtype == torch.float32
    assert model[0].weight.dtype == torch.float16


@pytest.mark.slow
def test_compiled_models_run_offloaded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = model(x)
        cpu_offload(model, CPU, stream=WeightStream(devices=("cpu",)))
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            assert torch.equal(compiled(x), expected)
        hook: Any = model[2]._hf_hook
        hook.weights_map = {"weight": torch.zeros(8, 8), "bias": torch.ones(8)}
        assert bool((compiled(x) == 1).all())
    torch.compiler.reset()


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_the_state_of_blocks_whose_weights_come_together(tmp_path: Path, way: str) -> None:
    model = tower(width=64, reads_inner=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if way == "cpu":
        cpu_offload(model, CPU, preload_module_classes=["Block"])
    else:
        disk_offload(model, tmp_path, CPU, preload_module_classes=["Block"])
    found = get_state_dict_offloaded_model(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
