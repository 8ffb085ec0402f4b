"""Folders that torch.distributed.checkpoint wrote: plain ones, and those of Accelerate's sharded FSDP states."""

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
from paceline.checkpoint.portable_state import ForeignOptimizer, ForeignState, Source, Tensors
from paceline.errors import CheckpointError

if TYPE_CHECKING:
    import io
    from collections.abc import Mapping
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
    """Whether torch.distributed.checkpoint has written a folder to its end."""
    return (folder / _METADATA).is_file()


class _Unpickler(pickle.Unpickler):
    """Makes the few plain classes of which DCP's metadata consists."""

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
            raise pickle.UnpicklingError("it is larger than any such file can be")
        with path.open("rb") as file:
            found = _Unpickler(file).load()
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read", str(error), "It is not what torch.distributed.checkpoint writes"
        ) from error
    wrong = [] if isinstance(found, Metadata) else ["another kind of object"]
    if not wrong:
        names = {str(info.relative_path) for info in (found.storage_data or {}).values()}
        wrong = [name for name in names if not _DATA_FILE.fullmatch(name)]
        wrong += [f"{name}, which is missing" for name in names if not wrong and not (folder / name).is_file()]
    if wrong:
        raise CheckpointError(f"{path} names {', '.join(wrong[:4])}", "Its data must lie in files beside it", "")
    return found  # type: ignore[no-any-return]


class _Reader(filesystem.FileSystemReader):
    """torch's reader, given metadata that was read safely."""

    def __init__(self, folder: Path, found: Metadata) -> None:
        super().__init__(folder)
        self._found = found

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._found


class _Planner(DefaultLoadPlanner):
    """Loads what is no tensor without running it."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.values: dict[str, Any] = {}

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        self.values[name] = load_pickled_stream(value, name)


class DcpFolder:
    """One folder, with the names that its state dict had before it was flattened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = _read_metadata(folder)
        entries = self._metadata.state_dict_metadata
        paths = self._metadata.planner_data if isinstance(self._metadata.planner_data, dict) else {}
        self.paths: dict[str, tuple[Any, ...]] = {name: tuple(paths.get(name, (name,))) for name in entries}

    def is_tensor(self, name: str) -> bool:
        """Whether an entry is a tensor."""
        return isinstance(self._metadata.state_dict_metadata[name], TensorStorageMetadata)

    def source(self, name: str) -> Source:
        """One tensor, put together from its chunks when it is read."""
        held = self._metadata.state_dict_metadata[name]
        assert isinstance(held, TensorStorageMetadata)
        slot = Slot(tuple(held.size), held.properties.dtype)
        return Source(slot, lambda: self._tensor(name, slot))

    def _tensor(self, name: str, slot: Slot) -> Tensor:
        target = torch.empty(slot.shape, dtype=slot.dtype)
        self._load({name: target})
        return target

    def values(self, names: list[str]) -> dict[str, Any]:
        """Entries that are no tensors."""
        return self._load(dict.fromkeys(names)) if names else {}

    def _load(self, targets: dict[str, Any]) -> dict[str, Any]:
        reader, planner = _Reader(self.folder, self._metadata), _Planner()
        try:
            planner.set_up_planner(targets, self._metadata, is_coordinator=True)
            reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            plan = reader.prepare_local_plan(planner.create_local_plan())
            (plan,) = reader.prepare_global_plan([plan])
            reader.read_data(plan, planner).wait()
        except (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self.folder} cannot be read", f"{next(iter(targets))}: {error}", "") from error
        return planner.values


def read_dcp(folder: Path) -> ForeignState:
    """Read a folder that holds `{"model": …, "optimizer": …}`, or a model alone.

    Raises:
        CheckpointError: Something in it cannot be read.
    """
    opened = DcpFolder(folder)
    state = ForeignState(kind="dcp", folder=folder)
    rooted = any(path[0] == "model" and len(path) > 1 for path in opened.paths.values())
    others: list[str] = []
    values: list[str] = []
    for name, path in opened.paths.items():
        if path[0] == "optimizer" and len(path) > 1:
            continue
        if opened.is_tensor(name) and (path[0] == "model" if rooted else len(path) == 1):
            state.weights.sources[".".join(map(str, path[1:] if rooted else path))] = opened.source(name)
        else:
            (others if opened.is_tensor(name) else values).append(name)
    if any(path[0] == "optimizer" and len(path) > 1 for path in opened.paths.values()):
        state.optimizers.append(read_optimizer(opened))
    found = opened.values(values)
    state.settle_step()
    if isinstance(found.get("step"), int):
        state.step = found["step"]
    left = [name for name in (*others, *values) if name != "step"]
    if left:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        state.notes.append(f"left: {shown}; only entries under 'model' and 'optimizer' have a known meaning")
    return state


def read_optimizer(opened: DcpFolder) -> ForeignOptimizer:
    """The optimizer of a folder, nested as torch's `get_optimizer_state_dict` gives it, or flattened."""
    state = ForeignOptimizer()
    inside = {name: path[1:] for name, path in opened.paths.items() if path[0] == "optimizer"}
    plain = opened.values([name for name in inside if not opened.is_tensor(name)])
    options: dict[Any, dict[str, Any]] = {}
    for name, path in inside.items():
        where, owner, key = _place(path)
        if where == "state" and opened.is_tensor(name):
            state.slots.setdefault(owner, Tensors()).sources[key] = opened.source(name)
        elif where == "state":
            state.numbers.setdefault(owner, {})[key] = plain[name]
        elif where == "param_groups":
            value = plain[name] if name in plain else opened.source(name).read()
            options.setdefault(owner, {})[key] = value.item() if isinstance(value, torch.Tensor) else value
    state.groups = _groups(options)
    return state


def _place(path: tuple[Any, ...]) -> tuple[str, Any, str]:
    """Which of `state` and `param_groups` an entry is in, whose it is, and what it is called."""
    if len(path) == 3:
        return str(path[0]), path[1], str(path[2])
    where, _, rest = ".".join(map(str, path)).partition(".")
    owner, _, key = rest.rpartition(".")
    return where, owner, key


def _groups(options: Mapping[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    if all(isinstance(owner, int) for owner in options):
        return [options[index] for index in sorted(options)]
    # Flattened, every parameter has the options of its group.
    groups: list[dict[str, Any]] = []
    for name, held in options.items():
        group = next((g for g in groups if {k: v for k, v in g.items() if k != "params"} == held), None)
        if group is None:
            groups.append({**held, "params": []})
            group = groups[-1]
        group["params"].append(name)
    return groups
