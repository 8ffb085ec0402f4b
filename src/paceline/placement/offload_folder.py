"""Weights kept on disk: a file for each, and an index, in the layout that Accelerate reads and writes, too.

```text
folder/
  index.json             {"layer.weight": {"dtype": "float32", "shape": [4, 3]}, …}
  layer.weight.dat       the bytes of the tensor
```

An entry of the index may instead name a safetensors file and a tensor in it: nothing is written twice then.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from paceline.errors import PlacementError
from paceline.placement.tensors import META, Device, as_device, as_dtype
from paceline.placement.weight_file import (
    FileSlice,
    PathFile,
    SafetensorsFile,
    Stamp,
    check_stamp,
    numpy_dtype,
    stamp_of,
    tensor_bytes,
)

__all__ = [
    "OffloadedWeightsLoader",
    "PrefixedDataset",
    "extract_submodules_state_dict",
    "load_offloaded_weight",
    "offload_state_dict",
    "offload_weight",
    "save_offload_index",
]

PathLike = str | os.PathLike[str]
INDEX = "index.json"
# What is compared at a time.
_PIECE = 16 * 2**20


def offload_weight(
    weight: torch.Tensor, weight_name: str, offload_folder: PathLike, index: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Write a weight to a folder.

    Args:
        weight: The weight, on any device that has values.
        weight_name: Its name, from which its file gets its name.
        offload_folder: The folder.
        index: Gets an entry for the weight.

    Returns:
        The index.

    Raises:
        PlacementError: The weight has no values, or the folder cannot be written.
    """
    if weight.device == META:
        raise PlacementError(
            f"{weight_name} is on the meta device, and is to be written to {offload_folder}",
            "It has no values",
            "Load the model's weights first",
        )
    weight = weight.detach().cpu().contiguous()
    with _writing(offload_folder):
        _write_whole(Path(offload_folder, f"{weight_name}.dat"), tensor_bytes(weight).data)
    if index is not None:
        index[weight_name] = {"dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape)}
    return index


@contextmanager
def _writing(folder: PathLike) -> Iterator[None]:
    """Say what to do where a folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise PlacementError(
            f"Offloaded weights cannot be written to {folder}: {error.strerror or error}",
            "Weights on disk are kept there",
            "Name a folder that can be written and has room for them",
        ) from error


def _write_whole(path: Path, content: memoryview) -> None:
    """Write a file that is never there in part.

    A file with this content stays as it is, and another one is replaced instead of being written to: a model, of this
    process or of another one, may be reading it.
    """
    if _has_content(path, content):
        return
    path.parent.mkdir(parents=True, exist_ok=True)  # names of parameters may have a slash
    partial = path.parent / f".{os.getpid()}.{threading.get_ident()}.partial"
    try:
        partial.write_bytes(content)
        try:
            os.link(partial, path)
        except OSError:  # there is a file, or the file system has no links
            if not _has_content(path, content):
                partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _has_content(path: Path, content: memoryview) -> bool:
    """Whether a file has this content."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != content.nbytes:
                return False
            position = 0
            while position < content.nbytes:
                piece = file.read(_PIECE)
                if not piece or piece != content[position : position + len(piece)]:
                    return False
                position += len(piece)
    except FileNotFoundError:
        return False
    return True


def load_offloaded_weight(weight_file: PathLike, weight_info: Mapping[str, Any]) -> torch.Tensor:
    """Return a weight of a folder, whose bytes are read from the disk when they are used.

    Args:
        weight_file: The weight's file.
        weight_info: Its entry in the index.
    """
    return dat_slice(weight_file, weight_info).tensor()


def dat_slice(weight_file: PathLike, weight_info: Mapping[str, Any], stamp: Stamp | None = None) -> FileSlice:
    """Return where a weight of a folder is.

    Args:
        weight_file: The weight's file.
        weight_info: Its entry in the index.
        stamp: The file's, when the model was offloaded; with another one it is not read.
    """
    file = PathFile(Path(weight_file), stamp)
    return FileSlice(file=file, offset=0, dtype=numpy_dtype(weight_info["dtype"]), shape=tuple(weight_info["shape"]))


def read_index(folder: PathLike) -> dict[str, Any]:
    """Return the index of a folder.

    Raises:
        PlacementError: It has none.
    """
    path = Path(folder, INDEX)
    if not path.is_file():
        raise PlacementError(
            f"{folder} has no {INDEX}", "It is not a folder of offloaded weights", "Name one that disk_offload wrote"
        )
    index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return index


def has_index(folder: PathLike | None) -> bool:
    """Whether a folder holds offloaded weights."""
    return folder is not None and Path(folder, INDEX).is_file()


def save_offload_index(index: Mapping[str, Any] | None, offload_folder: PathLike) -> None:
    """Add entries to the index of a folder.

    Args:
        index: The entries; nothing is written if there are none.
        offload_folder: The folder.
    """
    if not index:
        return
    entries = read_index(offload_folder) if has_index(offload_folder) else {}
    entries.update(index)
    with _writing(offload_folder):
        _write_whole(Path(offload_folder, INDEX), memoryview(json.dumps(entries, indent=2).encode()))


def make_folder(folder: PathLike) -> None:
    """Create a folder for offloaded weights, unless it is there.

    Raises:
        PlacementError: It cannot be created.
    """
    with _writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)


def offload_state_dict(save_dir: PathLike, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write a state dict to a folder.

    Args:
        save_dir: The folder; it is created if needed.
        state_dict: The weights by name.
    """
    make_folder(save_dir)
    index: dict[str, Any] = {}
    for name, weight in state_dict.items():
        offload_weight(weight, name, save_dir, index)
    save_offload_index(index, save_dir)


def extract_submodules_state_dict(
    state_dict: Mapping[str, torch.Tensor], submodule_names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return the part of a state dict that belongs to some modules.

    Args:
        state_dict: The weights by name.
        submodule_names: The modules.
    """
    return {
        name: value
        for name, value in state_dict.items()
        if any(name == module or name.startswith(f"{module}.") or not module for module in submodule_names)
    }


class PrefixedDataset(Mapping[str, torch.Tensor]):
    """The weights of one module out of those of a model.

    Args:
        dataset: Weights by full name.
        prefix: What full names have before the names in the module.
    """

    def __init__(self, dataset: Mapping[str, torch.Tensor], prefix: str) -> None:
        self.dataset = dataset
        self.prefix = prefix

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.dataset[f"{self.prefix}{key}"]

    def __iter__(self) -> Iterator[str]:
        return iter([key for key in self.dataset if key.startswith(self.prefix)])

    def __len__(self) -> int:
        return len(self.dataset)


class OffloadedWeightsLoader(Mapping[str, torch.Tensor]):
    """The weights of a model by name, in host memory and on disk.

    Args:
        state_dict: Weights in memory; they win over those on disk.
        save_folder: A folder of offloaded weights.
        index: Its index, or one that names safetensors files; by default the folder's.
        device: Where tensors of safetensors files go when they are read; by default host memory.

    Attributes:
        owns_memory: Weights in memory may be replaced by page-locked ones with the same values.

    Raises:
        PlacementError: There are neither weights nor a folder nor an index; on reading, a file was written again.
    """

    def __init__(
        self,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_folder: PathLike | None = None,
        index: Mapping[str, Any] | None = None,
        device: Device | None = None,
    ) -> None:
        if state_dict is None and save_folder is None and index is None:
            raise PlacementError(
                "OffloadedWeightsLoader() got no weights", "", "Pass state_dict=, save_folder= or index="
            )
        self.state_dict = {} if state_dict is None else state_dict
        self.save_folder = save_folder
        if index is None:
            index = {} if save_folder is None else read_index(save_folder)
        self.index = index
        self.all_keys = list(dict.fromkeys([*self.state_dict, *self.index]))
        self.device = device
        self.owns_memory = False
        self._aliases: dict[str, str] = {}
        self._files: dict[str, SafetensorsFile] = {}
        # Another model may be offloaded to the same folder, or a checkpoint be saved over the one that is in use.
        self._stamps = {path: stamp_of(path) for path in set(map(self._path, index))}

    def __contains__(self, key: object) -> bool:
        return key in self.state_dict or key in self.index or key in self._aliases

    def __getitem__(self, key: str) -> torch.Tensor:
        key = self._aliases.get(key, key)
        if key in self.state_dict:
            return self.state_dict[key]
        info = self.index[key]
        tensor = self._file_slice(key, info)
        weight = tensor.tensor()
        if not _is_linked(info):
            return weight
        if "dtype" in info:
            weight = weight.to(as_dtype(info["dtype"]))
        return weight if self.device is None else weight.to(as_device(self.device))

    def __iter__(self) -> Iterator[str]:
        return iter(self.all_keys)

    def __len__(self) -> int:
        return len(self.all_keys)

    def source(self, key: str) -> torch.Tensor | FileSlice:
        """Return a weight in memory, or where its file has it, without reading it."""
        key = self._aliases.get(key, key)
        if key in self.state_dict:
            return self.state_dict[key]
        return self._file_slice(key, self.index[key])

    def add_alias(self, key: str, known: str) -> None:
        """Let another name lead to a weight."""
        self._aliases[key] = known
        self.all_keys.append(key)

    def replace(self, key: str, tensor: torch.Tensor) -> None:
        """Keep another tensor in place of a weight."""
        key = self._aliases.get(key, key)
        if not isinstance(self.state_dict, dict):
            self.state_dict = dict(self.state_dict)
        self.state_dict[key] = tensor

    def _file_slice(self, key: str, info: Mapping[str, Any]) -> FileSlice:
        path = self._path(key)
        if not _is_linked(info):
            return dat_slice(path, info, self._stamps[path])
        if path not in self._files:
            try:
                self._files[path] = SafetensorsFile(path)
            except FileNotFoundError as error:
                raise PlacementError(
                    f"The checkpoint {path} is gone",
                    f"{key} and other offloaded weights are read from it each time that they are needed",
                    "Keep the checkpoint for as long as the model is used",
                ) from error
        check_stamp(path, self._files[path].file.stamp(), self._stamps[path])
        name = info.get("weight_name", key)
        found = self._files[path].slices().get(name)
        if found is None:
            raise PlacementError(
                f"{path} has no tensor {name!r}",
                "The index of offloaded weights says that it has",
                "Load the checkpoint and offload the model again",
            )
        return found

    def _path(self, key: str) -> str:
        """The file that a weight is in."""
        info = self.index[key]
        return str(info["safetensors_file"]) if _is_linked(info) else str(Path(self.save_folder or "", f"{key}.dat"))


def _is_linked(info: Mapping[str, Any]) -> bool:
    """Whether an entry of an index names a safetensors file."""
    return info.get("safetensors_file") is not None


def source_of(weights: Mapping[str, torch.Tensor], key: str) -> torch.Tensor | FileSlice:
    """Return a weight of any mapping, or where its file has it, without reading it."""
    if isinstance(weights, PrefixedDataset):
        return source_of(weights.dataset, f"{weights.prefix}{key}")
    if isinstance(weights, OffloadedWeightsLoader):
        return weights.source(key)
    return weights[key]
