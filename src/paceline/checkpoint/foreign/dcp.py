"""Reading folders of torch.distributed.checkpoint, including those of Accelerate's sharded FSDP states."""

from __future__ import annotations

import pathlib
import pickle
import re
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from typing_extensions import override

from paceline.checkpoint.foreign.pickles import load_pickled_stream
from paceline.checkpoint.format.shards import Slot
from paceline.checkpoint.portable_state import LazyTensors, PortableOptimizer, PortableState, TensorSource
from paceline.errors import CheckpointError, named

if TYPE_CHECKING:
    import io
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from torch.distributed.checkpoint.planner import ReadItem

__all__ = ["DcpFolder", "is_dcp", "read_dcp", "read_optimizer"]

_METADATA = ".metadata"
_DATA_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_LARGEST_METADATA = 4 * 1024**3
_CLASSES: Final[dict[str, tuple[str, ...]]] = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
}  # fmt: skip


def is_dcp(folder: Path) -> bool:
    """Whether a folder is a complete one of torch.distributed.checkpoint."""
    return (folder / _METADATA).is_file()


class _Unpickler(pickle.Unpickler):
    """Builds only the few plain classes of which DCP's metadata consists."""

    @override
    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name in _CLASSES.get(module_name, ()):
            modules = {"torch.distributed.checkpoint.metadata": metadata, "torch.serialization": torch.serialization}
            return getattr(modules.get(module_name, filesystem), global_name)
        if module_name.startswith("pathlib") and global_name in ("PosixPath", "WindowsPath"):
            return pathlib.PurePath
        if (module_name, global_name) == ("torch", "Size"):
            return torch.Size
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), (torch.dtype, torch.layout)):
            return getattr(torch, global_name)
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")


def _read_metadata(folder: Path) -> Metadata:
    path = folder / _METADATA
    try:
        if path.stat().st_size > _LARGEST_METADATA:
            raise pickle.UnpicklingError(f"it is larger than {_LARGEST_METADATA / 1e9:.0f} GB")
        with path.open("rb") as file:
            loaded = _Unpickler(file).load()
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read", str(error), "Save it again with torch.distributed.checkpoint"
        ) from error
    if not isinstance(loaded, Metadata):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__}", "DCP's metadata is a Metadata object", "Save it again"
        )
    names = {str(info.relative_path) for info in (loaded.storage_data or {}).values()}
    wrong = [name for name in names if not _DATA_FILE.fullmatch(name)]
    if not wrong:
        wrong = [f"{name}, which is missing" for name in names if not (folder / name).is_file()]
    if wrong:
        raise CheckpointError(
            f"{path} names {', '.join(wrong[:4])}", "Its data must be in files beside it", "Copy the whole folder again"
        )
    return loaded


class _Reader(filesystem.FileSystemReader):
    """torch's reader, with metadata that was read without running code."""

    def __init__(self, folder: Path, safe_metadata: Metadata) -> None:
        super().__init__(folder)
        self._safe_metadata = safe_metadata

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._safe_metadata


class _Planner(DefaultLoadPlanner):
    """Loads entries that are not tensors without running code."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.values: dict[str, Any] = {}

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        self.values[name] = load_pickled_stream(value, name)


class DcpFolder:
    """One folder, with the paths that entries had in the state dict before it was flattened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = _read_metadata(folder)
        entries = self._metadata.state_dict_metadata
        paths = {}
        if isinstance(self._metadata.planner_data, dict):
            paths = self._metadata.planner_data
        self.paths: dict[str, tuple[Any, ...]] = {name: tuple(paths.get(name, (name,))) for name in entries}

    def is_tensor(self, name: str) -> bool:
        """Whether an entry is a tensor."""
        return isinstance(self._metadata.state_dict_metadata[name], TensorStorageMetadata)

    def source(self, name: str) -> TensorSource:
        """One tensor, assembled from its chunks when it is read."""
        entry = self._metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        slot = Slot(tuple(entry.size), entry.properties.dtype)
        return TensorSource(slot, lambda: self._tensor(name, slot))

    def _tensor(self, name: str, slot: Slot) -> Tensor:
        target = torch.empty(slot.shape, dtype=slot.dtype)
        self._load({name: target})
        return target

    def values(self, names: list[str]) -> dict[str, Any]:
        """Entries that are not tensors."""
        if names:
            return self._load(dict.fromkeys(names))
        return {}

    def _load(self, targets: dict[str, Any]) -> dict[str, Any]:
        reader, planner = _Reader(self.folder, self._metadata), _Planner()
        try:
            planner.set_up_planner(targets, self._metadata, is_coordinator=True)
            reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            plan = reader.prepare_local_plan(planner.create_local_plan())
            (plan,) = reader.prepare_global_plan([plan])
            reader.read_data(plan, planner).wait()
        except (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{self.folder} cannot be read", f"{next(iter(targets))}: {error}", "Copy the folder again"
            ) from error
        return planner.values


def read_dcp(folder: Path) -> PortableState:
    """Read a folder that holds `{"model": …, "optimizer": …}`, or only a model.

    Raises:
        CheckpointError: Something in it cannot be read.
    """
    opened = DcpFolder(folder)
    state = PortableState(kind="dcp", folder=folder)
    weights = _weights(opened)
    state.weights = LazyTensors({weight: opened.source(name) for name, weight in weights.items()})
    in_optimizer = {name for name, path in opened.paths.items() if path[0] == "optimizer" and len(path) > 1}
    if in_optimizer:
        state.optimizers.append(read_optimizer(opened))
    others = [name for name in opened.paths if name not in in_optimizer.union(weights)]
    state.infer_step()
    _read_others(state, opened, others)
    return state


def _weights(opened: DcpFolder) -> dict[str, str]:
    """The entries that are weights of the model, each with its name in the model."""
    tensors = {name: path for name, path in opened.paths.items() if opened.is_tensor(name)}
    if any(path[0] == "model" and len(path) > 1 for path in opened.paths.values()):
        return {name: ".".join(map(str, path[1:])) for name, path in tensors.items() if path[0] == "model"}
    return {name: str(path[0]) for name, path in tensors.items() if len(path) == 1}


def _read_others(state: PortableState, opened: DcpFolder, names: Sequence[str]) -> None:
    """Read the step from entries of neither the model nor the optimizer, and note the others."""
    tensors = [name for name in names if opened.is_tensor(name)]
    other = [name for name in names if name not in tensors]
    step = opened.values(other).get("step")
    if isinstance(step, int):
        state.step = step
    left = [name for name in (*tensors, *other) if name != "step"]
    if left:
        state.notes.append(
            f"skipped: {named(left, 5)}; only entries under 'model' and 'optimizer' have a known meaning"
        )


def read_optimizer(opened: DcpFolder) -> PortableOptimizer:
    """The optimizer state in a folder, nested as torch's `get_optimizer_state_dict` returns it, or flattened."""
    state = PortableOptimizer()
    inside = {name: path[1:] for name, path in opened.paths.items() if path[0] == "optimizer"}
    plain = opened.values([name for name in inside if not opened.is_tensor(name)])
    options: dict[Any, dict[str, Any]] = {}
    for name, path in inside.items():
        section, owner, key = _split_path(path)
        if section == "state" and opened.is_tensor(name):
            state.slots.setdefault(owner, LazyTensors()).sources[key] = opened.source(name)
        elif section == "state":
            state.numbers.setdefault(owner, {})[key] = plain[name]
        elif section == "param_groups":
            value = plain[name] if name in plain else opened.source(name).read()
            if isinstance(value, torch.Tensor):
                value = value.item()
            options.setdefault(owner, {})[key] = value
    state.groups = _groups(options)
    return state


def _split_path(path: tuple[Any, ...]) -> tuple[str, Any, str]:
    """Whether an entry is in `state` or `param_groups`, its parameter or group, and its key."""
    if len(path) == 3:
        return str(path[0]), path[1], str(path[2])
    section, _, rest = ".".join(map(str, path)).partition(".")
    owner, _, key = rest.rpartition(".")
    return section, owner, key


def _groups(options: Mapping[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    if all(isinstance(owner, int) for owner in options):
        return [options[index] for index in sorted(options)]
    # In flattened form every parameter has a copy of its group's options.
    groups: list[dict[str, Any]] = []
    for name, own in options.items():
        group = next((g for g in groups if {k: v for k, v in g.items() if k != "params"} == own), None)
        if group is None:
            groups.append({**own, "params": []})
            group = groups[-1]
        group["params"].append(name)
    return groups
