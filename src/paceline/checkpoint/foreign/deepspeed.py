"""Reading DeepSpeed's folders: ZeRO's partitions of each stage, and the universal layout.

Stages 1 and 2 flatten the parameters of a group and split them into one partition per rank; each rank's file says
which range of which parameter is where. Stage 3 splits every parameter into equal pieces. Stage 0 has torch's own
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
from paceline.checkpoint.portable_state import LazyTensors, PortableOptimizer, PortableState, TensorSource
from paceline.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    _Shapes = Mapping[str, tuple[int, ...]]

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
    """Whether DeepSpeed saved into a folder or its parent."""
    return locate(folder) is not None


def locate(folder: Path) -> Path | None:
    """The folder with the files: this one, the one named in `latest`, or the one of the latest step; else None."""
    if _has_files(folder):
        return folder
    for name in ("latest", "latest_universal"):
        if (folder / name).is_file():
            tag = (folder / name).read_text(encoding="utf-8").strip()
            if "/" not in tag and tag not in ("", ".", "..") and _has_files(folder / tag):
                return folder / tag
    matches = [(_STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir()]
    steps = [(int(matched[1]), path) for matched, path in matches if matched]
    return next((path for _, path in sorted(steps, reverse=True) if _has_files(path)), None)


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(_MODEL.fullmatch(path.name) for path in folder.iterdir())


def read_deepspeed(folder: Path, parameters: Sequence[Sequence[str]] | None = None) -> PortableState:
    """Read what `engine.save_checkpoint` wrote, or what `ds_to_universal` made of it.

    Args:
        folder: The folder saved into, or that of a step in it.
        parameters: The names of the optimizer's parameters, group by group: at stage 0 they are numbered.

    Raises:
        CheckpointError: It cannot be read, or was saved under tensor or pipeline parallelism.
    """
    located = locate(folder)
    if located is None:
        raise CheckpointError(
            f"{folder} holds no checkpoint of DeepSpeed",
            "It has no *_model_states.pt",
            "Name the folder that save_checkpoint wrote",
        )
    models, optimizers = _files(located, _MODEL), _files(located, _OPTIMIZER)
    first = load_pickled(models[0])
    state = PortableState(kind="deepspeed", folder=folder)
    state.step = int(first.get("global_steps") or 0)
    module = _tensors_in(first.get("module") or {})
    state.ties = {str(alias): str(name) for alias, name in dict(first.get("shared_params") or {}).items()}
    if (located / "zero").is_dir():
        state.kind = "deepspeed universal"
        _read_universal(located / "zero", state, first, module)
    elif optimizers:
        _read_zero(state, [load_pickled(path) for path in optimizers], first, models)
    else:
        _read_whole(state, first, models[0], parameters)
    _add_unpartitioned(state, module)
    if first.get("lr_scheduler"):
        state.schedulers.append(dict(first["lr_scheduler"]))
    left = sorted(str(key) for key in set(first) - _KNOWN)
    if left:
        state.notes.append(f"skipped: {', '.join(left)}; client_state belongs to the script that saved it")
    return state


def _tensors_in(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of all ranks, in order of rank."""
    files: dict[int, Path] = {}
    for path in folder.iterdir():
        matched = pattern.fullmatch(path.name)
        if matched is None:
            continue
        if int(matched["tp"]):
            raise CheckpointError(
                f"{folder} holds {path.name}",
                "Its weights are sharded by tensor parallelism, and only the run that saved them knows how",
                "Gather them with the library that sharded them",
            )
        files[int(matched["rank"] or 0)] = path
    missing = sorted(set(range(len(files))) - set(files))
    if missing:
        raise CheckpointError(
            f"{folder} has no file of rank {missing[0]}",
            "A part of the state is missing",
            "Copy the files of all ranks into one folder",
        )
    return [files[rank] for rank in sorted(files)]


def _add_unpartitioned(state: PortableState, module: Mapping[str, Tensor]) -> None:
    """Add buffers, frozen parameters and other tensors that are in no partition."""
    for name, value in module.items():
        if name not in state.weights.sources and name not in state.ties and value.numel():
            state.weights.sources[name] = TensorSource.of(value)


# Stage 0


def _read_whole(
    state: PortableState, first: Mapping[str, Any], path: Path, parameters: Sequence[Sequence[str]] | None
) -> None:
    saved = first.get("optimizer")
    if not isinstance(saved, dict) or "state" not in saved:
        return
    names = own_names(saved) or (list(parameters[0]) if parameters else None)
    if names:
        state.optimizers.append(name_optimizer(saved, names, path))
    else:
        state.notes.append("skipped: the optimizer; stage 0 numbers its parameters, and their names are not known")


# Stages 1, 2 and 3


@dataclass(frozen=True, slots=True)
class _Group:
    """One rank's partitions of one parameter group: flat tensors by slot, and values that are not tensors."""

    flats: dict[str, Tensor]
    numbers: dict[str, Any]


def _read_zero(
    state: PortableState, files: Sequence[Mapping[str, Any]], first: Mapping[str, Any], models: Sequence[Path]
) -> None:
    optimizers = [file["optimizer_state_dict"] for file in files]
    count = optimizers[0].get("partition_count")
    if isinstance(count, (list, tuple)):
        count = max(count)
    if isinstance(count, int) and count != len(files):
        raise CheckpointError(
            f"{state.folder} has the optimizer files of {len(files)} of {count} ranks",
            "A part of every parameter is missing",
            "Copy the files of all machines into one folder",
        )
    shapes = _param_shapes(first)
    if _stage(optimizers[0]) == 3:
        merged = _from_equal_pieces(optimizers, shapes)
        _read_frozen(state, first, models)
    else:
        merged = _from_flat_partitions(optimizers, shapes)
    base = _base_state(optimizers[0])
    state.optimizers.append(merged)
    merged.groups = _named_groups(base.get("param_groups") or [], shapes)
    for name, tensors in merged.slots.items():
        state.weights.sources[name] = tensors.sources.pop("fp32")
        _normalize_step(merged, name, tensors)


def _param_shapes(first: Mapping[str, Any]) -> list[_Shapes]:
    """The shapes of the trained parameters, group by group."""
    return [{str(name): tuple(shape) for name, shape in group.items()} for group in first.get("param_shapes") or []]


def _stage(optimizer: Mapping[str, Any]) -> int:
    stage = optimizer.get("zero_stage")
    if isinstance(stage, Inert):
        stage = stage.args[0] if stage.args else None
    if stage is not None:
        return int(stage)
    return 1


def _base_state(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    saved = optimizer.get("base_optimizer_state", optimizer.get("optimizer_state_dict"))
    if not isinstance(saved, dict) or "state" not in saved:
        raise CheckpointError(
            "The optimizer's state was saved with elastic_checkpoint",
            "The position of its partitions is not recorded",
            "Save with zero_optimization.elastic_checkpoint false, which is the default",
        )
    return saved


def _groups_of(optimizer: Mapping[str, Any]) -> list[_Group]:
    """One rank's partitions, in the order of the groups."""
    fp32 = optimizer.get("single_partition_of_fp32_groups", optimizer.get("fp32_flat_groups"))
    states = _base_state(optimizer)["state"]
    groups = []
    for index, flat in enumerate(fp32 or []):
        values = states.get(index, {})
        flats = {key: value for key, value in _tensors_in(values).items() if value.ndim}
        numbers = {key: value for key, value in values.items() if key not in flats}
        groups.append(_Group({"fp32": flat.reshape(-1), **flats}, numbers))
    return groups


def _from_flat_partitions(optimizers: Sequence[Mapping[str, Any]], shapes: Sequence[_Shapes]) -> PortableOptimizer:
    """Stages 1 and 2: the ranges that each rank's file lists, one rank after another."""
    pieces: dict[str, dict[str, list[Tensor]]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for optimizer in optimizers:
        mappings = optimizer.get("param_slice_mappings")
        if mappings is None:
            raise CheckpointError(
                "The files do not say where each parameter is in its partition",
                f"They are from DeepSpeed {optimizer.get('ds_version', '(version unknown)')}, before 0.8",
                "Convert them with the zero_to_fp32.py in the same folder",
            )
        for group, mapping in zip(_groups_of(optimizer), mappings, strict=True):
            for name, fragment in mapping.items():
                start, numel = int(fragment.fields["start"]), int(fragment.fields["numel"])
                numbers.setdefault(name, group.numbers)
                for slot, flat in group.flats.items():
                    piece = flat.reshape(-1).narrow(0, start, numel)
                    pieces.setdefault(name, {}).setdefault(slot, []).append(piece)
    return _merge(pieces, numbers, shapes)


def _from_equal_pieces(optimizers: Sequence[Mapping[str, Any]], shapes: Sequence[_Shapes]) -> PortableOptimizer:
    """Stage 3: equal pieces of each parameter; the last ones may be padded."""
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
                    piece = flat.reshape(-1).narrow(0, offset, numel)
                    pieces.setdefault(name, {}).setdefault(slot, []).append(piece)
                offset += size
    return _merge(pieces, numbers, shapes)


def _merge(
    pieces: Mapping[str, Mapping[str, list[Tensor]]],
    numbers: Mapping[str, Mapping[str, Any]],
    shapes: Sequence[_Shapes],
) -> PortableOptimizer:
    """Whole tensors of pieces that follow each other, by parameter and slot."""
    merged = PortableOptimizer()
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        slots = pieces.get(name, {})
        incomplete = [slot for slot, parts in slots.items() if sum(part.numel() for part in parts) != prod(shape)]
        if incomplete or not slots:
            raise CheckpointError(
                f"The partitions do not hold all of {name} {shape}",
                f"Incomplete: {', '.join(incomplete) or 'everything'}",
                "Save the checkpoint again",
            )
        merged.slots[name] = LazyTensors({slot: TensorSource.of_pieces(shape, parts) for slot, parts in slots.items()})
        merged.numbers[name] = dict(numbers.get(name, {}))
    return merged


def _normalize_step(optimizer: PortableOptimizer, name: str, tensors: LazyTensors) -> None:
    """Store the step count as the slot `step`, wherever the engine had it."""
    numbers = optimizer.numbers.pop(name, {})
    step = numbers.pop("step", None)
    if step is None:
        step = next((g["step"] for g in optimizer.groups if name in g["params"] and g.get("step") is not None), None)
    if step is not None:
        tensors.sources["step"] = TensorSource.of(torch.tensor(float(step), dtype=torch.float32))
    others = {key: value for key, value in numbers.items() if value is None or isinstance(value, (bool, int, float))}
    if others:
        optimizer.numbers[name] = others


def _named_groups(groups: Sequence[Mapping[str, Any]], shapes: Sequence[_Shapes]) -> list[dict[str, Any]]:
    """The options of each group with its parameters' names; stage 3 may have a group in several parts."""
    counts = [max(1, len(group.get("params") or [])) for group in groups]
    if sum(counts) != len(shapes):
        counts = [1] * len(groups) if len(groups) == len(shapes) else [len(shapes)] + [0] * (len(groups) - 1)
    named, begin = [], 0
    for group, count in zip(groups, counts, strict=True):
        names = [name for part in shapes[begin : begin + count] for name in part]
        named.append({**group, "params": names})
        begin += count
    return named


def _read_frozen(state: PortableState, first: Mapping[str, Any], models: Sequence[Path]) -> None:
    """Read parameters that are not trained: at stage 3 every rank's file has a piece of them."""
    shapes = first.get("frozen_param_shapes") or {}
    if not shapes:
        return
    ranks = [load_pickled(path).get("frozen_param_fragments") or {} for path in models]
    for name, shape in shapes.items():
        size = prod(shape)
        pieces, missing = [], size
        for piece in (rank[name].reshape(-1) for rank in ranks if name in rank):
            # The last pieces are padded.
            pieces.append(piece[: max(0, missing)])
            missing -= piece.numel()
        if missing > 0:
            raise CheckpointError(
                f"{state.folder} does not hold all of {name}",
                f"{missing} of {size} elements are missing",
                "Copy the files of all ranks into one folder",
            )
        state.weights.sources[str(name)] = TensorSource.of_pieces(tuple(shape), pieces)


# The universal layout


def _read_universal(folder: Path, state: PortableState, first: Mapping[str, Any], module: Mapping[str, Tensor]) -> None:
    groups = _param_shapes(first)
    shapes = {name: tuple(value.shape) for name, value in module.items()}
    for group in groups:
        shapes.update(group)
    optimizer = PortableOptimizer()
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        name = path.name
        slots = {file.stem: _universal(file, shapes.get(name)) for file in sorted(path.glob("*.pt"))}
        if "fp32" in slots:
            state.weights.sources[name] = slots.pop("fp32")
        if slots:
            optimizer.slots[name] = LazyTensors(slots)
    if optimizer.slots:
        optimizer.groups = _named_groups(_universal_options(folder), groups)
        for name, tensors in optimizer.slots.items():
            if "step" not in tensors:
                _normalize_step(optimizer, name, tensors)
        state.optimizers.append(optimizer)


def _universal_options(folder: Path) -> list[dict[str, Any]]:
    common = folder / "optimizer_state.pt"
    if common.is_file():
        return load_pickled(common).get("param_groups") or []
    return []


def _universal(path: Path, shape: tuple[int, ...] | None) -> TensorSource:
    saved = load_pickled(path)
    tensor = saved
    if isinstance(saved, dict):
        tensor = saved["param"]
    if path.stem == "step":
        return TensorSource.of(torch.tensor(float(tensor), dtype=torch.float32))
    if shape is not None and tensor.numel() == prod(shape):
        tensor = tensor.view(shape)
    return TensorSource.of(tensor)
