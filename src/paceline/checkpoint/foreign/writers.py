"""A training state into the folders of other libraries, one tensor at a time."""

from __future__ import annotations

from contextlib import contextmanager
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
from paceline.checkpoint.io.streaming import stream_weights
from paceline.checkpoint.portable_state import ForeignOptimizer, ForeignState, Tensors
from paceline.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor
    from torch.distributed.checkpoint.planner import WriteItem

__all__ = ["WRITERS", "total_bytes"]

_MAP_SHARED = 1
_FILE_BYTES = 128 * 1024**2
"""Of one file of DCP, whose tensors are in memory together; one that is larger has a file of its own."""


def total_bytes(state: ForeignState) -> int:
    """Bytes of all tensors of a state."""
    families = [state.weights, *(tensors for o in state.optimizers for tensors in o.slots.values())]
    slots = [tensors.slot(name) for tensors in families for name in tensors]
    return sum(torch.Size(slot.shape).numel() * slot.dtype.itemsize for slot in slots)


def _models(state: ForeignState) -> list[Tensors]:
    found: list[Tensors] = []
    while True:
        try:
            found.append(state.model(len(found)))
        except CheckpointError:
            return found


def _numbered(pattern: str, index: int) -> str:
    return pattern.format(f"_{index}" if index else "")


# Plain torch, as Accelerate lays it out


def write_accelerate(state: ForeignState, out: Path, on_progress: Callable[[int], None]) -> list[str]:
    """Write what `Accelerator.load_state` reads without FSDP: safetensors, and torch's optimizer states.

    Returns:
        What was left, and why.
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
    _write_rest(state, out)
    return []


def _torch_optimizer(optimizer: ForeignOptimizer) -> dict[str, Any]:
    """An optimizer's state as torch has it, with readers in the place of tensors."""
    order = [name for group in optimizer.groups for name in group["params"]]
    numbers = {name: index for index, name in enumerate(order)}
    states: dict[int, dict[str, Any]] = {}
    for name, index in numbers.items():
        tensors = optimizer.slots.get(name, Tensors())
        held = {slot: _Later(tensors, slot) for slot in tensors}
        entry = {**held, **optimizer.numbers.get(name, {})}
        if entry:
            states[index] = entry
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in optimizer.groups]
    return {"state": states, "param_groups": groups}


@dataclass(frozen=True, slots=True)
class _Later:
    """A tensor that is read when its place in the file is there."""

    tensors: Tensors
    name: str


def _save_lazily(value: Any, path: Path, on_progress: Callable[[int], None]) -> None:
    """Do what `torch.save` does, without all tensors in memory: first the file with room for them, then each."""
    with FakeTensorMode():
        promised = _replace(value, lambda later: _empty(later))
    crc = get_crc32_options()
    try:
        set_crc32_options(False)  # the bytes that it would be over come later
        with skip_data(materialize_fake_tensors=True):
            torch.save(promised, path)
    finally:
        set_crc32_options(crc)
    with _shared_maps():
        room = torch.load(path, weights_only=True, mmap=True)
    for place, later in _pairs(room, value):
        place.copy_(later.tensors[later.name])
        on_progress(place.numel() * place.element_size())


def _empty(later: _Later) -> Tensor:
    slot = later.tensors.slot(later.name)
    return torch.empty(slot.shape, dtype=slot.dtype)


def _replace(value: Any, make: Callable[[_Later], Any]) -> Any:
    if isinstance(value, _Later):
        return make(value)
    if isinstance(value, dict):
        return {key: _replace(item, make) for key, item in value.items()}
    return [_replace(item, make) for item in value] if isinstance(value, list) else value


def _pairs(room: Any, value: Any) -> Iterator[tuple[Tensor, _Later]]:
    if isinstance(value, _Later):
        yield room, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _pairs(room[key], item)


@contextmanager
def _shared_maps() -> Iterator[None]:
    """Let what is written into mapped tensors reach their file."""
    with set_default_mmap_options(_MAP_SHARED):
        yield


def _write_rest(state: ForeignState, out: Path) -> None:
    """Everything that is small: schedulers, the scaler, generators and custom objects."""
    for index, held in enumerate(state.schedulers):
        torch.save(held, out / _numbered("scheduler{}.bin", index))
    if state.scaler is not None:
        torch.save(state.scaler, out / "scaler.pt")
    for rank, held in state.generators.items():
        torch.save(_their_generators(held, state.step), out / f"random_states_{rank}.pkl")
    for index, held in enumerate(state.custom):
        torch.save(held, out / f"custom_checkpoint_{index}.pkl")


def _their_generators(held: dict[str, Any], step: int) -> dict[str, Any]:
    found: dict[str, Any] = {"step": step}
    if "python" in held:
        version, words, cached = held["python"]
        found["random_state"] = (version, tuple(words), cached)
    if "numpy" in held:
        kind, keys, position, has_gauss, gauss = held["numpy"]
        found["numpy_random_seed"] = (kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss)
    if "torch" in held:
        found["torch_manual_seed"] = held["torch"]
    if "cuda" in held:
        found["torch_cuda_manual_seed"] = [held["cuda"]]
    return found


# FSDP, by torch.distributed.checkpoint


class _LazyPlanner(DefaultSavePlanner):
    """Reads each tensor when it is its turn to be written."""

    def __init__(self, on_progress: Callable[[int], None]) -> None:
        super().__init__()
        self._on_progress = on_progress

    @override
    def resolve_data(self, write_item: WriteItem) -> Any:
        held = super().resolve_data(write_item)
        later = self.later.get(write_item.index.fqn)
        if later is None:
            return held
        tensor = later.tensors[later.name]
        self._on_progress(tensor.numel() * tensor.element_size())
        return tensor

    later: dict[str, _Later]


def write_fsdp(state: ForeignState, out: Path, on_progress: Callable[[int], None]) -> list[str]:
    """Write what `Accelerator.load_state` reads under FSDP with SHARDED_STATE_DICT: folders of DCP.

    Returns:
        What was left, and why.
    """
    out.mkdir(parents=True, exist_ok=True)
    for index, tensors in enumerate(_models(state)):
        names = {**{name: name for name in tensors}, **({} if index else state.ties)}
        _save_dcp({"model": {alias: _Later(tensors, name) for alias, name in names.items()}},
                  out / f"pytorch_model_fsdp_{index}", on_progress)  # fmt: skip
    for index, optimizer in enumerate(state.optimizers):
        states = {
            name: {slot: _Later(tensors, slot) for slot in tensors} | optimizer.numbers.get(name, {})
            for name, tensors in optimizer.slots.items()
        }
        whole = {"state": states, "param_groups": optimizer.groups}
        _save_dcp({"optimizer": whole}, out / f"optimizer_{index}", on_progress)
    _write_rest(state, out)
    return []


def _save_dcp(value: dict[str, Any], folder: Path, on_progress: Callable[[int], None]) -> None:
    """Write one folder from this process alone; torch's own `save` would warn that there is only one."""
    planner, writer = _LazyPlanner(on_progress), FileSystemWriter(folder, single_file_per_rank=True)
    writer.reset(folder)
    promised = _replace(value, lambda later: _on_meta(later))
    planner.set_up_planner(promised, writer.storage_meta(), is_coordinator=True)
    planner.later = {
        name: later for name, path in planner.mappings.items() if isinstance(later := _at(value, path), _Later)
    }
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    (plan,), metadata = planner.create_global_plan([plan])
    planner.finish_plan(plan)
    # The writer keeps what is in a file until the file is closed, so each gets a share, as if from a rank of its own.
    shares = writer.prepare_global_plan([replace(plan, items=items) for items in _shares(plan.items)])
    writer.finish(metadata, [writer.write_data(share, planner).wait() for share in shares])


def _shares(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    shares: list[list[WriteItem]] = [[]]
    filled = 0
    for item in items:
        data = item.tensor_data
        size = 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize
        if shares[-1] and filled + size > _FILE_BYTES:
            shares.append([])
            filled = 0
        shares[-1].append(item)
        filled += size
    return shares


def _on_meta(later: _Later) -> Tensor:
    slot = later.tensors.slot(later.name)
    return torch.empty(slot.shape, dtype=slot.dtype, device="meta")


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


# DeepSpeed's universal layout

_DEEPSPEED_VERSION = "0.19.8"
"""The release whose `ds_to_universal` this layout was compared with."""


def write_deepspeed(state: ForeignState, out: Path, on_progress: Callable[[int], None]) -> list[str]:
    """Write what `engine.load_checkpoint` reads with `checkpoint.load_universal`, at every ZeRO stage from 1 on.

    DeepSpeed's own tool writes one layout for stages 1 and 2 and another for stage 3; what is common to both readers
    is written here, so any stage and any number of ranks reads it.

    Returns:
        What was left, and why.
    """
    models, optimizers = _models(state), state.optimizers or [ForeignOptimizer()]
    if (len(models), len(optimizers)) != (1, 1):
        raise CheckpointError(
            f"{state.folder} holds {len(models)} models and {len(optimizers)} optimizers",
            "One engine of DeepSpeed has one of each",
            "Export each model by itself",
        )
    (tensors,), (optimizer,) = models, optimizers
    outside = [name for name in tensors if Path(name).name != name]
    if outside:
        raise CheckpointError(
            f"A weight is called {outside[0]!r}",
            "Each weight gets a folder of its name, and this one would lie elsewhere",
            "Rename it, or convert to another format",
        )
    folder = out / f"global_step{state.step}_universal"
    (folder / "zero").mkdir(parents=True, exist_ok=True)
    for name in tensors:
        place = folder / "zero" / name
        place.mkdir(exist_ok=True)
        _write_slot(tensors[name].float(), place / "fp32.pt", on_progress)
        held = optimizer.slots.get(name, Tensors())
        for slot in held:
            if slot == "step":
                torch.save(held[slot], place / "step.pt")
            else:
                _write_slot(held[slot], place / f"{slot}.pt", on_progress)
    torch.save(_global_state(optimizer), folder / "zero" / "optimizer_state.pt")
    facts = _facts(state, tensors, optimizer)
    buffers = {name: tensors[name] for name in facts["buffer_names"]}
    torch.save({**facts, "module": buffers}, folder / "mp_rank_00_model_states.pt")
    torch.save({**facts, "module": buffers}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    (out / "latest_universal").write_text(folder.name, encoding="utf-8")
    return _not_in_deepspeed(state, optimizer)


def _write_slot(tensor: Tensor, path: Path, on_progress: Callable[[int], None]) -> None:
    # A view would bring all of the memory that it is a view of.
    torch.save({"param": tensor.clone(), "cat_dim": 0}, path)
    on_progress(tensor.numel() * tensor.element_size())


def _global_state(optimizer: ForeignOptimizer) -> dict[str, Any]:
    """What is the same for all parameters: where stages 1 and 2 look for it, and where stage 3 does."""
    groups = [{**group, "params": [index]} for index, group in enumerate(optimizer.groups)]
    step = torch.tensor(float(optimizer.steps))
    return {
        "param_groups": groups,
        "optimizer_state_dict": {"param_groups": groups, "state": {0: {"step": step}}},
        "ds_version": _DEEPSPEED_VERSION,
        "dynamic_loss_scale": False,
        "overflow": False,
    }


def _facts(state: ForeignState, tensors: Tensors, optimizer: ForeignOptimizer) -> dict[str, Any]:
    shapes = [
        {name: torch.Size(tensors.slot(name).shape) for name in group["params"] if name in tensors.sources}
        for group in optimizer.groups
    ]
    trained = {name for group in shapes for name in group}
    return {
        "buffer_names": [name for name in tensors if name not in trained],
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


def _not_in_deepspeed(state: ForeignState, optimizer: ForeignOptimizer) -> list[str]:
    left = ["DeepSpeed reads only trained parameters from this layout: buffers and frozen ones are in it for others"]
    if len(optimizer.groups) > 1:
        left.append("stage 3 gives every group the options of the first one when it reads this layout")
    if state.generators or state.custom:
        left.append("random generators and custom objects have no place in it")
    return left


WRITERS: Final = {
    "paceline": write_paceline,
    "accelerate": write_accelerate,
    "fsdp": write_fsdp,
    "deepspeed": write_deepspeed,
}
"""What writes each format; each returns sentences about what the format has no place for."""
