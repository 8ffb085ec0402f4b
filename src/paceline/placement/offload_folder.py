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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from paceline.errors import PlacementError
from paceline.placement.tensors import Device, as_device, as_dtype
from paceline.placement.weight_file import FileSlice, PathFile, SafetensorsFile, numpy_dtype, tensor_bytes

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
    """
    weight = weight.detach().cpu().contiguous()
    path = Path(offload_folder, f"{weight_name}.dat")
    with path.open("wb") as file:
        file.write(tensor_bytes(weight).data)
    if index is not None:
        index[weight_name] = {"dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape)}
    return index


def load_offloaded_weight(weight_file: PathLike, weight_info: Mapping[str, Any]) -> torch.Tensor:
    """Return a weight of a folder, whose bytes are read from the disk when they are used.

    Args:
        weight_file: The weight's file.
        weight_info: Its entry in the index.
    """
    return dat_slice(weight_file, weight_info).tensor()


def dat_slice(weight_file: PathLike, weight_info: Mapping[str, Any]) -> FileSlice:
    """Return where a weight of a folder is."""
    file = PathFile(Path(weight_file))
    return FileSlice(file=file, offset=0, dtype=numpy_dtype(weight_info["dtype"]), shape=tuple(weight_info["shape"]))


def read_index(folder: PathLike) -> dict[str, Any]:
    """Return the index of a folder.

    Raises:
        PlacementError: It has none.
    """
    path = Path(folder, INDEX)
    if not path.is_file():
        raise PlacementError(f"{folder} has no {INDEX}", "It is no folder of offloaded weights")
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
    path = Path(offload_folder, INDEX)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(entries, indent=2), encoding="utf-8")
    partial.replace(path)


def offload_state_dict(save_dir: PathLike, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write a state dict to a folder.

    Args:
        save_dir: The folder; it is created if needed.
        state_dict: The weights by name.
    """
    Path(save_dir).mkdir(parents=True, exist_ok=True)
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
        PlacementError: There are neither weights nor a folder nor an index.
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
        self._files: dict[str, SafetensorsFile] = {}

    def __getitem__(self, key: str) -> torch.Tensor:
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
        if key in self.state_dict:
            return self.state_dict[key]
        return self._file_slice(key, self.index[key])

    def replace(self, key: str, tensor: torch.Tensor) -> None:
        """Keep another tensor with the same values."""
        self.state_dict = {**self.state_dict, key: tensor} if not isinstance(self.state_dict, dict) else self.state_dict
        self.state_dict[key] = tensor

    def _file_slice(self, key: str, info: Mapping[str, Any]) -> FileSlice:
        if not _is_linked(info):
            assert self.save_folder is not None
            return dat_slice(Path(self.save_folder, f"{key}.dat"), info)
        path = info["safetensors_file"]
        if path not in self._files:
            self._files[path] = SafetensorsFile(path)
        name = info.get("weight_name", key)
        found = self._files[path].slices().get(name)
        if found is None:
            raise PlacementError(f"{path} has no tensor {name!r}", "The index of offloaded weights says that it has")
        return found


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
