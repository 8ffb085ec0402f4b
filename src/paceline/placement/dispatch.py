"""Models spread over devices, host memory and disk."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from paceline.errors import OffloadedModelError, PlacementError
from paceline.placement.alignment import (
    AlignDevicesHook,
    attach_align_device_hook,
    attach_align_device_hook_on_blocks,
)
from paceline.placement.device_map import check_device_map, infer_auto_device_map
from paceline.placement.hooks import GUARDED_METHODS, add_hook_to_module
from paceline.placement.loading import load_checkpoint_in_model
from paceline.placement.offload_folder import (
    OffloadedWeightsLoader,
    extract_submodules_state_dict,
    has_index,
    offload_state_dict,
)
from paceline.placement.sizes import compute_module_sizes, get_balanced_memory
from paceline.placement.streaming import WeightStream
from paceline.placement.tensors import (
    META,
    Device,
    TiedParameters,
    as_device,
    find_owner,
    find_tied_parameters,
    remember_tied,
    retie_parameters,
)

__all__ = ["cpu_offload", "disk_offload", "dispatch_model", "load_checkpoint_and_dispatch"]

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
# What weights on the way may take of the main device: this many of the largest offloaded blocks, and some bytes, so
# that small ones are on the way even while the largest is in use.
_BLOCKS_AHEAD = 1.25
_BYTES_AHEAD = 64 * 2**20
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def cpu_offload(
    model: nn.Module,
    execution_device: Device | None = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    *,
    stream: WeightStream | None = None,
) -> nn.Module:
    """Keep all weights of a model in host memory, and bring each layer's to a device while it runs.

    Args:
        model: The model.
        execution_device: The device; by default the one that the model is on.
        offload_buffers: Offload buffers, too.
        state_dict: The weights in host memory; by default the model's.
        preload_module_classes: Classes of modules that use the weights of modules inside them without calling these.
        stream: Brings the weights ahead of need; by default a new one.

    Returns:
        The model.
    """
    if state_dict is None:
        state_dict = {name: tensor.to("cpu") for name, tensor in model.state_dict().items()}
    weights = OffloadedWeightsLoader(state_dict=dict(state_dict))
    weights.owns_memory = True
    return _offload(model, weights, execution_device, offload_buffers, preload_module_classes, stream)


def disk_offload(
    model: nn.Module,
    offload_dir: PathLike,
    execution_device: Device | None = None,
    offload_buffers: bool = False,
    preload_module_classes: Sequence[str] | None = None,
    *,
    stream: WeightStream | None = None,
) -> nn.Module:
    """Keep all weights of a model on disk, and bring each layer's to a device while it runs.

    Args:
        model: The model.
        offload_dir: The folder. If it has an index already, the weights are those in it.
        execution_device: The device; by default the one that the model is on.
        offload_buffers: Offload buffers, too.
        preload_module_classes: Classes of modules that use the weights of modules inside them without calling these.
        stream: Brings the weights ahead of need; by default a new one.

    Returns:
        The model.
    """
    if not has_index(offload_dir):
        offload_state_dict(offload_dir, model.state_dict())
    weights = OffloadedWeightsLoader(save_folder=offload_dir)
    return _offload(model, weights, execution_device, offload_buffers, preload_module_classes, stream)


def _offload(
    model: nn.Module,
    weights: OffloadedWeightsLoader,
    device: Device | None,
    offload_buffers: bool,
    preload: Sequence[str] | None,
    stream: WeightStream | None,
) -> nn.Module:
    device = next(model.parameters()).device if device is None else device
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True), append=True)
    attach_align_device_hook(
        model,
        device,
        True,
        weights,
        offload_buffers,
        preload_module_classes=preload,
        stream=stream,
    )
    return model


def dispatch_model(
    model: nn.Module,
    device_map: Mapping[str, Device],
    main_device: Device | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    offload_dir: PathLike | None = None,
    offload_index: Mapping[str, Any] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
    *,
    stream: WeightStream | None = None,
) -> nn.Module:
    """Spread a model over devices, host memory and disk, so that it can be called as before.

    Weights in host memory or on disk come to the main device while the module that has them runs; those of the modules
    that follow are on their way meanwhile.

    Args:
        model: The model.
        device_map: Devices by name of a module: a number, a torch device, "cpu" or "disk".
        main_device: Where modules run whose weights are offloaded; by default the first accelerator of the map.
        state_dict: The weights of modules in host memory; by default the model's.
        offload_dir: A folder for weights on disk.
        offload_index: Where weights on disk are, if they are in safetensors files.
        offload_buffers: Offload buffers, too.
        skip_keys: Keyword arguments, and keys in them, that stay on their device.
        preload_module_classes: Classes of modules that use the weights of modules inside them without calling these.
        force_hooks: Add hooks even if there is one device.
        stream: Brings the weights ahead of need; by default one that takes 1.25 times the largest offloaded module of
            the map, and 64 MiB, of the main device.

    Returns:
        The model; `model.hf_device_map` is the map.

    Raises:
        PlacementError: A weight has no device, or there is no folder for weights on disk.
    """
    check_device_map(model, device_map)
    return spread(
        model,
        device_map,
        main_device,
        state_dict,
        offload_dir,
        offload_index,
        offload_buffers,
        skip_keys,
        preload_module_classes,
        force_hooks,
        stream=stream,
    )


def spread(
    model: nn.Module,
    device_map: Mapping[str, Device],
    main_device: Device | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    offload_dir: PathLike | None = None,
    offload_index: Mapping[str, Any] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
    *,
    stream: WeightStream | None = None,
    log: logging.Logger = logger,
) -> nn.Module:
    """Do what `dispatch_model` does with a device map that was checked.

    Args:
        model: As in `dispatch_model`, like all arguments but the last.
        device_map: The device map.
        main_device: Where modules run whose weights are offloaded.
        state_dict: The weights of modules in host memory.
        offload_dir: A folder for weights on disk.
        offload_index: Where weights on disk are.
        offload_buffers: Offload buffers, too.
        skip_keys: Keyword arguments that stay on their device.
        preload_module_classes: Classes of modules that use the weights of modules inside them without calling these.
        force_hooks: Add hooks even if there is one device.
        stream: Brings the weights ahead of need.
        log: Gets a warning when the model is moved later.
    """
    devices = list(dict.fromkeys(device_map.values()))
    state: Any = model
    if len(devices) > 1 or "disk" in devices or force_hooks:
        ties = find_tied_parameters(model)
        plan = _Dispatch(model, device_map, main_device)
        weights = plan.weights(state_dict, offload_dir, offload_index)
        attach_align_device_hook_on_blocks(
            model,
            plan.execution_devices(),
            plan.offloaded(),
            weights,
            offload_buffers,
            "",
            skip_keys,
            preload_module_classes,
            _tied_addresses(model, ties),
            stream=plan.stream() if stream is None else stream,
        )
        retie_parameters(model, ties)
        guard_moves(model, log)
    else:
        model.to(as_device(devices[0]))
    state.hf_device_map = dict(device_map)
    return model


class _Dispatch:
    """What a device map says about a model."""

    def __init__(self, model: nn.Module, device_map: Mapping[str, Device], main_device: Device | None) -> None:
        self._model = model
        self._map = device_map
        if main_device is None:
            accelerators = [device for device in device_map.values() if device not in ("cpu", "disk")]
            main_device = accelerators[0] if accelerators else "cpu"
        self._main = main_device
        is_host = as_device(main_device).type in ("cpu", "mps")  # they share memory with the host
        self._offloaded_to = ("disk",) if is_host else ("cpu", "disk")
        self._on_cpu = [] if as_device(main_device).type == "cpu" else self._modules_on("cpu")

    def _modules_on(self, device: str) -> list[str]:
        return [name for name, each in self._map.items() if each == device]

    def execution_devices(self) -> dict[str, Device]:
        """Where each module runs."""
        devices = {name: self._main if each in ("cpu", "disk") else each for name, each in self._map.items()}
        devices[""] = self._main
        return devices

    def offloaded(self) -> dict[str, bool]:
        """Which modules have their weights somewhere else."""
        return {name: each in self._offloaded_to for name, each in self._map.items()}

    def weights(
        self,
        state_dict: Mapping[str, torch.Tensor] | None,
        folder: PathLike | None,
        index: Mapping[str, Any] | None,
    ) -> OffloadedWeightsLoader | None:
        """The weights of modules in host memory and on disk; None if there are none."""
        if state_dict is None and self._on_cpu:
            state_dict = extract_submodules_state_dict(self._model.state_dict(), self._on_cpu)
        on_disk = self._modules_on("disk")
        if on_disk and index is None:
            self._write(on_disk, folder)
        folder = folder if on_disk else None
        if state_dict is None and folder is None and index is None:
            return None
        weights = OffloadedWeightsLoader(
            state_dict=dict(state_dict or {}),
            save_folder=folder,
            index=index,
            device=None if index is None else self._main,
        )
        weights.owns_memory = True
        return weights

    def _write(self, modules: list[str], folder: PathLike | None) -> None:
        """Write the weights of modules to a folder, unless it has some already."""
        if folder is None:
            raise PlacementError(
                f"device_map puts {', '.join(modules)} on disk", "There is no folder for them", "Pass offload_dir="
            )
        if not has_index(folder):
            offload_state_dict(folder, extract_submodules_state_dict(self._model.state_dict(), modules))

    def stream(self) -> WeightStream:
        """A stream whose weights take about as much of the main device as `infer_auto_device_map` leaves free."""
        sizes = compute_module_sizes(self._model)
        offloaded = [sizes.get(name, 0) for name, each in self.offloaded().items() if each]
        if not offloaded:
            return WeightStream()
        return WeightStream(limit=int(max(offloaded) * _BLOCKS_AHEAD) + _BYTES_AHEAD)


def _tied_addresses(model: nn.Module, ties: Sequence[Sequence[str]]) -> TiedParameters:
    """The tied parameters by address, none of them on a device yet."""
    tied: TiedParameters = {}
    for group in ties:
        for name in group:
            owner, last = find_owner(model, name)
            remember_tied(tied, getattr(owner, last))
    return tied


def guard_moves(model: nn.Module, log: logging.Logger = logger) -> None:
    """Let `model.to(device)` warn, and refuse where parts of the model are in host memory or on disk."""
    for name in GUARDED_METHODS:
        method = getattr(model, name, None)
        if callable(method) and not getattr(method, "guards_placement", False):
            # No closure: a copy of the model gets a method of its own.
            guarded = functools.update_wrapper(functools.partial(_move, model, method, log), method)
            guarded.guards_placement = True  # type: ignore[attr-defined]
            setattr(model, name, guarded)


def _move(model: nn.Module, method: Callable[..., Any], log: logging.Logger, *args: Any, **kwargs: Any) -> Any:
    """Call `model.to` or a method like it."""
    name = method.__name__
    if name != "to" or torch._C._nn._parse_to(*args, **kwargs)[0] is not None:
        log.warning("A model that is spread over devices is moved: it may not run afterwards.")
    if any(parameter.device == META for parameter in model.parameters()):
        raise OffloadedModelError(
            f"{type(model).__name__}.{name}() was called",
            "Parts of the model are in host memory or on disk, and only come to a device when they run",
            "Call remove_hook_from_submodules(model) first, or load the model on one device",
        )
    return method(*args, **kwargs)


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: PathLike,
    device_map: str | Mapping[str, Device] | None = None,
    max_memory: Mapping[int | str, float | str] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    offload_folder: PathLike | None = None,
    offload_buffers: bool = False,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
    *,
    stream: WeightStream | None = None,
) -> nn.Module:
    """Load a checkpoint into a model, and spread it over devices, host memory and disk.

    Args:
        model: The model, usually built within `init_empty_weights`.
        checkpoint: A file of weights, the index of a sharded checkpoint, or a folder with either.
        device_map: Devices by name of a module, or how to choose them: "balanced" ("auto") spreads the model evenly
            over accelerators, "balanced_low_0" spares the first, "sequential" fills one after the other. By default
            weights go where the model has them, and it is not spread.
        max_memory: Limits by device, such as `{0: "10GB", "cpu": "30GB"}`.
        no_split_module_classes: Classes of modules that stay on one device.
        offload_folder: A folder for weights on disk.
        offload_buffers: Offload buffers, too.
        dtype: What floating-point weights are converted to.
        offload_state_dict: Accepted, and without effect.
        skip_keys: Keyword arguments, and keys in them, that stay on their device.
        preload_module_classes: Classes of modules that use the weights of modules inside them without calling these.
        force_hooks: Add hooks even if there is one device.
        strict: Names that the checkpoint lacks, or has too many, are an error.
        full_state_dict: The checkpoint has whole tensors, also where the model's are sharded.
        broadcast_from_rank0: Rank 0 reads and sends the weights to the others.
        stream: Brings offloaded weights ahead of need; by default a new one.

    Returns:
        The model.

    Raises:
        PlacementError: The checkpoint does not fit, or an argument is missing.
    """
    if isinstance(device_map, str):
        device_map = _choose(model, device_map, max_memory, no_split_module_classes, dtype, offload_buffers)
    load_checkpoint_in_model(
        model,
        checkpoint,
        device_map=device_map,
        offload_folder=offload_folder,
        dtype=dtype,
        offload_state_dict=offload_state_dict,
        offload_buffers=offload_buffers,
        strict=strict,
        full_state_dict=full_state_dict,
        broadcast_from_rank0=broadcast_from_rank0,
    )
    if device_map is None:
        return model
    return dispatch_model(
        model,
        device_map,
        offload_dir=offload_folder,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        preload_module_classes=preload_module_classes,
        force_hooks=force_hooks,
        stream=stream,
    )


def _choose(
    model: nn.Module,
    how: str,
    max_memory: Mapping[int | str, float | str] | None,
    whole: Sequence[str] | None,
    dtype: str | torch.dtype | None,
    offload_buffers: bool,
) -> Mapping[str, Device]:
    """Choose devices by name of a method."""
    if how not in AUTOMATIC:
        raise PlacementError(
            f"device_map={how!r} was given", "It is no way to choose devices", f"Choose one of {', '.join(AUTOMATIC)}"
        )
    if how != "sequential":
        max_memory = get_balanced_memory(model, max_memory, whole, dtype, low_zero=how == "balanced_low_0")
    return infer_auto_device_map(model, max_memory, whole, dtype, offload_buffers=offload_buffers)
