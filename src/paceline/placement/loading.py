"""Checkpoints into models: straight from the files to where each weight belongs."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paceline.errors import PlacementError, counted
from paceline.placement.device_map import (
    check_devices,
    check_tied_parameters_on_same_device,
    device_of,
    warn_if_untied,
)
from paceline.placement.offload_folder import load_offloaded_weight, make_folder, offload_weight, save_offload_index
from paceline.placement.offloaded_state import refuse_offloaded
from paceline.placement.tensors import (
    META,
    Device,
    as_device,
    as_dtype,
    check_shape,
    find_owner,
    find_tied_parameters,
    is_extra_state,
    is_number_kept,
    retie_parameters,
    set_module_tensor_to_device,
    shortened,
)
from paceline.placement.transfer import DeviceQueue, Transfer, Transfers, pack
from paceline.placement.weight_file import FileSlice, SafetensorsFile

__all__ = ["checkpoint_files", "load_checkpoint_in_model", "load_offloaded_weights", "load_state_dict"]

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
_WHOLE = ("pytorch_model.bin", "model.safetensors")
_INDEX = ".index.json"
# Of weights on their way to devices at one time.
_BYTES_ON_THE_WAY = 2**30


def checkpoint_files(checkpoint: PathLike) -> list[Path]:
    """Return the files of a checkpoint.

    Args:
        checkpoint: A file of weights, the index of a sharded checkpoint, or a folder with either.

    Raises:
        PlacementError: It is none of these.
    """
    path = Path(checkpoint)
    if path.is_file():
        return _indexed_files(path) if path.suffix == ".json" else [path]
    if not path.is_dir():
        raise PlacementError(
            f"The checkpoint {path} does not exist", "", "Name a file of weights, an index, or a folder with either"
        )
    for name in _WHOLE:
        if (path / name).is_file():
            return [path / name]
    indices = sorted(each for each in path.iterdir() if each.name.endswith(_INDEX))
    if len(indices) != 1:
        names = ", ".join(each.name for each in indices) or "none"
        raise PlacementError(
            f"The folder {path} has neither {' nor '.join(_WHOLE)}, and of indices (*{_INDEX}): {names}",
            "It must have exactly one index then",
            "Name the file or the index instead of the folder",
        )
    return _indexed_files(indices[0])


def _indexed_files(index: Path) -> list[Path]:
    todo = 'It must be JSON such as {"weight_map": {"layer.weight": "model-1.safetensors"}}'
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlacementError(f"The index {index} cannot be read: {error}", "It is not JSON", todo) from error
    names = entries.get("weight_map", entries) if isinstance(entries, dict) else entries
    if not names or not isinstance(names, dict) or not all(isinstance(each, str) for each in names.values()):
        raise PlacementError(f"The index {index} names no files of weights", "There is nothing to load", todo)
    files = [index.parent / name for name in sorted(set(names.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise PlacementError(
            f"The index {index} names files that are not beside it: {shortened(absent)}",
            "The weights in them cannot be loaded",
            "Fetch them, or the whole checkpoint again",
        )
    return files


def load_state_dict(
    checkpoint_file: PathLike, device_map: Mapping[str, Device] | None = None
) -> dict[str, torch.Tensor]:
    """Read a file of weights, in the format of safetensors or torch's own.

    Args:
        checkpoint_file: The file.
        device_map: Devices by name of a module, for safetensors; the rest, and what belongs on disk, goes to the CPU.

    Raises:
        PlacementError: It is a safetensors file of another framework.
    """
    path = Path(checkpoint_file)
    if path.suffix != ".safetensors":
        return _load_pickle(path)
    reader = SafetensorsFile(path)
    slices = reader.slices()
    _check_framework(path, reader.metadata)
    weights = {name: each.tensor(reader.mapped) for name, each in slices.items()}
    placed = {}
    for name, weight in weights.items():
        device = _device_or_cpu(name, device_map or {})
        placed[name] = weight if device.type == "cpu" else weight.to(device)
    return placed


def _device_or_cpu(name: str, device_map: Mapping[str, Device]) -> torch.device:
    try:
        device = device_of(name, device_map)
    except PlacementError:
        device = "cpu"
    return torch.device("cpu") if device == "disk" else as_device(device)


def _check_framework(path: Path, metadata: Mapping[str, str] | None) -> None:
    framework = (metadata or {}).get("format", "pt")
    if framework != "pt":
        raise PlacementError(
            f"{path} was written for the framework {framework!r}",
            "Its tensors may be laid out in another way",
            "Name a file that was saved for PyTorch, whose metadata says format: pt",
        )


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    todo = "Name a file that torch.save(model.state_dict()) wrote, or a safetensors file"
    try:
        weights: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise PlacementError(
            f"{path} cannot be read as weights: {why}",
            "It is damaged, a pointer of Git LFS (a small text file), or a pickle of other objects than tensors, which "
            "could run code on loading",
            todo,
        ) from error
    if not isinstance(weights, Mapping) or not all(map(_is_state, weights, weights.values())):
        kind = type(weights).__name__
        inside = f" with {shortened([str(name) for name in weights])}" if isinstance(weights, Mapping) else ""
        raise PlacementError(f"{path} holds a {kind}{inside}", "It must hold tensors by name, and nothing else", todo)
    return dict(weights)


def _is_state(name: object, value: object) -> bool:
    return isinstance(value, torch.Tensor) or is_extra_state(str(name))


def load_offloaded_weights(model: nn.Module, index: Mapping[str, Any] | None, offload_folder: PathLike) -> None:
    """Load weights of a folder of offloaded weights into a model, in host memory.

    Args:
        model: The model.
        index: The entries of the weights; nothing is loaded if there are none.
        offload_folder: The folder.
    """
    for name, info in (index or {}).items():
        weight = load_offloaded_weight(Path(offload_folder, f"{name}.dat"), info)
        set_module_tensor_to_device(model, name, "cpu", value=weight.clone())


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: PathLike,
    device_map: Mapping[str, Device] | None = None,
    offload_folder: PathLike | None = None,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool | None = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Sequence[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> None:
    """Load a checkpoint into a model, each weight straight to its device.

    Weights of safetensors files that belong on disk are not written again: `offload_folder/index.json` says where they
    are. Those of host memory are read from the disk when they are first used. Collective if `broadcast_from_rank0`.

    Args:
        model: The model, which may be on the meta device.
        checkpoint: A file of weights, the index of a sharded checkpoint, or a folder with either.
        device_map: Devices by name of a module; by default weights go where the model has them.
        offload_folder: Where weights that belong on disk are listed, or written if they are in no safetensors file.
        dtype: What floating-point weights are converted to, with a `device_map`; by default they become what the model
            has.
        offload_state_dict: Accepted, and without effect: a checkpoint's weights take host memory only where they stay.
        offload_buffers: Buffers of modules on disk stay there, too.
        keep_in_fp32_modules: Names of modules whose weights become float32 where `dtype` is float16.
        offload_8bit_bnb: Not supported.
        strict: Names that the checkpoint lacks, or has too many, are an error.
        full_state_dict: The checkpoint has whole tensors, also where the model's are sharded.
        broadcast_from_rank0: Rank 0 reads and sends the weights to the others.

    Raises:
        PlacementError: The checkpoint does not fit, or an argument is missing.
    """
    if offload_8bit_bnb:
        raise PlacementError(
            "offload_8bit_bnb=True was given",
            "An 8-bit weight of bitsandbytes is numbers with their scales, and tensors are offloaded singly",
            "Load the model with transformers' from_pretrained and its BitsAndBytesConfig, or with another dtype",
        )
    files = checkpoint_files(checkpoint)
    ties = find_tied_parameters(model)
    warn_if_untied(model, ties)
    if device_map is None:
        if dtype is not None:
            logger.warning("dtype=%s has no effect without device_map: weights keep the model's dtypes.", dtype)
        unexpected = _load_in_place(model, files, ties, strict, full_state_dict, broadcast_from_rank0)
    else:
        check_devices(device_map)
        check_tied_parameters_on_same_device(ties, device_map)
        loading = _Loading(model, device_map, offload_folder, dtype, offload_buffers, keep_in_fp32_modules or (), ties)
        for file in files:
            loading.load(file)
        loading.place_tied()
        loading.finish()
        unexpected = loading.unexpected
        _report_missing(model, loading.loaded, ties, strict)
    if unexpected:
        _report_unexpected(checkpoint, model, unexpected, strict)
    retie_parameters(model, ties)


def _report_unexpected(checkpoint: PathLike, model: nn.Module, names: set[str], strict: bool) -> None:
    kind = type(model).__name__
    text = f"{', '.join(sorted(names))} of the checkpoint {checkpoint} were not used when {kind} was loaded"
    if strict:
        raise PlacementError(
            text, "strict=True was given, and the model has no such weights", "Build the model that was saved"
        )
    logger.warning("%s: the model has no such weights.", text)


def _report_missing(model: nn.Module, loaded: Iterable[str], ties: Sequence[Sequence[str]], strict: bool) -> None:
    """Tell which weights of the model no file had."""
    found = set(loaded)
    for group in ties:
        if found & set(group):
            found |= set(group)
    names = set(model.state_dict())
    missing = sorted(names - found)
    if not missing:
        return
    text = f"The checkpoint has no {', '.join(missing)}"
    if strict:
        raise PlacementError(text, "strict=True was given, and the model needs them", "Load a checkpoint of this model")
    if not found & names:
        raise PlacementError(
            f"The checkpoint has none of the {counted(len(names), 'weight')} of {type(model).__name__}, such as "
            f"{missing[0]}",
            "It is that of another model, or its names have another prefix",
            "Compare its names with those of model.state_dict()",
        )
    logger.warning("%s: the model keeps its own values there.", text)


def _load_in_place(
    model: nn.Module,
    files: Sequence[Path],
    ties: Sequence[Sequence[str]],
    strict: bool,
    full_state_dict: bool,
    broadcast_from_rank0: bool,
) -> set[str]:
    """Load into the tensors that the model has; return the names that it does not have."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    names = set(model.state_dict())
    devices = {tensor.device for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor)}
    found: set[str] = set()
    for file in files:
        reads = not broadcast_from_rank0 or torch.distributed.get_rank() == 0
        weights: dict[str, Any] = dict(load_state_dict(file)) if reads else {}
        refuse_offloaded(model, weights)
        found |= set(weights)
        # A file may be one of several: what is missing is known after the last one.
        if META in devices and not torch.distributed.is_initialized():
            _load_into_host_memory(model, weights)
        elif len(devices - {META}) <= 1:
            options = StateDictOptions(
                full_state_dict=full_state_dict, strict=False, broadcast_from_rank0=broadcast_from_rank0
            )
            set_model_state_dict(model, weights, options=options)
        else:
            model.load_state_dict(weights, strict=False)
    if broadcast_from_rank0:
        known = [found]
        torch.distributed.broadcast_object_list(known, src=0)
        found = known[0]
    _report_missing(model, found, ties, strict)
    return found - names


def _load_into_host_memory(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load into a model on the meta device: its tensors get memory."""
    places = model.state_dict()
    for name, value in weights.items():
        if name in places and is_extra_state(name):
            _set_extra_state(model, name, value)
        elif name in places:
            check_shape(places[name], value.shape, name)
            device = "cpu" if places[name].device == META else places[name].device
            set_module_tensor_to_device(model, name, device, value=value)


def _set_extra_state(model: nn.Module, name: str, value: Any) -> None:
    """Give a module what it had added to the state dict."""
    owner = model.get_submodule(name.rpartition(".")[0])
    owner.set_extra_state(_as_tensor(value).clone() if isinstance(value, (FileSlice, torch.Tensor)) else value)


class _Loading:
    """Loads files into a model, tensor by tensor."""

    def __init__(
        self,
        model: nn.Module,
        device_map: Mapping[str, Device],
        offload_folder: PathLike | None,
        dtype: str | torch.dtype | None,
        offload_buffers: bool,
        keep_in_fp32: Sequence[str],
        ties: Sequence[Sequence[str]],
    ) -> None:
        on_disk = [name or type(model).__name__ for name, device in device_map.items() if device == "disk"]
        if on_disk:
            if offload_folder is None:
                raise PlacementError(
                    f"device_map puts {shortened(on_disk)} on disk",
                    "There is no folder for them",
                    "Pass offload_folder=, or more memory in max_memory=",
                )
            make_folder(offload_folder)
        self._model = model
        self._device_map = device_map
        self._folder = offload_folder
        self._dtype = None if dtype is None else as_dtype(dtype)
        self._keep_in_fp32 = keep_in_fp32
        self._names = set(model.state_dict())
        self._on_disk_allowed = self._names - (
            set() if offload_buffers else {name for name, _ in model.named_buffers()}
        )
        self._index: dict[str, Any] = {}
        self.loaded: set[str] = set()
        self._ties = ties
        self._tied = {name for group in ties for name in group}
        self._sources: dict[str, tuple[torch.Tensor | FileSlice, Path, torch.Tensor | None]] = {}
        self._copies = _DeviceCopies(model)
        self.unexpected: set[str] = set()

    def load(self, path: Path) -> None:
        """Load one file."""
        weights = list(self._weights(path))
        refuse_offloaded(self._model, [name for name, _, _ in weights])
        for name, value, scales in weights:
            if name not in self._names:
                self.unexpected.add(name)
                continue
            self.loaded.add(name)
            if is_extra_state(name):
                _set_extra_state(self._model, name, value)
                continue
            self._place(name, value, path, scales)
            if name in self._tied:
                self._sources[name] = (value, path, scales)

    def place_tied(self) -> None:
        """Place a tied weight under the names that no file had, where these are not beside one that it had."""
        for group in self._ties:
            found = next((name for name in group if name in self._sources), None)
            if found is None:
                continue
            here = device_of(found, self._device_map)
            for name in group:
                is_retied = here != "disk" and device_of(name, self._device_map) == here
                if name not in self._sources and not is_retied:
                    self._place(name, *self._sources[found], stored_as=found)

    def _weights(self, path: Path) -> Iterator[tuple[str, torch.Tensor | FileSlice, torch.Tensor | None]]:
        """The weights of a file: tensors, or where the file has them."""
        if path.suffix == ".safetensors":
            reader = SafetensorsFile(path)
            found: Mapping[str, torch.Tensor | FileSlice] = reader.slices()
            _check_framework(path, reader.metadata)
        else:
            found = _load_pickle(path)
        for name, value in found.items():
            if "SCB" not in name:
                scales = found.get(name.replace("weight", "SCB")) if "weight" in name else None
                is_scaled = not is_extra_state(name) and value.dtype == torch.int8
                yield name, value, _as_tensor(scales) if is_scaled and scales is not None else None

    def _place(
        self,
        name: str,
        value: torch.Tensor | FileSlice,
        path: Path,
        scales: torch.Tensor | None,
        stored_as: str | None = None,
    ) -> None:
        check_shape(self._tensor(name), value.shape, name)
        device = device_of(name, self._device_map)
        dtype = self._target_dtype(name, value.dtype)
        if device == "disk":
            if name in self._on_disk_allowed:
                self._leave_on_disk(name, value, path, dtype, stored_as or name)
                return
            device = "cpu"
        if isinstance(value, FileSlice) and self._copies.takes(name, value, device):
            self._copies.add(name, value, as_device(device), dtype)
            return
        set_module_tensor_to_device(
            self._model, name, device, value=_as_tensor(value), dtype=dtype, fp16_statistics=scales
        )

    def _tensor(self, name: str) -> torch.Tensor:
        """What the model has under a name."""
        owner, last = find_owner(self._model, name)
        found: torch.Tensor = getattr(owner, last)
        return found

    def _target_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype | None:
        """What a weight is converted to; None for what the model has."""
        if self._dtype is None or is_number_kept(dtype):
            return self._dtype
        is_kept = any(f"{key}." in name or key == name for key in self._keep_in_fp32)
        return torch.float32 if is_kept and self._dtype == torch.float16 else self._dtype

    def _leave_on_disk(
        self, name: str, value: torch.Tensor | FileSlice, path: Path, dtype: torch.dtype | None, stored_as: str
    ) -> None:
        """List where a weight is, or write it to the folder."""
        assert self._folder is not None
        kept = self._tensor(name).dtype
        if dtype is not None:
            kept = value.dtype if is_number_kept(value.dtype) else dtype
        set_module_tensor_to_device(self._model, name, META, dtype=kept)
        if isinstance(value, torch.Tensor):
            offload_weight(value.to(kept), name, self._folder, self._index)
            return
        self._index[name] = {
            "safetensors_file": str(path.resolve()),
            "weight_name": stored_as,
            "dtype": str(kept).removeprefix("torch."),
            "shape": list(value.shape),
        }

    def finish(self) -> None:
        """Wait for the copies, and write the index of the weights on disk."""
        self._copies.finish()
        if self._folder is not None:
            save_offload_index(self._index, self._folder)


def _as_tensor(value: torch.Tensor | FileSlice) -> torch.Tensor:
    return value.tensor() if isinstance(value, FileSlice) else value


class _DeviceCopies:
    """Weights on their way from files to accelerators: read by several threads, copied beside each other."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._transfers = Transfers()
        self._queues: dict[torch.device, DeviceQueue] = {}
        self._waiting: list[tuple[str, torch.Tensor, Transfer, torch.device, torch.dtype | None]] = []
        self._bytes = 0

    def takes(self, name: str, value: FileSlice, device: Device) -> bool:
        """Whether a weight is plain memory that goes to an accelerator."""
        if value.nbytes == 0 or as_device(device).type != "cuda":
            return False
        owner = self._model.get_submodule(name.rpartition(".")[0])
        place = owner._parameters.get(name.rpartition(".")[2])
        return place is None or type(place) is nn.Parameter

    def add(self, name: str, value: FileSlice, device: torch.device, dtype: torch.dtype | None) -> None:
        """Begin to copy a weight."""
        if device not in self._queues:
            self._queues[device] = DeviceQueue(device)
        queue = self._queues[device]
        segments, _ = pack([value])
        block = torch.empty(value.nbytes, dtype=torch.uint8, device=device)
        queue.wait_for(queue.mark_computation())  # the memory may have served something else
        transfer = self._transfers.start(segments, queue, block)
        self._waiting.append((name, segments[0].view(block), transfer, device, dtype))
        self._bytes += value.nbytes
        while self._bytes > _BYTES_ON_THE_WAY:
            self._take_one()

    def _take_one(self) -> None:
        """Wait for the oldest copy, and put it into the model."""
        name, tensor, transfer, device, dtype = self._waiting.pop(0)
        transfer.wait()
        self._bytes -= tensor.nbytes
        set_module_tensor_to_device(self._model, name, device, value=tensor, dtype=dtype)

    def finish(self) -> None:
        """Wait for all copies."""
        while self._waiting:
            self._take_one()
