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
    align_hooks,
    attach_align_device_hook,
    attach_align_device_hook_on_blocks,
)
from paceline.placement.device_map import check_device_map, check_devices, infer_auto_device_map
from paceline.placement.hooks import GUARDED_METHODS, add_hook_to_module, remember_ties
from paceline.placement.loading import load_checkpoint_in_model
from paceline.placement.offload_folder import (
    OffloadedWeightsLoader,
    extract_submodules_state_dict,
    has_index,
    offload_state_dict,
)
from paceline.placement.offloaded_state import has_offloaded_params
from paceline.placement.sizes import compute_module_sizes, get_balanced_memory
from paceline.placement.streaming import WeightStream
from paceline.placement.tensors import (
    META,
    Device,
    TiedParameters,
    as_device,
    find_owner,
    find_tied_parameters,
    get_non_persistent_buffers,
    is_extra_state,
    named_module_tensors,
    retie_parameters,
    shortened,
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
        state_dict = {name: tensor.to("cpu") for name, tensor in _with_values(model).items()}
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
        offload_dir: The folder. Weights that the model has no values for, as it is on the meta device, are those that
            the folder has already.
        execution_device: The device; by default the one that the model is on.
        offload_buffers: Offload buffers, too.
        preload_module_classes: Classes of modules that use the weights of modules inside them without calling these.
        stream: Brings the weights ahead of need; by default a new one.

    Returns:
        The model.
    """
    _write(model, offload_dir, _with_values(model), offload_buffers)
    # A model without weights has no index.
    weights = OffloadedWeightsLoader(state_dict={}, save_folder=offload_dir if has_index(offload_dir) else None)
    return _offload(model, weights, execution_device, offload_buffers, preload_module_classes, stream)


def _offload(
    model: nn.Module,
    weights: OffloadedWeightsLoader,
    device: Device | None,
    offload_buffers: bool,
    preload: Sequence[str] | None,
    stream: WeightStream | None,
) -> nn.Module:
    ties = find_tied_parameters(model)
    _add_tied_names(weights, ties)
    check_values(model, weights)
    if device is None:
        device = _device_of(model)
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
    remember_ties(model, ties)
    _guard_weights(model)
    guard_moves(model)
    return model


def _device_of(model: nn.Module) -> torch.device:
    """The device that a model is on; that of this machine if the model has no values yet."""
    devices = (tensor.device for _, tensor in named_module_tensors(model, recurse=True))
    found = next((device for device in devices if device != META), None)
    return found or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _with_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The part of a model's state dict that is not on the meta device."""
    return {name: tensor for name, tensor in _weights_of(model).items() if tensor.device != META}


def _weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state dict without what its modules add to it, which stays with them."""
    return {name: tensor for name, tensor in model.state_dict().items() if not is_extra_state(name)}


def _write(model: nn.Module, folder: PathLike, state: dict[str, torch.Tensor], offload_buffers: bool) -> None:
    """Write weights to a folder. Where it has some already, buffers that stay with the model are left out."""
    if has_index(folder) and not offload_buffers:
        resident = {name for name, _ in model.named_buffers()}
        state = {name: tensor for name, tensor in state.items() if name not in resident}
    offload_state_dict(folder, state)


def _add_tied_names(weights: OffloadedWeightsLoader, ties: Sequence[Sequence[str]]) -> None:
    """Let a weight be found under all names that the model has for it: a checkpoint need not have all."""
    for group in ties:
        known = next((name for name in group if name in weights), None)
        if known is not None:
            for name in group:
                if name not in weights:
                    weights.add_alias(name, known)


def check_values(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Check that each tensor of a model has values, in the model or in the weights that are kept somewhere else.

    Args:
        model: The model.
        weights: The weights that are kept somewhere else.

    Raises:
        PlacementError: Some have none.
    """
    empty = [name for name, tensor in named_module_tensors(model, recurse=True) if tensor.device == META]
    empty = [name for name in empty if name not in weights]
    if not empty:
        return
    names = f"{shortened(empty)} of {type(model).__name__}"
    if any(map(has_offloaded_params, model.modules())):
        raise PlacementError(
            f"{names} cannot be placed",
            "Hooks keep these weights in host memory or on disk already",
            "Call remove_hook_from_submodules(model) first, which puts them back",
        )
    outside = get_non_persistent_buffers(model, recurse=True, fqns=True).intersection(empty)
    if outside:
        raise PlacementError(
            f"{shortened(sorted(outside))} of {type(model).__name__} cannot be placed",
            "These buffers are on the meta device, and no checkpoint has them (persistent=False)",
            "Build the model within init_empty_weights(), whose include_buffers is False by default",
        )
    raise PlacementError(
        f"{names} cannot be placed",
        "These tensors are on the meta device, and have no values; neither a checkpoint nor an offload folder has them",
        "Load a checkpoint that has them (load_checkpoint_and_dispatch), or give the model values (to_empty, then an "
        "initialization)",
    )


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
    is_checked: bool = False,
    log: logging.Logger = logger,
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
        is_checked: Whether the map is known to fit the model.
        log: Gets a warning when the model is moved later.

    Returns:
        The model; `model.hf_device_map` is the map.

    Raises:
        PlacementError: A weight has no device, or there is no folder for weights on disk.
    """
    if not is_checked:
        check_device_map(model, device_map)
    check_devices(device_map)
    devices = list(dict.fromkeys(device_map.values()))
    state: Any = model
    if len(devices) > 1 or "disk" in devices or force_hooks:
        ties = find_tied_parameters(model)
        plan = _Dispatch(model, device_map, main_device)
        weights = plan.weights(state_dict, offload_dir, offload_index, offload_buffers)
        if weights is not None:
            _add_tied_names(weights, ties)
        if plan.needs_values:
            check_values(model, weights or {})
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
        remember_ties(model, ties)
        _guard_weights(model)
        guard_moves(model, log)
    else:
        if as_device(devices[0]) != META:
            check_values(model, {})
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

    @property
    def needs_values(self) -> bool:
        """Whether anything is to run."""
        return as_device(self._main) != META and META.type not in map(str, self._map.values())

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
        offload_buffers: bool,
    ) -> OffloadedWeightsLoader | None:
        """The weights of modules in host memory and on disk; None if there are none."""
        if state_dict is None and self._on_cpu:
            state_dict = extract_submodules_state_dict(_weights_of(self._model), self._on_cpu)
        on_disk = self._modules_on("disk")
        if on_disk and index is None:
            self._write(on_disk, folder, offload_buffers)
        folder = folder if on_disk and has_index(folder) else None
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

    def _write(self, modules: list[str], folder: PathLike | None, offload_buffers: bool) -> None:
        """Write the weights of modules that have values to a folder; it has those of the others already."""
        if folder is None:
            raise PlacementError(
                f"device_map puts {shortened(modules)} on disk", "There is no folder for them", "Pass offload_dir="
            )
        state = extract_submodules_state_dict(_with_values(self._model), modules)
        _write(self._model, folder, state, offload_buffers)

    def stream(self) -> WeightStream:
        """A stream whose weights take about as much of the main device as `infer_auto_device_map` leaves free."""
        sizes = compute_module_sizes(self._model)
        offloaded = [sizes.get(name, 0) for name, each in self.offloaded().items() if each]
        if not offloaded:
            return WeightStream()
        return WeightStream(limit=int(max(offloaded) * _BLOCKS_AHEAD) + _BYTES_AHEAD)


def _tied_addresses(model: nn.Module, ties: Sequence[Sequence[str]]) -> TiedParameters:
    """The tied parameters by address, none of them on a device yet."""
    tied = TiedParameters()
    for group in ties:
        for name in group:
            owner, last = find_owner(model, name)
            tied.note(getattr(owner, last))
    return tied


def _guard_weights(model: nn.Module) -> None:
    """Refuse, in forwards on the CPU, weights that have no values at that time."""
    hooks = [hook for module in model.modules() for hook in align_hooks(module)]
    if not any(hook.offload for hook in hooks):
        return
    for hook in hooks:
        hook.guards = hook.execution_device is None or as_device(hook.execution_device).type == "cpu"


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
            f"device_map={how!r} was given",
            "It is not a way to choose devices",
            f'Choose one of {", ".join(AUTOMATIC)}, or map names of modules to devices: {{"": "cpu"}} for all on one',
        )
    if how != "sequential":
        max_memory = get_balanced_memory(model, max_memory, whole, dtype, low_zero=how == "balanced_low_0")
    return infer_auto_device_map(model, max_memory, whole, dtype, offload_buffers=offload_buffers)
