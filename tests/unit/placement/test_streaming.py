"""Weights that come ahead of need: the same numbers, at most so much memory, and no order taken for granted."""

from __future__ import annotations

import copy
import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paceline.errors import PlacementError
from paceline.placement import (
    WeightStream,
    cpu_offload,
    disk_offload,
    dispatch_model,
    get_state_dict_offloaded_model,
    remove_hook_from_submodules,
)
from paceline.placement.streaming import UseOrder, WeightGroup
from tests.unit.placement.towers import ids, tower

CPU = torch.device("cpu")


def stream(**settings: Any) -> WeightStream:
    """A stream that copies on the CPU, too, where it is not needed otherwise."""
    return WeightStream(devices=("cpu",), **settings)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids())
    return found


@pytest.fixture(params=["cpu", "disk", "cpu and disk"])
def offloaded(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Offloads a model in one of three ways, through a stream."""

    def offload(model: nn.Module, through: WeightStream, buffers: bool = False) -> nn.Module:
        if request.param == "cpu":
            return cpu_offload(model, CPU, buffers, stream=through)
        if request.param == "disk":
            return disk_offload(model, tmp_path, CPU, buffers, stream=through)
        # The meta device stands for an accelerator that nothing is on: all that is on the CPU counts as offloaded.
        names = {"embedding": "disk", "blocks.0": "disk", "blocks.1": "disk", "blocks.2": "cpu", "blocks.3": "disk"}
        return dispatch_model(
            model, {**names, "head": "cpu"}, offload_dir=tmp_path, offload_buffers=buffers, stream=through
        )

    return offload


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("limit", [None, 0, 3000, 10**9])
def test_the_numbers_are_the_same(offloaded: Any, limit: int | None, buffers: bool, tied: bool) -> None:
    model = tower(tied=tied)
    expected = logits(model)
    through = stream(limit=limit)
    offloaded(model, through, buffers)
    for _ in range(4):
        assert torch.equal(logits(model), expected)
    assert through.unforeseen > 0
    if limit != 0:
        assert through.foreseen > 0
    assert all(parameter.device.type == "meta" for parameter in model.blocks[0].parameters())


def test_a_wrong_weight_is_noticed(offloaded: Any) -> None:
    """The comparison above can fail: one changed number is seen."""
    model = tower()
    expected = logits(model)
    with torch.no_grad():
        model.get_parameter("blocks.1.inner.weight")[0, 0] += 1
    offloaded(model, stream())
    assert not torch.equal(logits(model), expected)


def test_after_one_pass_everything_is_foreseen() -> None:
    model = tower()
    through = stream()
    cpu_offload(model, CPU, stream=through)
    logits(model)
    logits(model)
    before = through.unforeseen
    for _ in range(3):
        logits(model)
    assert through.unforeseen == before


class Repeating(nn.Module):
    """Uses one layer again and again between others, and another order every second time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(5)])
        self.backwards = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = [0, 1, 0, 2, 3, 0, 4]
        for index in reversed(order) if self.backwards else order:
            x = self.layers[index](x).tanh()
        return x


def test_repeated_modules_and_other_orders_give_the_same_numbers() -> None:
    torch.manual_seed(0)
    plain = Repeating()
    model = copy.deepcopy(plain)
    through = stream(limit=1100)
    cpu_offload(model, CPU, stream=through)
    x = torch.randn(3, 6)
    for turn in (False, False, True, False, True, True):
        plain.backwards = model.backwards = turn
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
    assert through.foreseen > 10


def test_the_limit_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tower(tied=False)
    largest = max(sum(p.nbytes for p in module.parameters(recurse=False)) for module in model.modules())
    through = stream(limit=2 * largest)
    seen: list[int] = []
    fetch = WeightStream.fetch

    def watched(self: WeightStream, group: WeightGroup) -> dict[str, torch.Tensor]:
        tensors = fetch(self, group)
        seen.append(self._in_use.get(CPU, 0) + sum(each.nbytes for each in self._ahead))
        return tensors

    monkeypatch.setattr(WeightStream, "fetch", watched)
    cpu_offload(model, CPU, stream=through)
    for _ in range(3):
        logits(model)
    # Tensors begin at multiples of 256 bytes.
    assert max(seen) <= 2 * largest + 4 * 256
    assert through.foreseen > 0


def test_gradients_flow_through_offloaded_weights() -> None:
    model = tower(tied=False).double().requires_grad_(False)
    ones = torch.ones(5, 8, dtype=torch.double)
    plain = copy.deepcopy(model.blocks)
    cpu_offload(model, CPU, stream=stream(limit=3000))
    for _ in range(3):
        x, y = ones.clone().requires_grad_(), ones.clone().requires_grad_()
        output, expected = x, y
        for block, twin in zip(model.blocks, plain, strict=True):
            output, expected = block(output), twin(expected)
        torch.autograd.backward([output.sum(), expected.sum()])
        assert x.grad is not None
        assert y.grad is not None
        assert torch.equal(x.grad, y.grad)


def test_inference_mode_leaves_nothing_behind() -> None:
    model = tower()
    expected = logits(model)
    cpu_offload(model, CPU, stream=stream())
    with torch.inference_mode():
        model(ids())
    output = model(ids())
    with pytest.warns(UserWarning, match="gradients to offloaded weights, and they are lost"):
        output.sum().backward()
    assert torch.equal(output.detach(), expected)


def test_a_tensor_of_several_modules_is_on_the_device_once() -> None:
    through = stream()
    weight = torch.ones(3)
    shared = through.shared_group(weight, CPU)
    assert through.shared_group(weight, CPU) is shared
    first, second = through.fetch(shared), through.fetch(shared)
    assert first[""] is second[""]
    through.release(shared)
    assert shared.tensors
    through.release(shared)
    assert not shared.tensors


def test_a_missing_file_is_an_error_and_the_model_goes_on_when_it_is_back(tmp_path: Path) -> None:
    model = tower()
    expected = logits(model)
    disk_offload(model, tmp_path, CPU, stream=stream())
    assert torch.equal(logits(model), expected)
    path = tmp_path / "blocks.2.inner.weight.dat"
    content = path.read_bytes()
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.unlink()
    with pytest.raises(PlacementError, match=r"blocks\.2\.inner\.weight\.dat is gone"):
        logits(model)
    path.write_bytes(content[:-4])
    with pytest.raises(PlacementError, match="was written again"):
        logits(model)
    path.write_bytes(content)
    os.utime(path, ns=times)  # as tools do that restore files
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("is_ahead", [False, True], ids=["needed now", "ahead of need"])
def test_after_memory_ran_out_the_model_goes_on(monkeypatch: pytest.MonkeyPatch, is_ahead: bool) -> None:
    model = tower(tied=False)
    expected = logits(model)
    through = stream()
    cpu_offload(model, CPU, stream=through)
    begin = WeightStream._begin
    calls = 0

    def out_of_memory(self: WeightStream, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1 + is_ahead:
            raise torch.OutOfMemoryError
        return begin(self, *arguments)

    monkeypatch.setattr(WeightStream, "_begin", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        logits(model)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    assert through._in_use == {CPU: 0}


def test_a_copy_of_the_model_has_a_stream_of_its_own() -> None:
    model = tower()
    expected = logits(model)
    cpu_offload(model, CPU, stream=stream())
    logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)
    hook: Any = twin.blocks[0].inner._hf_hook  # type: ignore[union-attr]
    original: Any = model.blocks[0].inner._hf_hook  # type: ignore[union-attr]
    assert hook.stream is not original.stream


def test_saving_does_not_disturb_the_stream() -> None:
    model = tower(tied=False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    through = stream()
    cpu_offload(model, CPU, True, stream=through)
    logits(model)
    saved = get_state_dict_offloaded_model(model)
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
    assert torch.equal(logits(model), expected)
    remove_hook_from_submodules(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(logits(model), expected)


def test_page_locked_weights_replace_the_originals() -> None:
    model = tower(tied=False)
    cpu_offload(model, CPU, stream=stream())
    hook: Any = model.blocks[0].inner._hf_hook  # type: ignore[union-attr]
    before = hook.weights_map["weight"].data_ptr()
    logits(model)
    after = hook.weights_map["weight"].data_ptr()
    assert before != after
    logits(model)
    assert hook.weights_map["weight"].data_ptr() == after


def test_beyond_the_limit_of_page_locked_memory_weights_pass_through() -> None:
    model = tower(tied=False)
    expected = logits(model)
    cpu_offload(model, CPU, stream=stream(pinned_limit=0))
    hook: Any = model.blocks[0].inner._hf_hook  # type: ignore[union-attr]
    before = hook.weights_map["weight"].data_ptr()
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
    assert hook.weights_map["weight"].data_ptr() == before


def test_replaced_weights_are_used_from_the_next_forward_on() -> None:
    model = tower(tied=False)
    cpu_offload(model, CPU, stream=stream())
    logits(model)
    twin = tower(tied=False)
    with torch.no_grad():
        twin.head.weight.mul_(2)
    hook: Any = model.head._hf_hook
    hook.weights_map = {"weight": twin.head.weight.detach().clone()}
    assert torch.equal(logits(model), logits(twin))


def test_large_weights_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.placement.transfer._PIECE", 1000)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 70), nn.Linear(70, 30))
    x = torch.randn(4, 50)
    with torch.no_grad():
        expected = model(x)
        cpu_offload(model, CPU, stream=stream(pinned_limit=0))
        for _ in range(3):
            assert torch.equal(model(x), expected)


def test_an_order_is_learned_by_the_last_two() -> None:
    groups = {name: WeightGroup({"w": torch.zeros(1)}, CPU) for name in "abcd"}
    order = UseOrder()
    for _ in range(2):
        for name in "abacad":
            order.visit(groups[name])
    for name in "aba":
        order.visit(groups[name])
    position = order.position
    for name in "cadabac":
        found = order.after(position)
        assert found is groups[name]
        position = (position[1], found)


def test_threads_end_with_the_stream() -> None:
    def reading() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("paceline-weights")}

    gc.collect()
    before = reading()
    through = stream()
    group = through.group({"w": torch.ones(3)}, CPU)
    assert through.fetch(group)["w"].tolist() == [1, 1, 1]
    mine = reading() - before
    assert mine
    del through
    gc.collect()
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()
