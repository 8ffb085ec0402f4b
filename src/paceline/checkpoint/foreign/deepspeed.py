"""DeepSpeed's own folders: ZeRO's partitions of each stage, and the universal layout.

Stages 1 and 2 cut the line of a group's parameters into one partition per rank, and each rank's file says which run
of which parameter is where in it. Stage 3 cuts every parameter by itself into equal pieces. Stage 0 keeps torch's own
optimizer state. The universal layout has a folder with whole tensors for each parameter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint.foreign.pickles import Inert, load_pickled
from paceline.checkpoint.foreign.torch_optimizer import name_optimizer, own_names
from paceline.checkpoint.portable_state import ForeignOptimizer, ForeignState, Source, Tensors
from paceline.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

__all__ = ["is_deepspeed", "locate", "read_deepspeed"]

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<tp>\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<tp>\d+)_optim_states\.pt")
_STEP_FOLDER = re.compile(r"global_step(\d+)(?:_universal)?")
_KNOWN = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version",
    "universal_checkpoint_info", "ds_autoep_layers", "autoep_layers", "checkpoint_parallel_dimensions",
}  # fmt: skip


def is_deepspeed(folder: Path) -> bool:
    """Whether a folder is one that DeepSpeed saved into, or one of the folders in it."""
    return locate(folder) is not None


def locate(folder: Path) -> Path | None:
    """The folder with the files: this one, the one that `latest` names, or the one of the latest step."""
    if _has_files(folder):
        return folder
    for name in ("latest", "latest_universal"):
        if (folder / name).is_file():
            tag = (folder / name).read_text(encoding="utf-8").strip()
            if "/" not in tag and tag not in ("", ".", "..") and _has_files(folder / tag):
                return folder / tag
    steps = [(int(m[1]), path) for path in folder.iterdir() if (m := _STEP_FOLDER.fullmatch(path.name))]
    return next((path for _, path in sorted(steps, reverse=True) if _has_files(path)), None)


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(_MODEL.fullmatch(path.name) for path in folder.iterdir())


def read_deepspeed(folder: Path, parameters: Sequence[Sequence[str]] | None = None) -> ForeignState:
    """Read what `engine.save_checkpoint` wrote, or what `ds_to_universal` made of it.

    Args:
        folder: The one saved into, or the one of a step in it.
        parameters: The names of the optimizer's parameters, group by group: at stage 0 they are numbered.

    Raises:
        CheckpointError: It cannot be read, or is cut for tensor or pipeline parallelism.
    """
    found = locate(folder)
    if found is None:
        raise CheckpointError(f"{folder} holds no checkpoint of DeepSpeed", "It has no *_model_states.pt", "")
    models, optimizers = _files(found, _MODEL), _files(found, _OPTIMIZER)
    first = load_pickled(models[0])
    state = ForeignState(kind="deepspeed", folder=folder)
    state.step = int(first.get("global_steps") or 0)
    module = {name: value for name, value in (first.get("module") or {}).items() if isinstance(value, torch.Tensor)}
    state.ties = {str(alias): str(name) for alias, name in dict(first.get("shared_params") or {}).items()}
    if (found / "zero").is_dir():
        state.kind = "deepspeed universal"
        _read_universal(found / "zero", state, first, module)
    elif optimizers:
        _read_zero(state, [load_pickled(path) for path in optimizers], first, models)
    else:
        _read_whole(state, first, models[0], parameters)
    _add_others(state, module)
    if first.get("lr_scheduler"):
        state.schedulers.append(dict(first["lr_scheduler"]))
    left = sorted(str(key) for key in set(first) - _KNOWN)
    if left:
        state.notes.append(f"left: {', '.join(left)}; client_state belongs to the script that saved it")
    return state


def _files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of all ranks, in order of rank."""
    found: dict[int, Path] = {}
    for path in folder.iterdir():
        matched = pattern.fullmatch(path.name)
        if matched is None:
            continue
        if int(matched["tp"]):
            raise CheckpointError(
                f"{folder} holds {path.name}",
                "Its weights are cut for tensor parallelism, in a way that only the run that saved them knows",
                "Gather them with the library that cut them",
            )
        found[int(matched["rank"] or 0)] = path
    missing = sorted(set(range(len(found))) - set(found))
    if missing:
        raise CheckpointError(f"{folder} has no file of rank {missing[0]}", "A part of the state is missing", "")
    return [found[rank] for rank in sorted(found)]


def _add_others(state: ForeignState, module: Mapping[str, Tensor]) -> None:
    """Buffers, frozen parameters and whatever else no partition holds."""
    for name, value in module.items():
        if name not in state.weights.sources and name not in state.ties and value.numel():
            state.weights.sources[name] = Source.of(value)


# Stage 0


def _read_whole(
    state: ForeignState, first: Mapping[str, Any], path: Path, parameters: Sequence[Sequence[str]] | None
) -> None:
    held = first.get("optimizer")
    if not isinstance(held, dict) or "state" not in held:
        return
    names = own_names(held) or (list(parameters[0]) if parameters else None)
    if names:
        state.optimizers.append(name_optimizer(held, names, path))
    else:
        state.notes.append("left: the optimizer; at stage 0 it numbers its parameters, and nothing says their names")


# Stages 1, 2 and 3


@dataclass(frozen=True, slots=True)
class _Group:
    """One rank's partitions of one group: flat tensors by slot, and what is no tensor."""

    flats: dict[str, Tensor]
    numbers: dict[str, Any]


def _read_zero(
    state: ForeignState, files: Sequence[Mapping[str, Any]], first: Mapping[str, Any], models: Sequence[Path]
) -> None:
    optimizers = [file["optimizer_state_dict"] for file in files]
    count = optimizers[0].get("partition_count")
    count = max(count) if isinstance(count, (list, tuple)) else count
    if isinstance(count, int) and count != len(files):
        raise CheckpointError(
            f"{state.folder} has the optimizer files of {len(files)} of {count} ranks",
            "A part of every parameter is missing",
            "Bring the files of all machines together",
        )
    shapes = [{str(name): tuple(shape) for name, shape in group.items()} for group in first["param_shapes"]]
    if _stage(optimizers[0]) == 3:
        found = _pieces(optimizers, shapes)
        _read_frozen(state, first, models)
    else:
        found = _line(optimizers, shapes)
    base = _base(optimizers[0])
    state.optimizers.append(found)
    found.groups = _options(base.get("param_groups") or [], shapes)
    for name, tensors in found.slots.items():
        state.weights.sources[name] = tensors.sources.pop("fp32")
        _even_step(found, name, tensors)


def _stage(optimizer: Mapping[str, Any]) -> int:
    stage = optimizer.get("zero_stage")
    if isinstance(stage, Inert):
        stage = stage.args[0] if stage.args else None
    return int(stage) if stage is not None else 1


def _base(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    held = optimizer.get("base_optimizer_state", optimizer.get("optimizer_state_dict"))
    if not isinstance(held, dict) or "state" not in held:
        raise CheckpointError(
            "The optimizer's state was saved with elastic_checkpoint",
            "Such partitions have no fixed place",
            "Save with zero_optimization.elastic_checkpoint false, which is the default",
        )
    return held


def _groups_of(optimizer: Mapping[str, Any]) -> list[_Group]:
    """One rank's partitions, in the order of the groups."""
    fp32 = optimizer.get("single_partition_of_fp32_groups", optimizer.get("fp32_flat_groups"))
    states = _base(optimizer)["state"]
    found = []
    for index, flat in enumerate(fp32 or []):
        held = states.get(index, {})
        flats = {key: value for key, value in held.items() if isinstance(value, torch.Tensor) and value.ndim}
        numbers = {key: value for key, value in held.items() if key not in flats}
        found.append(_Group({"fp32": flat.reshape(-1), **flats}, numbers))
    return found


def _line(optimizers: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> ForeignOptimizer:
    """Stages 1 and 2: the runs that each rank's file names, one rank after another."""
    pieces: dict[str, dict[str, list[Tensor]]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for optimizer in optimizers:
        places = optimizer.get("param_slice_mappings")
        if places is None:
            raise CheckpointError(
                "The files do not say where each parameter lies in its partition",
                f"They are from DeepSpeed {optimizer.get('ds_version', 'of an old version')}, before 0.8",
                "Convert them with the zero_to_fp32.py beside them",
            )
        for group, runs in zip(_groups_of(optimizer), places, strict=True):
            for name, address in runs.items():
                start, numel = int(address.fields["start"]), int(address.fields["numel"])
                numbers.setdefault(name, group.numbers)
                for slot, flat in group.flats.items():
                    run = flat.reshape(-1).narrow(0, start, numel)
                    pieces.setdefault(name, {}).setdefault(slot, []).append(run)
    return _put_together(pieces, numbers, shapes)


def _pieces(
    optimizers: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, tuple[int, ...]]]
) -> ForeignOptimizer:
    """Stage 3: equal pieces of each parameter, of which the last ones may be filled up."""
    pieces: dict[str, dict[str, list[Tensor]]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for rank, optimizer in enumerate(optimizers):
        for group, params in zip(_groups_of(optimizer), shapes, strict=True):
            offset = 0
            for name, shape in params.items():
                numbers.setdefault(name, group.numbers)
                size = -(-prod(shape) // len(optimizers))
                numel = max(0, min(size, prod(shape) - rank * size))
                for slot, flat in group.flats.items():
                    run = flat.reshape(-1).narrow(0, offset, numel)
                    pieces.setdefault(name, {}).setdefault(slot, []).append(run)
                offset += size
    return _put_together(pieces, numbers, shapes)


def _put_together(
    pieces: Mapping[str, Mapping[str, list[Tensor]]],
    numbers: Mapping[str, Mapping[str, Any]],
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
) -> ForeignOptimizer:
    found = ForeignOptimizer()
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        slots = pieces.get(name, {})
        wrong = [slot for slot, runs in slots.items() if sum(run.numel() for run in runs) != prod(shape)]
        if wrong or not slots:
            raise CheckpointError(
                f"The partitions do not hold all of {name} {shape}", f"{wrong or 'nothing of it'} is incomplete", ""
            )
        found.slots[name] = Tensors({slot: Source.of_pieces(shape, runs) for slot, runs in slots.items()})
        found.numbers[name] = dict(numbers.get(name, {}))
    return found


def _even_step(found: ForeignOptimizer, name: str, tensors: Tensors) -> None:
    """A count of steps is always the slot `step`, wherever the engine has it."""
    numbers = found.numbers.pop(name, {})
    step = numbers.pop("step", None)
    if step is None:
        step = next((g["step"] for g in found.groups if name in g["params"] and g.get("step") is not None), None)
    if step is not None:
        tensors.sources["step"] = Source.of(torch.tensor(float(step), dtype=torch.float32))
    kept = {key: value for key, value in numbers.items() if value is None or isinstance(value, (bool, int, float))}
    if kept:
        found.numbers[name] = kept


def _options(
    groups: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, tuple[int, ...]]]
) -> list[dict[str, Any]]:
    """The groups' options with their parameters' names; stage 3 may keep a group in several parts."""
    counts = [max(1, len(group.get("params") or [])) for group in groups]
    if sum(counts) != len(shapes):
        counts = [1] * len(groups) if len(groups) == len(shapes) else [len(shapes)] + [0] * (len(groups) - 1)
    made, begin = [], 0
    for group, count in zip(groups, counts, strict=True):
        names = [name for part in shapes[begin : begin + count] for name in part]
        made.append({**{key: value for key, value in group.items() if key != "params"}, "params": names})
        begin += count
    return made


def _read_frozen(state: ForeignState, first: Mapping[str, Any], models: Sequence[Path]) -> None:
    """Parameters that are not trained: at stage 3 every rank's file has its piece of them."""
    shapes = first.get("frozen_param_shapes") or {}
    if not shapes:
        return
    ranks = [load_pickled(path).get("frozen_param_fragments") or {} for path in models]
    for name, shape in shapes.items():
        runs = [rank[name].reshape(-1) for rank in ranks]
        size = prod(shape)
        kept, left = [], size
        for run in runs:
            kept.append(run[: max(0, left)])
            left -= run.numel()
        if left > 0:
            raise CheckpointError(f"{state.folder} does not hold all of {name}", f"{left} of {size} are missing", "")
        state.weights.sources[str(name)] = Source.of_pieces(tuple(shape), kept)


# The universal layout


def _read_universal(folder: Path, state: ForeignState, first: Mapping[str, Any], module: Mapping[str, Tensor]) -> None:
    shapes = [{str(name): tuple(shape) for name, shape in group.items()} for group in first.get("param_shapes") or []]
    wanted = {name: shape for group in shapes for name, shape in group.items()}
    found = ForeignOptimizer()
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            continue
        name = path.name
        held = module.get(name)
        shape = wanted.get(name) or (tuple(held.shape) if held is not None else None)
        slots = {file.stem: _universal(file, shape) for file in sorted(path.glob("*.pt"))}
        if "fp32" in slots:
            state.weights.sources[name] = slots.pop("fp32")
        if slots:
            found.slots[name] = Tensors(slots)
    if not found.slots:
        return
    common = folder / "optimizer_state.pt"
    groups = load_pickled(common).get("param_groups") or [] if common.is_file() else []
    found.groups = _options(groups, shapes)
    for name, tensors in found.slots.items():
        if "step" not in tensors:
            _even_step(found, name, tensors)
    state.optimizers.append(found)


def _universal(path: Path, shape: tuple[int, ...] | None) -> Source:
    held = load_pickled(path)
    tensor = held["param"] if isinstance(held, dict) else held
    if path.stem == "step":
        return Source.of(torch.tensor(float(tensor), dtype=torch.float32))
    return Source.of(tensor.view(shape) if shape is not None and tensor.numel() == prod(shape) else tensor)
