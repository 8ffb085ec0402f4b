"""Writing a portable state in the formats of other libraries, one tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.serialization import (
    get_crc32_options,
    set_crc32_options,
    set_default_mmap_options,
    skip_data,
)
from typing_extensions import override

from paceline.checkpoint.conversion import write_paceline
from paceline.checkpoint.io.weights import stream_weights
from paceline.checkpoint.portable_state import LazyTensors, PortableOptimizer, PortableState
from paceline.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor
    from torch.distributed.checkpoint.planner import WriteItem

__all__ = ["WRITERS", "total_bytes"]

_MAP_SHARED = 1
_FILE_BYTES = 128 * 1024**2
"""Size of a DCP file. Its tensors are in memory together; a larger tensor has a file of its own."""


def total_bytes(state: PortableState) -> int:
    """Bytes of all tensors in a state."""
    families = [state.weights, *(tensors for o in state.optimizers for tensors in o.slots.values())]
    slots = [tensors.slot(name) for tensors in families for name in tensors]
    return sum(torch.Size(slot.shape).numel() * slot.dtype.itemsize for slot in slots)


def _models(state: PortableState) -> list[LazyTensors]:
    models: list[LazyTensors] = []
    while True:
        try:
            models.append(state.model(len(models)))
        except CheckpointError:
            return models


def _numbered(pattern: str, index: int) -> str:
    return pattern.format(f"_{index}" if index else "")


# Accelerate without sharding


def write_accelerate(state: PortableState, out: Path, on_progress: Callable[[int], None]) -> list[str]:
    """Write what `Accelerator.load_state` reads without FSDP: safetensors, and torch's optimizer state dicts.

    Returns:
        Sentences about what was left out, and why.
    """
    out.mkdir(parents=True, exist_ok=True)
    models = _models(state)
    if models:
        stream_weights(models[0], out, max_file_bytes=2**62, progress=on_progress)
    for index, tensors in enumerate(models[1:], start=1):
        (path,) = stream_weights(tensors, out / f"model_{index}.partial", max_file_bytes=2**62, progress=on_progress)
        path.replace(out / f"model_{index}.safetensors")
        path.parent.rmdir()
    for index, optimizer in enumerate(state.optimizers):
        _save_lazily(_torch_optimizer(optimizer), out / _numbered("optimizer{}.bin", index), on_progress)
    _write_small_objects(state, out)
    return []


def _torch_optimizer(optimizer: PortableOptimizer) -> dict[str, Any]:
    """An optimizer's state dict, with readers in place of tensors."""
    order = [name for group in optimizer.groups for name in group["params"]]
    numbers = {name: index for index, name in enumerate(order)}
    states: dict[int, dict[str, Any]] = {}
    for name, index in numbers.items():
        tensors = optimizer.slots.get(name, LazyTensors())
        lazy = {slot: _LazyTensor(tensors, slot) for slot in tensors}
        values = {**lazy, **optimizer.numbers.get(name, {})}
        if values:
            states[index] = values
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in optimizer.groups]
    return {"state": states, "param_groups": groups}


@dataclass(frozen=True, slots=True)
class _LazyTensor:
    """A tensor that is read when it is written to its file."""

    tensors: LazyTensors
    name: str


def _save_lazily(value: Any, path: Path, on_progress: Callable[[int], None]) -> None:
    """Save like `torch.save`, without all tensors in memory: first a file without their values, then one by one."""
    with FakeTensorMode():
        fake = _replace(value, _empty)
    crc = get_crc32_options()
    try:
        set_crc32_options(False)  # the values that it would cover are not there yet
        with skip_data(materialize_fake_tensors=True):
            torch.save(fake, path)
    finally:
        set_crc32_options(crc)
    # Shared: what is written into the mapped tensors reaches the file.
    with set_default_mmap_options(_MAP_SHARED):
        mapped = torch.load(path, weights_only=True, mmap=True)
    for target, lazy in _pairs(mapped, value):
        target.copy_(lazy.tensors[lazy.name])
        on_progress(target.numel() * target.element_size())


def _empty(lazy: _LazyTensor) -> Tensor:
    slot = lazy.tensors.slot(lazy.name)
    return torch.empty(slot.shape, dtype=slot.dtype)


def _replace(value: Any, make: Callable[[_LazyTensor], Any]) -> Any:
    if isinstance(value, _LazyTensor):
        return make(value)
    if isinstance(value, dict):
        return {key: _replace(item, make) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, make) for item in value]
    return value


def _pairs(mapped: Any, value: Any) -> Iterator[tuple[Tensor, _LazyTensor]]:
    if isinstance(value, _LazyTensor):
        yield mapped, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _pairs(mapped[key], item)


def _write_small_objects(state: PortableState, out: Path) -> None:
    """Write schedulers, the loss scaler, random generators and custom objects."""
    for index, scheduler in enumerate(state.schedulers):
        torch.save(scheduler, out / _numbered("scheduler{}.bin", index))
    if state.scaler is not None:
        torch.save(state.scaler, out / "scaler.pt")
    for rank, generators in state.generators.items():
        torch.save(_accelerate_generators(generators, state.step), out / f"random_states_{rank}.pkl")
    for index, custom in enumerate(state.custom):
        torch.save(custom, out / f"custom_checkpoint_{index}.pkl")


def _accelerate_generators(generators: dict[str, Any], step: int) -> dict[str, Any]:
    """One rank's random generators by Accelerate's names."""
    renamed: dict[str, Any] = {"step": step}
    if "python" in generators:
        version, words, cached = generators["python"]
        renamed["random_state"] = (version, tuple(words), cached)
    if "numpy" in generators:
        kind, keys, position, has_gauss, gauss = generators["numpy"]
        renamed["numpy_random_seed"] = (kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss)
    if "torch" in generators:
        renamed["torch_manual_seed"] = generators["torch"]
    if "cuda" in generators:
        renamed["torch_cuda_manual_seed"] = [generators["cuda"]]
    return renamed


# Accelerate with FSDP: torch.distributed.checkpoint


class _LazyPlanner(DefaultSavePlanner):
    """Reads each tensor when it is written.

    Args:
        value: The nested dictionary to save, with readers in place of tensors.
        on_progress: Called with the bytes of each tensor.
    """

    def __init__(self, value: dict[str, Any], on_progress: Callable[[int], None]) -> None:
        super().__init__()
        self._value = value
        self._on_progress = on_progress

    @override
    def resolve_data(self, write_item: WriteItem) -> Any:
        value: Any = self._value
        for key in self.mappings[write_item.index.fqn]:
            value = value[key]
        if not isinstance(value, _LazyTensor):
            return super().resolve_data(write_item)
        tensor = value.tensors[value.name]
        self._on_progress(tensor.numel() * tensor.element_size())
        return tensor


def write_fsdp(state: PortableState, out: Path, on_progress: Callable[[int], None]) -> list[str]:
    """Write what `Accelerator.load_state` reads under FSDP with SHARDED_STATE_DICT: DCP folders.

    Returns:
        Sentences about what was left out, and why.
    """
    out.mkdir(parents=True, exist_ok=True)
    for index, tensors in enumerate(_models(state)):
        names = {**{name: name for name in tensors}, **({} if index else state.ties)}
        _save_dcp({"model": {alias: _LazyTensor(tensors, name) for alias, name in names.items()}},
                  out / f"pytorch_model_fsdp_{index}", on_progress)  # fmt: skip
    for index, optimizer in enumerate(state.optimizers):
        states = {
            name: {slot: _LazyTensor(tensors, slot) for slot in tensors} | optimizer.numbers.get(name, {})
            for name, tensors in optimizer.slots.items()
        }
        nested = {"state": states, "param_groups": optimizer.groups}
        _save_dcp({"optimizer": nested}, out / f"optimizer_{index}", on_progress)
    _write_small_objects(state, out)
    return []


def _save_dcp(value: dict[str, Any], folder: Path, on_progress: Callable[[int], None]) -> None:
    """Write one folder from a single process, without the warning of torch's own `save`."""
    planner, writer = _LazyPlanner(value, on_progress), FileSystemWriter(folder, single_file_per_rank=True)
    writer.reset(folder)
    planner.set_up_planner(_replace(value, _on_meta), writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    (plan,), metadata = planner.create_global_plan([plan])
    planner.finish_plan(plan)
    # The writer keeps all tensors of a file until it is closed, so the plan is split as if for several ranks.
    shares = writer.prepare_global_plan([replace(plan, items=items) for items in _shares(plan.items)])
    writer.finish(metadata, [writer.write_data(share, planner).wait() for share in shares])


def _shares(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    shares: list[list[WriteItem]] = [[]]
    filled = 0
    for item in items:
        data = item.tensor_data
        size = 0
        if data is not None:
            size = data.chunk.sizes.numel() * data.properties.dtype.itemsize
        if shares[-1] and filled + size > _FILE_BYTES:
            shares.append([])
            filled = 0
        shares[-1].append(item)
        filled += size
    return shares


def _on_meta(lazy: _LazyTensor) -> Tensor:
    slot = lazy.tensors.slot(lazy.name)
    return torch.empty(slot.shape, dtype=slot.dtype, device="meta")


# DeepSpeed's universal layout

_DEEPSPEED_VERSION = "0.19.8"
"""The release whose `ds_to_universal` this layout was compared with."""


def write_deepspeed(state: PortableState, out: Path, on_progress: Callable[[int], None]) -> list[str]:
    """Write what `engine.load_checkpoint` reads with `checkpoint.load_universal`, at every ZeRO stage from 1 on.

    DeepSpeed's own tool writes one layout for stages 1 and 2 and another for stage 3. This one satisfies both readers,
    so it can be loaded at any of these stages, by any number of ranks.

    Returns:
        Sentences about what was left out, and why.
    """
    models, optimizers = _models(state), state.optimizers or [PortableOptimizer()]
    if (len(models), len(optimizers)) != (1, 1):
        raise CheckpointError(
            f"{state.folder} holds {len(models)} models and {len(optimizers)} optimizers",
            "A DeepSpeed engine has one of each",
            "Convert each model separately",
        )
    (tensors,), (optimizer,) = models, optimizers
    outside = [name for name in tensors if Path(name).name != name or name in ("", "..")]
    if outside:
        raise CheckpointError(
            f"A weight is named {outside[0]!r}",
            "Each weight is written to a folder of its name, and this one would be elsewhere",
            "Rename it, or convert to another format",
        )
    folder = out / f"global_step{state.step}_universal"
    (folder / "zero").mkdir(parents=True, exist_ok=True)
    for name in tensors:
        parameter = folder / "zero" / name
        parameter.mkdir(exist_ok=True)
        _write_slot(tensors[name].float(), parameter / "fp32.pt", on_progress)
        slots = optimizer.slots.get(name, LazyTensors())
        for slot in slots:
            if slot == "step":
                torch.save(slots[slot], parameter / "step.pt")
            else:
                _write_slot(slots[slot], parameter / f"{slot}.pt", on_progress)
    torch.save(_global_state(optimizer), folder / "zero" / "optimizer_state.pt")
    model_states = _model_states(state, tensors, optimizer)
    # One name for stages 1 and 2, the other for stage 3.
    torch.save(model_states, folder / "mp_rank_00_model_states.pt")
    torch.save(model_states, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    (out / "latest_universal").write_text(folder.name, encoding="utf-8")
    return _not_in_deepspeed(state, optimizer)


def _write_slot(tensor: Tensor, path: Path, on_progress: Callable[[int], None]) -> None:
    # torch.save writes the whole storage behind a view.
    torch.save({"param": tensor.clone(), "cat_dim": 0}, path)
    on_progress(tensor.numel() * tensor.element_size())


def _global_state(optimizer: PortableOptimizer) -> dict[str, Any]:
    """What is the same for all parameters, where stages 1 and 2 expect it, and where stage 3 does."""
    groups = [{**group, "params": [index]} for index, group in enumerate(optimizer.groups)]
    step = torch.tensor(float(optimizer.steps))
    return {
        "param_groups": groups,
        "optimizer_state_dict": {"param_groups": groups, "state": {0: {"step": step}}},
        "ds_version": _DEEPSPEED_VERSION,
        "dynamic_loss_scale": False,
        "overflow": False,
    }


def _model_states(state: PortableState, tensors: LazyTensors, optimizer: PortableOptimizer) -> dict[str, Any]:
    shapes = [
        {name: torch.Size(tensors.slot(name).shape) for name in group["params"] if name in tensors.sources}
        for group in optimizer.groups
    ]
    trained = {name for group in shapes for name in group}
    buffers = {name: tensors[name] for name in tensors if name not in trained}
    return {
        "module": buffers,
        "buffer_names": list(buffers),
        "optimizer": None,
        "param_shapes": shapes,
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": dict(state.ties),
        "lr_scheduler": state.schedulers[0] if state.schedulers else None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": state.step,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": _DEEPSPEED_VERSION,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }


def _not_in_deepspeed(state: PortableState, optimizer: PortableOptimizer) -> list[str]:
    left = ["DeepSpeed reads only trained parameters from this layout: it ignores the buffers and frozen ones in it"]
    if len(optimizer.groups) > 1:
        left.append("stage 3 gives all parameter groups the options of the first one when it reads this layout")
    if state.generators or state.custom:
        left.append("this layout has no random generators and custom objects")
    return left


WRITERS: Final = {
    "paceline": write_paceline,
    "accelerate": write_accelerate,
    "fsdp": write_fsdp,
    "deepspeed": write_deepspeed,
}
"""The writer of each format; it returns sentences about what the format cannot hold."""
