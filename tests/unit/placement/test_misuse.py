"""What is done with offloaded models besides calling them: never a wrong number in silence, and advice in errors."""

from __future__ import annotations

import json
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from paceline import Accelerator
from paceline.errors import OffloadedModelError, PlacementError
from paceline.placement import (
    ModelHook,
    add_hook_to_module,
    attach_layerwise_casting_hooks,
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    get_max_memory,
    get_state_dict_offloaded_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
    offload_state_dict,
    remove_hook_from_submodules,
)
from tests.unit.placement.towers import Tower, ids, tower


def layers(seed: int = 0, width: int = 8) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])


def empty(build: Callable[[], nn.Module] = layers) -> Any:
    with init_empty_weights():
        return build()


X = torch.linspace(-1, 1, 16).view(2, 8)


def test_two_models_in_one_folder(tmp_path: Path) -> None:
    """The second one has its own weights, and the first one does not compute with them."""
    first, second, other = layers(), layers(seed=1), tower()
    expected, expected_of_second, expected_of_other = first(X), second(X), other(ids())
    disk_offload(first, tmp_path)
    disk_offload(other, tmp_path)  # other names
    assert torch.equal(first(X), expected)
    assert torch.equal(other(ids()), expected_of_other)
    disk_offload(second, tmp_path)
    assert torch.equal(second(X), expected_of_second)
    with pytest.raises(PlacementError, match=r"0\.weight\.dat was written again .* offload folder of its own"):
        first(X)


def test_the_same_weights_again_disturb_nobody(tmp_path: Path) -> None:
    """Ranks that offload to one folder write the same files."""
    first, second = layers(), layers()
    disk_offload(first, tmp_path)
    disk_offload(second, tmp_path)
    assert torch.equal(first(X), second(X))


@pytest.mark.parametrize(
    "offload", [disk_offload, lambda model, to: dispatch_model(model, {"": "disk"}, offload_dir=to)]
)
def test_a_model_that_was_trained_is_offloaded_again(tmp_path: Path, offload: Callable[..., Any]) -> None:
    model = layers()
    offload(model, tmp_path)
    remove_hook_from_submodules(model)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    expected = model(X)
    offload(model, tmp_path)
    assert torch.equal(model(X), expected)
    # Files are replaced, never written to: memory that is mapped to the one of before stays as it is.
    remove_hook_from_submodules(model)
    held = model[0].weight
    offload_state_dict(tmp_path, layers(seed=1).state_dict())
    assert torch.equal(held, 2 * before)


def test_a_checkpoint_in_use_is_saved_over(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(layers().state_dict(), path)
    model = load_checkpoint_and_dispatch(empty(), path, {"": "disk"}, offload_folder=tmp_path / "offload")
    save_file(layers(seed=1).state_dict(), path)
    with pytest.raises(PlacementError, match=r"model\.safetensors was written again"):
        model(X)
    path.unlink()
    model = dispatch_model(empty(), {"": "disk"}, offload_dir=tmp_path / "offload")
    with pytest.raises(PlacementError, match=r"The checkpoint .* is gone.*Keep the checkpoint"):
        model(X)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize(
    "device_map",
    [
        {"": "disk"},
        {"embedding": "disk", "blocks": "cpu", "head": "cpu"},
        {"embedding": "cpu", "blocks": "disk", "head": "disk"},
    ],
)
def test_a_checkpoint_need_not_have_a_tied_weight_twice(tmp_path: Path, kind: str, device_map: dict[str, Any]) -> None:
    model = tower()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}
    path = tmp_path / f"w.{kind}"
    if kind == "bin":
        torch.save(state, path)
    else:
        save_file(state, path)
    spread: Any = load_checkpoint_and_dispatch(
        empty(lambda: Tower().eval()), path, device_map, offload_folder=tmp_path / "o"
    )
    assert torch.equal(spread(ids()), model(ids()))
    assert set(get_state_dict_offloaded_model(spread)) == set(model.state_dict())
    remove_hook_from_submodules(spread)
    assert spread.head.weight is spread.embedding.weight


def test_the_dtype_of_weights_on_disk_is_that_of_the_model_too(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in layers().state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "w.bin")
    expected = layers()
    expected.load_state_dict(state)
    for number, path in enumerate([tmp_path / "model.safetensors", tmp_path / "w.bin"]):
        for device_map in ({"": "cpu"}, {"": "disk"}, {"0": "cpu", "1": "disk", "2": "cpu"}):
            folder = tmp_path / f"{number}{len(device_map)}"
            model = load_checkpoint_and_dispatch(empty(), path, device_map, offload_folder=folder)
            assert torch.equal(model(X), expected(X))


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_statistics_of_offloaded_modules_are_kept(tmp_path: Path, offload_buffers: bool) -> None:
    model, twin = (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    disk_offload(model, tmp_path, offload_buffers=offload_buffers)
    for _ in range(3):
        assert torch.equal(model(X), twin(X))
    assert torch.equal(model.eval()(X), twin.eval()(X))
    remove_hook_from_submodules(model)
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


class Borrowing(nn.Module):
    """Uses the weight of a module inside it without calling that one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, bias=False)
        self.own = nn.ParameterDict({"with/slash": torch.rand(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x @ self.inner.weight.T @ self.own["with/slash"]
        return found


@pytest.mark.parametrize("how", ["disk", "cpu", "map"])
def test_a_weight_without_values_is_not_computed_with(tmp_path: Path, how: str) -> None:
    """On a CPU torch multiplies with a tensor on the meta device without a word: the result is what was in memory."""

    def offload(**preload: Any) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(Borrowing(), nn.Linear(8, 8))
        if how == "disk":
            return disk_offload(model, tmp_path, **preload)
        if how == "cpu":
            return cpu_offload(model, torch.device("cpu"), **preload)
        return dispatch_model(model, {"0": "disk", "1": "cpu"}, offload_dir=tmp_path, **preload)

    torch.manual_seed(0)
    expected = nn.Sequential(Borrowing(), nn.Linear(8, 8))(X)
    with pytest.raises(OffloadedModelError, match=r"used a weight of shape \(8, 8\).*preload_module_classes"):
        offload()(X)
    for names in (["Borrowing"], [Borrowing]):
        assert torch.equal(offload(preload_module_classes=names)(X), expected)


def test_attention_of_torch_needs_no_hint(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    expected = layer(X[None])
    disk_offload(layer, tmp_path)
    assert torch.equal(layer(X[None]), expected)


class Scaled(nn.Module):
    """Has a tensor of its own, and multiplies with the weight of a layer that it does not call."""

    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("shift", torch.tensor(3))
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, *, borrow: bool = False) -> torch.Tensor:
        out = x @ self.inner.weight if borrow else self.inner(x)
        return out * self.scale + self.shift


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"scale": "disk", "shift": "cpu", "inner": "disk"}])
def test_a_weight_without_values_is_not_computed_with_by_a_model_that_is_offloaded_itself(
    tmp_path: Path, device_map: dict[str, Any]
) -> None:
    model = Scaled()
    dispatch_model(model, device_map, offload_dir=tmp_path)
    with pytest.raises(OffloadedModelError, match=r"used a weight of shape \(8, 8\), as inner.weight has"):
        model(X, borrow=True)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_tensors_of_the_model_itself_may_be_on_disk(tmp_path: Path, offload_buffers: bool) -> None:
    original = Scaled()
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    model = load_checkpoint_and_dispatch(
        empty(Scaled),
        tmp_path,
        {"scale": "disk", "shift": "disk", "inner": "cpu"},
        offload_folder=tmp_path / "offload",
        offload_buffers=offload_buffers,
    )
    assert model.scale.device.type == "meta"
    assert torch.equal(model(X), original(X))
    state = get_state_dict_offloaded_model(model)
    remove_hook_from_submodules(model)
    for name, value in original.state_dict().items():
        assert torch.equal(state[name], value)


def attention() -> Any:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()


def test_attention_of_torch_is_not_split(tmp_path: Path) -> None:
    """It multiplies with the weights of its output layer, which may not be somewhere else."""
    expected = attention()(X[None])
    maps = [infer_auto_device_map(attention(), {"cpu": limit}) for limit in range(0, 5000, 100)]
    assert not any(name.startswith("self_attn.") for each in maps for name in each)
    assert len({tuple(each.values()) for each in maps}) > 3
    for index, device_map in enumerate(maps):
        model = dispatch_model(attention(), device_map, offload_dir=tmp_path / str(index))
        assert torch.equal(model(X[None]), expected)


def test_a_module_that_a_map_splits_gets_all_its_weights_at_once(tmp_path: Path) -> None:
    model = attention()
    expected = model(X[None])
    names = [name for name, _ in model.named_parameters() if "out_proj" not in name]
    device_map = {**dict.fromkeys(names, "cpu"), "self_attn.out_proj": "disk"}
    dispatch_model(model, device_map, offload_dir=tmp_path / "attention")
    assert torch.equal(model(X[None]), expected)

    borrowing = nn.Sequential(Borrowing(), nn.Linear(8, 8))
    expected = borrowing(X)
    split = {"0.inner": "disk", "0.own": "cpu", "1": "cpu"}
    dispatch_model(borrowing, split, offload_dir=tmp_path / "borrowing", preload_module_classes=["Borrowing"])
    assert torch.equal(borrowing(X), expected)
    remove_hook_from_submodules(borrowing)
    assert torch.equal(borrowing(X), expected)


class Lists(nn.Module):
    """Has parameters in a list, which is never called, and an output of nothing but them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.own = nn.ParameterList([torch.rand(8), torch.rand(8)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[0](x), self.own[0] * self.own[1]


def test_an_output_without_values_is_refused(tmp_path: Path) -> None:
    split = {"layers": "cpu", "own": "disk"}
    model = dispatch_model(Lists(), split, offload_dir=tmp_path / "a")
    with pytest.raises(OffloadedModelError, match=r"Lists returned a tensor of shape \(8,\) .*preload_module_classes"):
        model(X)
    original = Lists()
    expected = original(X)
    model = disk_offload(original, tmp_path / "b", preload_module_classes=["Lists"])
    assert all(map(torch.equal, model(X), expected))


def test_a_model_with_lists_can_be_pickled(tmp_path: Path) -> None:
    """A list has no forward, and so no method that a pickle could name."""
    original = Lists()
    expected = original(X)
    model = dispatch_model(original, {"layers": "disk", "own": "cpu"}, offload_dir=tmp_path)
    for each in (model, pickle.loads(pickle.dumps(model))):
        assert all(map(torch.equal, each(X), expected))
        remove_hook_from_submodules(each)
        assert all(map(torch.equal, each(X), expected))
        assert not any(hasattr(module, "_hf_hook") for module in each.modules())


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}])
def test_nothing_is_loaded_into_an_offloaded_model(tmp_path: Path, device_map: dict[str, Any] | None) -> None:
    """Its hooks would bring the old weights for each forward."""
    save_file(layers(seed=1).state_dict(), tmp_path / "model.safetensors")
    model = dispatch_model(layers(), {"0": "disk", "1": "cpu", "2": "cpu"}, offload_dir=tmp_path / "offload")
    with pytest.raises(PlacementError, match=r"0.weight, 0.bias of Sequential are to be loaded.*remove_hook_from_sub"):
        load_checkpoint_in_model(model, tmp_path, device_map)
    remove_hook_from_submodules(model)
    load_checkpoint_in_model(model, tmp_path, device_map)
    assert torch.equal(model(X), layers(seed=1)(X))


def test_a_dtype_without_a_map_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(layers(seed=1).state_dict(), tmp_path / "model.safetensors")
    model = layers()
    load_checkpoint_in_model(model, tmp_path, dtype="float16")
    assert "dtype=float16 has no effect without device_map" in caplog.text
    assert torch.equal(model(X), layers(seed=1)(X))


class Counted(nn.Linear):
    """Adds an object to the state dict that is no weight."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.steps: Any = {"steps": 0}

    def get_extra_state(self) -> Any:
        return self.steps

    def set_extra_state(self, state: Any) -> None:
        self.steps = state


@pytest.mark.parametrize("steps", [{"steps": 7}, torch.tensor([7])])
def test_what_modules_add_to_the_state(tmp_path: Path, steps: Any) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(Counted(), nn.Linear(8, 8))

    original = build()
    original[0].steps = steps
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    split = {"0.weight": "disk", "0.bias": "cpu", "1": "cpu"}
    for index, device_map in enumerate([{"": "cpu"}, split, None]):
        folder = tmp_path / str(index)
        model = empty(build)
        load_checkpoint_and_dispatch(model, tmp_path, device_map, offload_folder=folder, strict=True)
        assert model[0].steps == steps
        assert get_state_dict_offloaded_model(model)["0._extra_state"] == steps
    assert torch.equal(cpu_offload(build())(X), original(X))
    assert torch.equal(disk_offload(build(), tmp_path / "own")(X), original(X))


def test_threads_take_turns(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(4)]).requires_grad_(False)
    x = torch.rand(16, 128)
    expected = model(x)
    disk_offload(model, tmp_path)
    wrong: list[object] = []

    def run() -> None:
        for _ in range(20):
            try:
                if not torch.equal(model(x), expected):
                    wrong.append("another output")
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_that_nobody_gets_are_a_warning(tmp_path: Path) -> None:
    model = disk_offload(layers(), tmp_path)
    with pytest.warns(UserWarning, match=r"gradients to offloaded weights, and they are lost.*Freeze them"):
        model(X).sum().backward()
    x = X.clone().requires_grad_()
    model.requires_grad_(False)(x).sum().backward()  # no warning
    assert x.grad is not None


def test_saving_what_is_offloaded(tmp_path: Path) -> None:
    model = layers()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    disk_offload(model, tmp_path / "offload")
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(model)
    accelerator.save_model(model, tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_all_names_and_own_tensors_are_in_the_state(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first
            self.scale = nn.Parameter(torch.rand(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.second(self.first(x)) * self.scale
            return found

    model = Shared()
    expected, state = model(X), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    disk_offload(model, tmp_path)
    assert torch.equal(model(X), expected)
    found = get_state_dict_offloaded_model(model)
    assert list(found) == list(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_offloading_again_and_hooks_in_the_place_of_others(tmp_path: Path) -> None:
    model = layers()
    expected = model(X)
    dispatch_model(model, {"": "disk"}, offload_dir=tmp_path)
    with pytest.raises(PlacementError, match=r"already.*remove_hook_from_submodules\(model\) first"):
        dispatch_model(model, {"0": "cpu", "1": "disk", "2": "disk"}, offload_dir=tmp_path / "another")
    with pytest.raises(OffloadedModelError, match="remove_hook_from_submodules"):
        model.to("cpu")
    add_hook_to_module(model[0], ModelHook())  # its weights come back with the end of the hook before
    assert torch.equal(model(X), expected)
    with pytest.raises(PlacementError, match="A hook is an object"):
        add_hook_to_module(model[1], ModelHook)  # type: ignore[arg-type]
    remove_hook_from_submodules(model)
    remove_hook_from_submodules(model)
    assert torch.equal(model(X), expected)
    disk_offload(model, tmp_path / "disk")
    with pytest.raises(OffloadedModelError, match="remove_hook_from_submodules"):
        model.to("cpu")


def test_models_without_weights(tmp_path: Path) -> None:
    for model in (cpu_offload(nn.Sequential(nn.ReLU())), disk_offload(nn.ReLU(), tmp_path)):
        assert torch.equal(model(X), X.relu())
    spread = dispatch_model(nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), {"0": "disk", "1": "cpu"}, offload_dir=tmp_path)
    assert spread(X).shape == (2, 8)
    first, hook = cpu_offload_with_hook(nn.ReLU(), "cpu")
    second, _ = cpu_offload_with_hook(layers(), "cpu", hook)
    assert second(first(X)).shape == (2, 8)


def test_a_layer_stored_in_a_small_dtype_runs_without_its_hook() -> None:
    model = layers()
    attach_layerwise_casting_hooks(model, torch.float8_e4m3fn, torch.float32)
    expected = model(X)
    remove_hook_from_submodules(model)
    assert torch.equal(model(X), expected)


def test_a_model_without_values_is_loaded_into_host_memory(tmp_path: Path) -> None:
    save_file(layers().state_dict(), tmp_path / "model.safetensors")
    model = empty()
    load_checkpoint_in_model(model, tmp_path)
    assert torch.equal(model(X), layers()(X))


def test_shards_may_be_loaded_strictly_without_a_map(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = layers().state_dict()
    for number, names in enumerate([list(state)[:3], list(state)[3:]]):
        save_file({name: state[name] for name in names}, tmp_path / f"{number}.safetensors")
    weight_map = {name: f"{number}.safetensors" for number in (0, 1) for name in list(state)[3 * number :][:3]}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    model = layers(seed=1)
    load_checkpoint_in_model(model, tmp_path, strict=True)
    assert torch.equal(model(X), layers()(X))
    with caplog.at_level(logging.WARNING):
        load_checkpoint_in_model(model, tmp_path / "0.safetensors")
    assert "The checkpoint has no 1.bias, 2.bias, 2.weight" in caplog.text
    with pytest.raises(PlacementError, match=r"has no 1\.bias"):
        load_checkpoint_in_model(model, tmp_path / "0.safetensors", strict=True)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(PlacementError, match=r"not beside it: 1\.safetensors"):
        load_checkpoint_in_model(model, tmp_path)
    for content, found in (("{", "cannot be read"), ("[]", "names no files"), ('{"metadata": {}}', "names no files")):
        index.write_text(content)
        with pytest.raises(PlacementError, match=found):
            load_checkpoint_in_model(model, tmp_path)


def _file(folder: Path, content: object) -> Path:
    path = folder / "w.bin"
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: _file(folder, {"model": layers().state_dict(), "epoch": 3}), "holds a dict with model, epoch"),
        (lambda folder: _file(folder, layers()), "cannot be read as weights"),
        (lambda folder: _file(folder, {f"module.{name}": each for name, each in layers().state_dict().items()}),
         "none of the 6 weights .* another prefix"),
        (lambda folder: _file(folder, layers(width=4).state_dict()), r"have the shape \(4.*another configuration"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"": "disk"}])
def test_files_that_do_not_hold_these_weights(
    tmp_path: Path, make: Callable[[Path], Path], message: str, device_map: dict[str, Any]
) -> None:
    with pytest.raises(PlacementError, match=message):
        load_checkpoint_and_dispatch(empty(), make(tmp_path), device_map, offload_folder=tmp_path / "offload")


def test_weights_that_have_no_values_anywhere(tmp_path: Path) -> None:
    for place in (
        cpu_offload,
        lambda model: disk_offload(model, tmp_path),
        lambda model: dispatch_model(model, {"": "cpu"}),
    ):
        with pytest.raises(PlacementError, match=r"0\.weight.*have no values.*Load a checkpoint"):
            place(empty())
    state = layers().state_dict()
    del state["1.weight"]
    save_file(state, tmp_path / "model.safetensors")
    for device_map in ({"": "cpu"}, {"": "disk"}):
        with pytest.raises(PlacementError, match=r"1\.weight of Sequential cannot be placed"):
            load_checkpoint_and_dispatch(empty(), tmp_path, device_map, offload_folder=tmp_path / "offload")
    with init_empty_weights(include_buffers=True):
        model = Tower(tied=False)
    save_file(tower(tied=False).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(PlacementError, match=r"blocks\.0\.mask.*no checkpoint has them \(persistent=False\)"):
        load_checkpoint_and_dispatch(model, tmp_path, {"": "cpu"})


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": 7}, "puts the model on 7. This machine has"),
        ({"0": "gpu", "1": "cpu", "2": "cpu"}, "puts 0 on 'gpu'. That is not a device"),
        ({"": None}, "That is not a device"),
        ("auto", "Devices are needed by name"),
        (["cpu"], "Devices are needed by name"),
    ],
)
def test_devices_that_are_none(device_map: Any, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        dispatch_model(layers(), device_map)


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, Path("/proc/no_folder")):
        with pytest.raises(PlacementError, match=r"cannot be written .*Name a folder that can be written"):
            disk_offload(layers(), folder)


def test_spellings_of_sizes(caplog: pytest.LogCaptureFixture) -> None:
    spellings = {"1GiB": 2**30, "1 GB": 10**9, "1e9": 10**9, "0": 0, "2048": 2048, "1.5KiB": 1536, "1_000KB": 10**6}
    for text, size in spellings.items():
        assert get_max_memory({"cpu": text}) == {"cpu": size}
    assert get_max_memory({"cpu": 1e9}) == {"cpu": 1e9}
    assert not caplog.text
    assert get_max_memory({"cpu": "8Mb"}) == {"cpu": 10**6}
    assert "counts bits" in caplog.text
    for wrong in ("", "-1GB", "1,5GB", "lots", -1, float("nan"), None, True):
        with pytest.raises(PlacementError, match="not a number of bytes"):
            get_max_memory({"cpu": wrong})  # type: ignore[dict-item]
    with pytest.raises(PlacementError, match="Pass a dict"):
        get_max_memory("10GB")  # type: ignore[arg-type]
    model = layers()
    by_name = infer_auto_device_map(model, {"cpu": 700}, no_split_module_classes=["Linear"])
    assert infer_auto_device_map(model, {"cpu": 700}, no_split_module_classes=[nn.Linear]) == by_name  # type: ignore[list-item]
