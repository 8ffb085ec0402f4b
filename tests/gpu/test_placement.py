"""Big models on a GPU: offloaded to host memory and disk, ahead of need, with the numbers of the whole model."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from paceline.errors import OffloadedModelError
from paceline.placement import (
    WeightStream,
    attach_layerwise_casting_hooks,
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    get_state_dict_offloaded_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    remove_hook_from_submodules,
)
from tests.unit.placement.towers import Tower, ids, tower

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
MIB = 2**20


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids().to(GPU)).cpu()
    return found


def expected_logits(**settings: Any) -> torch.Tensor:
    return logits(tower(**settings).to(GPU))


MAPS: list[dict[str, Any]] = [
    {"embedding": 0, "blocks.0": "cpu", "blocks.1": "disk", "blocks.2": 0, "blocks.3": "cpu", "head": 0},
    {"embedding": "cpu", "blocks": "disk", "head": "cpu"},
    {"embedding": "cpu", "blocks": 0, "head": "disk"},
    {"embedding": "cuda:0", "blocks": "cpu", "head": torch.device("cuda:0")},
    {"": 0},
]


@pytest.mark.parametrize("number", range(len(MAPS)))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("buffers", [True, False])
def test_a_spread_model_gives_the_same_numbers(tmp_path: Path, number: int, tied: bool, buffers: bool) -> None:
    expected = expected_logits(width=64, tied=tied)
    model = tower(width=64, tied=tied)
    dispatch_model(model, MAPS[number], offload_dir=tmp_path, offload_buffers=buffers, main_device=0, force_hooks=True)
    for _ in range(4):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("way", ["cpu", "disk"])
@pytest.mark.parametrize("preload", [None, ["Block"]])
def test_everything_offloaded(tmp_path: Path, way: str, preload: list[str] | None) -> None:
    expected = expected_logits(width=64, reads_inner=preload is not None)
    model = tower(width=64, reads_inner=preload is not None)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if way == "cpu":
        cpu_offload(model, GPU, preload_module_classes=preload)
    else:
        disk_offload(model, tmp_path, GPU, preload_module_classes=preload)
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    saved = get_state_dict_offloaded_model(model)
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
    assert torch.equal(logits(model), expected)
    remove_hook_from_submodules(model)
    assert all(torch.equal(tensor.cpu(), state[name]) for name, tensor in model.state_dict().items())


def wide(layers: int = 12, width: int = 2048) -> nn.Module:
    """Layers of 16 MiB each."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_ahead_of_need_nothing_is_overwritten(tmp_path: Path, way: str) -> None:
    """Long computations between the copies, and the other way: a copy never lands where somebody still computes."""
    model = wide()
    x = torch.randn(4096, 2048, device=GPU)
    with torch.no_grad():
        expected = copy.deepcopy(model).to(GPU)(x)
        few = copy.deepcopy(model).to(GPU)(x[:1])
    stream = WeightStream(limit=3 * 17 * MIB)
    if way == "cpu":
        cpu_offload(model, GPU, stream=stream)
    else:
        disk_offload(model, tmp_path, GPU, stream=stream)
    with torch.no_grad():
        for turn in range(12):
            if turn % 3 == 0:
                torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
            assert torch.equal(model(x), expected)
            assert torch.equal(model(x[:1]), few)
    assert stream.foreseen > 10 * stream.unforeseen


def test_the_limit_of_memory_is_kept() -> None:
    model = wide(layers=16)
    x = torch.randn(8, 2048, device=GPU)
    cpu_offload(model, GPU, stream=WeightStream(limit=3 * 17 * MIB))
    with torch.no_grad():
        model(x)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(4):
            model(x)
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 4 * 17 * MIB


def test_gradients_flow_through_offloaded_weights() -> None:
    model = wide(layers=6)
    x = torch.randn(64, 2048, device=GPU, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    copy.deepcopy(model).to(GPU)(twin).sum().backward()
    cpu_offload(model, GPU, stream=WeightStream(limit=3 * 17 * MIB))
    for _ in range(3):
        model(x).sum().backward()
    assert x.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(x.grad, 3 * twin.grad)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_checkpoint_goes_to_every_place(tmp_path: Path, kind: str) -> None:
    expected = expected_logits(width=64, tied=False)
    state = {name: tensor.contiguous() for name, tensor in tower(width=64, tied=False).state_dict().items()}
    path = tmp_path / f"weights.{kind}"
    if kind == "bin":
        torch.save(state, path)
    else:
        save_file(state, path)
    for offload_buffers in (False, True):
        with init_empty_weights():
            model = Tower(width=64, tied=False).eval()
        load_checkpoint_and_dispatch(
            model, path, MAPS[0], offload_folder=tmp_path / f"offload{offload_buffers}", offload_buffers=offload_buffers
        )
        assert model.embedding.weight.device == GPU
        assert model.blocks[0].inner.weight.device.type == "meta"  # type: ignore[union-attr]
        for _ in range(3):
            assert torch.equal(logits(model), expected)


def test_a_checkpoint_beside_the_default_stream(tmp_path: Path) -> None:
    """Copies of a checkpoint go where memory may just have been freed."""
    state = {f"{index}.weight": torch.full((2048, 2048), float(index)) for index in range(12)}
    save_file(state, tmp_path / "model.safetensors")
    for _ in range(3):
        garbage = torch.randn(12, 2048, 2048, device=GPU)
        garbage @ garbage
        del garbage
        with init_empty_weights():
            model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(12)])
        load_checkpoint_and_dispatch(model, tmp_path, {"": 0})
        for index, layer in enumerate(model):
            assert layer.weight.unique().tolist() == [index]  # type: ignore[operator]


def test_tied_weights_are_on_the_gpu_once() -> None:
    model = tower(width=64)
    dispatch_model(model, {"embedding": 0, "blocks": 0, "head": "cpu"})
    assert torch.equal(logits(model), expected_logits(width=64))
    hook: Any = model.head._hf_hook
    assert hook.stream.foreseen + hook.stream.unforeseen == 0  # the embedding's copy serves the head


def test_a_map_by_memory_runs() -> None:
    model = tower(width=256, blocks=8)
    expected = expected_logits(width=256, blocks=8)
    names = infer_auto_device_map(model, {0: 4 * MIB, "cpu": "1GB"}, ["Block"], offload_buffers=True)
    assert {0, "cpu"} == set(names.values())
    dispatch_model(model, names)
    assert torch.equal(logits(model), expected)


def test_moving_and_copying() -> None:
    model = tower(width=64)
    dispatch_model(model, {"embedding": 0, "blocks": "cpu", "head": 0})
    with pytest.raises(OffloadedModelError):
        model.to("cpu")
    twin = copy.deepcopy(model)
    assert twin.head.forward is not model.head.forward
    assert torch.equal(logits(twin), expected_logits(width=64))
    assert torch.equal(logits(model), expected_logits(width=64))
    remove_hook_from_submodules(model)
    model.to(GPU)
    assert torch.equal(logits(model), expected_logits(width=64))


def test_whole_models_make_room_for_each_other() -> None:
    first, second = nn.Linear(4, 5), nn.Linear(5, 5)
    _, first_hook = cpu_offload_with_hook(first)
    _, second_hook = cpu_offload_with_hook(second, prev_module_hook=first_hook)
    output = second(first(torch.randn(3, 4)))
    assert output.device == GPU
    assert [first.weight.device.type, second.weight.device.type] == ["cpu", "cuda"]
    second_hook.offload()
    assert second.weight.device.type == "cpu"


def test_layers_stored_in_eight_bits() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).to(GPU, torch.bfloat16)
    attach_layerwise_casting_hooks(model, torch.float8_e4m3fn, torch.bfloat16)
    assert model(torch.randn(2, 64, device=GPU, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model[0].weight.dtype == torch.float8_e4m3fn


def test_inference_mode_leaves_nothing_behind() -> None:
    model = wide(layers=4)
    x = torch.randn(8, 2048, device=GPU)
    cpu_offload(model, GPU, stream=WeightStream(limit=3 * 17 * MIB))
    with torch.inference_mode():
        expected = model(x).clone()
    output = model(x.clone().requires_grad_())
    output.sum().backward()
    assert torch.equal(output.detach(), expected)
