"""Which module goes to which device: chosen by memory, checked, and shortened."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from paceline.errors import PlacementError, counted
from paceline.placement.sizes import (
    can_split,
    class_names,
    compute_module_sizes,
    compute_module_total_buffer_size,
    convert_file_size_to_int,
    get_max_layer_size,
    get_max_memory,
)
from paceline.placement.tensors import Device, as_device, find_tied_parameters, is_extra_state, shortened

__all__ = [
    "check_device_map",
    "check_devices",
    "check_tied_parameters_in_config",
    "check_tied_parameters_on_same_device",
    "clean_device_map",
    "device_of",
    "fallback_allocate",
    "get_module_size_with_ties",
    "infer_auto_device_map",
]

logger = logging.getLogger(__name__)

DeviceMap = dict[str, Device]
# A module with its name; a parameter or buffer may stand in a module's place.
Named = tuple[str, Any]


def infer_auto_device_map(
    model: nn.Module,
    max_memory: Mapping[int | str, float | str] | None = None,
    no_split_module_classes: str | Collection[str] | None = None,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> DeviceMap:
    """Choose a device for every module: accelerators are filled in order, then host memory, then the disk.

    The first accelerator keeps room for the largest layer, as the weights of offloaded layers pass through it.

    Args:
        model: The model, which may be on the meta device. Its weights must be tied already.
        max_memory: Limits by device, as in `get_max_memory`; by default all that is free.
        no_split_module_classes: Classes of modules that stay on one device, for example blocks with a residual
            connection.
        dtype: The dtype that the weights will have.
        special_dtypes: Dtypes by name of a tensor.
        verbose: Print each decision.
        clean_result: Name a module instead of all that is inside it, where one device has all.
        offload_buffers: Buffers of offloaded modules are offloaded, too.
        fallback_allocation: Where a device is too small for the next module, look for a later one that fits.

    Returns:
        A device for each module by name: a number, "cpu", "mps" or "disk".
    """
    whole = class_names(no_split_module_classes)
    sizes = compute_module_sizes(model, dtype, special_dtypes)
    ties = find_tied_parameters(model)
    warn_if_untied(model, ties)
    limits = get_max_memory(max_memory)
    allocation = _Allocation(
        sizes=sizes,
        ties=ties,
        whole=whole,
        limits=limits,
        pending=[
            *model.named_parameters(recurse=False),
            *model.named_children(),
            *model.named_buffers(recurse=False),
        ],
        buffer_size=lambda module: compute_module_total_buffer_size(module, dtype, special_dtypes),
        fallback=fallback_allocation,
        say=print if verbose else logger.debug,
    )
    chosen = allocation.run()
    if clean_result:
        chosen = clean_device_map(chosen)
    if not offload_buffers:
        allocation.warn_about_buffers()
    allocation.report_unused()
    return chosen


def warn_if_untied(model: nn.Module, ties: Sequence[Sequence[str]]) -> None:
    """Warn where a configuration ties weights, and the model has none that are tied."""
    if not ties and check_tied_parameters_in_config(model):
        logger.warning(
            "The configuration of %s ties weights, but the model has no tied weights, and they count twice. Call "
            "model.tie_weights() first.",
            type(model).__name__,
        )


@dataclass(kw_only=True)
class _Candidate:
    """The module to place next, with the modules that share parameters with it."""

    name: str
    module: Any
    size: float
    tied_names: list[str]
    tied_modules: list[Any]
    size_with_ties: float


@dataclass(kw_only=True)
class _Allocation:
    """Fills one device after the other with modules, splitting those that are too large.

    Attributes:
        sizes: Bytes of every module and tensor by name.
        ties: Names of parameters that are one.
        whole: Classes of modules that stay whole.
        limits: Bytes that each device may hold; the disk has no limit.
        pending: What has no device yet, in order.
        buffer_size: Returns the bytes of a module's buffers.
        fallback: Look for a later module where a device would stay empty.
        say: Gets a line for each decision.
    """

    sizes: Mapping[str, float]
    ties: Sequence[Sequence[str]]
    whole: Collection[str]
    limits: Mapping[int | str, float]
    pending: list[Named]
    buffer_size: Any
    fallback: bool
    say: Any
    chosen: DeviceMap = field(default_factory=dict)
    position: int = 0

    def __post_init__(self) -> None:
        self.devices = [*self.limits, *(["disk"] if "disk" not in self.limits else [])]
        self.accelerators = [device for device in self.devices if device not in ("cpu", "disk")]
        self.streaming = self._devices_that_stream()
        self.used: dict[int | str, float] = dict.fromkeys(self.devices, 0)
        self.buffers: dict[int | str, float] = {}
        self.too_small: dict[int | str, float] = {}
        self.largest, self.largest_names = get_max_layer_size(self.pending, self.sizes, self.whole)

    def _devices_that_stream(self) -> list[int | str]:
        """The devices that keep room for one offloaded layer."""
        if "mps" in self.accelerators:
            return ["mps"]
        return [*self.accelerators[:1], "cpu"]

    @property
    def device(self) -> int | str:
        return self.devices[self.position]

    def run(self) -> DeviceMap:
        while self.pending:
            name, module = self.pending.pop(0)
            self._update_largest(name)
            candidate = self._candidate(name, module)
            limit = self._limit()
            used = self.used[self.device]
            if used + candidate.size_with_ties <= limit:
                self._assign(candidate)
            elif not self._split(candidate, used, limit) and not self._use_fallback(candidate):
                self._next_device(candidate)
        return self.chosen

    def _update_largest(self, taken: str) -> None:
        """Keep the size of the largest layer that may still be offloaded."""
        self.largest_names = [name for name in self.largest_names if name != taken and not name.startswith(f"{taken}.")]
        if not self.largest_names:
            self._measure_largest()

    def _measure_largest(self) -> None:
        modules = [(name, each) for name, each in self.pending if isinstance(each, nn.Module)]
        self.largest, self.largest_names = get_max_layer_size(modules, self.sizes, self.whole)

    def _candidate(self, name: str, module: Any) -> _Candidate:
        size, names, modules = get_module_size_with_ties(
            _tied_outside(name, self.ties), self.sizes[name], self.sizes, self.pending
        )
        return _Candidate(
            name=name,
            module=module,
            size=self.sizes[name],
            tied_names=names,
            tied_modules=modules,
            size_with_ties=size,
        )

    def _reserve(self) -> float:
        return self.largest if self.device in self.streaming else 0

    def _limit(self) -> float:
        if self.device == "disk":
            return float("inf")
        return self.limits[self.device] - self._reserve()

    def _assign(self, candidate: _Candidate) -> None:
        self.say(f"{candidate.name} ({candidate.size_with_ties:.0f} bytes with tied weights) goes to {self.device}")
        self.used[self.device] += candidate.size_with_ties
        for name in (candidate.name, *candidate.tied_names):
            self.chosen[name] = self.device
        self.pending = [(name, each) for name, each in self.pending if name not in candidate.tied_names]
        if isinstance(candidate.module, nn.Module):
            size = self.buffer_size(candidate.module)
            self.buffers[self.device] = self.buffers.get(self.device, 0) + size

    def _split(self, candidate: _Candidate, used: float, limit: float) -> bool:
        """Put the children of a module that is too large in its place; False if there is no such module."""
        if candidate.tied_names and used + candidate.size <= limit and self._split_tied(candidate):
            return True
        if used + candidate.size < limit or not self._can_split(candidate.module):
            return False
        self.say(f"{candidate.name} ({candidate.size:.0f} bytes) is too large for {self.device}, and is split")
        self.pending = [*_parts(candidate.name, candidate.module), *self.pending]
        self._measure_largest()
        return True

    def _split_tied(self, candidate: _Candidate) -> bool:
        """Split a module that shares a parameter with this one, so that less of it has to come along."""
        for name, module in zip(candidate.tied_names, candidate.tied_modules, strict=True):
            if self._can_split(module):
                self.say(f"{name} shares weights with {candidate.name}, and is split")
                index = next(index for index, (each, _) in enumerate(self.pending) if each == name)
                self.pending[index : index + 1] = _parts(name, module)
                self.pending.insert(0, (candidate.name, candidate.module))
                self._measure_largest()
                return True
        return False

    def _can_split(self, module: Any) -> bool:
        return can_split(module, self.whole)

    def _use_fallback(self, candidate: _Candidate) -> bool:
        """Put a later module that fits before this one, where the device would stay empty."""
        if not self.fallback or self.device == "disk" or self.used[self.device] != 0:
            return False
        room = self.limits[self.device] - max(self.largest, candidate.size_with_ties)
        name, module, rest = fallback_allocate(self.pending, self.sizes, int(room), self.whole, self.ties)
        if name is None:
            return False
        self.pending = [(name, module), (candidate.name, candidate.module), *rest]
        return True

    def _next_device(self, candidate: _Candidate) -> None:
        self.say(f"{candidate.name} ({candidate.size_with_ties:.0f} bytes) does not fit on {self.device}")
        if self.used[self.device] == 0:
            self.too_small[self.device] = candidate.size_with_ties + self._reserve()
        self.used[self.device] += self._reserve()
        self.position += 1
        self.pending.insert(0, (candidate.name, candidate.module))

    def warn_about_buffers(self) -> None:
        """Warn where no accelerator has room for the buffers of offloaded modules."""
        needed = self.buffers.get("cpu", 0) + self.buffers.get("disk", 0)
        if needed == 0 or not self.accelerators:
            return
        if any(self.limits[device] >= needed + self.used[device] for device in self.accelerators):
            return
        warnings.warn(
            f"The buffers of offloaded modules take {needed:.0f} bytes, and no accelerator has that much left. They "
            "stay on the accelerator, which may run out of memory. Pass offload_buffers=True to offload them, too.",
            stacklevel=4,
        )

    def report_unused(self) -> None:
        """Log the devices that are too small for any module."""
        if self.too_small:
            needs = ", ".join(f"{device} (needs {size:.0f} bytes)" for device, size in self.too_small.items())
            logger.info("No module was placed on these devices, due to insufficient memory: %s", needs)


def _parts(name: str, module: nn.Module) -> list[Named]:
    """The tensors and children of a module, with full names."""
    parts: list[Named] = [
        *module.named_parameters(recurse=False),
        *module.named_children(),
        *module.named_buffers(recurse=False),
    ]
    return [(f"{name}.{part}", each) for part, each in parts]


def _is_inside(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def _tied_outside(module: str, ties: Sequence[Sequence[str]]) -> list[str]:
    """The parameters outside of a module that are tied to one inside it."""
    outside: list[str] = []
    for group in ties:
        rest = [name for name in group if not _is_inside(name, module)]
        if 0 < len(rest) < len(group):
            outside += rest
    return outside


def get_module_size_with_ties(
    tied_params: Sequence[str],
    module_size: float,
    module_sizes: Mapping[str, float],
    modules_to_treat: Sequence[Named],
) -> tuple[float, list[str], list[Any]]:
    """Return the bytes of a module and of the modules that share parameters with it, and these with their names.

    Args:
        tied_params: The parameters outside of the module that are tied to one inside it.
        module_size: The module's own bytes.
        module_sizes: Bytes of every module and tensor by name.
        modules_to_treat: The modules that have no device yet.
    """
    names: list[str] = []
    modules: list[Any] = []
    for tied in tied_params:
        found = next(((name, each) for name, each in modules_to_treat if _is_inside(tied, name)), None)
        if found is None:  # it has a device already
            continue
        name, module = found
        names.append(name)
        modules.append(module)
        module_size += module_sizes[name] - module_sizes[tied]
    return module_size, names, modules


def fallback_allocate(
    modules: list[Named],
    module_sizes: Mapping[str, float],
    size_limit: int | str,
    no_split_module_classes: Collection[str] | None = None,
    tied_parameters: Sequence[Sequence[str]] | None = None,
) -> tuple[str | None, Any, list[Named]]:
    """Find the first module, or part of one, that fits into a limit.

    Args:
        modules: The modules to search, with their names.
        module_sizes: Bytes of every module and tensor by name.
        size_limit: The most bytes that it may have.
        no_split_module_classes: Classes of modules that stay whole.
        tied_parameters: Names of parameters that are one.

    Returns:
        Its name, the module, and the other modules; the name is None if nothing fits.
    """
    try:
        limit = convert_file_size_to_int(size_limit)
    except PlacementError:
        return None, None, modules
    whole, ties = no_split_module_classes or (), tied_parameters or ()
    search = list(modules)
    while search:
        name, module = search.pop(0)
        size, _, _ = get_module_size_with_ties(_tied_outside(name, ties), module_sizes[name], module_sizes, search)
        if size <= limit:
            return name, module, _without(modules, name)
        if can_split(module, whole):
            search = [*_parts(name, module), *search]
    return None, None, modules


def _without(modules: Sequence[Named], name: str) -> list[Named]:
    """The modules without one of them, whose parents are replaced by their parts."""
    rest: list[Named] = []
    for each, module in modules:
        if each == name:
            continue
        if _is_inside(name, each):
            rest += _without(_parts(each, module), name)
        else:
            rest.append((each, module))
    return rest


def clean_device_map(device_map: dict[str, Any], module_name: str = "") -> dict[str, Any]:
    """Replace the entries of modules by one of the module that contains them, where all are on one device.

    Args:
        device_map: Devices by name of a module; changed in place.
        module_name: Where to begin.
    """
    prefix = f"{module_name}." if module_name else ""
    inside = [name for name in device_map if name.startswith(prefix)]
    if len(inside) > 1 and len({device_map[name] for name in inside}) == 1:
        device = device_map[inside[0]]
        for name in inside:
            del device_map[name]
        device_map[module_name] = device
        return device_map
    for child in {name[len(prefix) :].partition(".")[0] for name in inside if name != module_name}:
        clean_device_map(device_map, f"{prefix}{child}")
    return device_map


def check_device_map(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    """Check that every weight of a model has a device.

    Raises:
        PlacementError: Some have none.
    """
    _require_mapping(device_map)
    _warn_about_unknown_names(model, device_map)
    if "" in device_map:
        return
    weights = [name for name in model.state_dict() if not is_extra_state(name)]
    homeless = [name for name in weights if not any(_is_inside(name, module) for module in device_map)]
    if homeless:
        raise PlacementError(
            f"device_map has no device for {shortened(homeless)}", "Every tensor needs one", "Add these modules"
        )


def _require_mapping(device_map: object) -> None:
    if not isinstance(device_map, Mapping):
        raise PlacementError(
            f"device_map={device_map!r} was given",
            "Devices are needed by name of a module",
            'Pass a dict such as {"": "cpu"}, or that of infer_auto_device_map(model)',
        )


def check_devices(device_map: Mapping[str, Any]) -> None:
    """Check that this machine has the devices of a map.

    Args:
        device_map: Devices by name of a module.

    Raises:
        PlacementError: It lacks one, or what is named is none.
    """
    _require_mapping(device_map)
    for name, device in device_map.items():
        if device == "disk":
            continue
        seen = f"device_map puts {name or 'the model'} on {device!r}"
        try:
            wanted = as_device(device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise PlacementError(seen, "That is not a device", 'Use a number, "cpu" or "disk"') from error
        if wanted.type in ("cpu", "meta"):
            continue
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            raise PlacementError(
                seen, "This machine has no accelerator that torch can use", 'Use "cpu" and "disk" in device_map'
            )
        count = torch.accelerator.device_count()
        if wanted.type == accelerator.type and not 0 <= (wanted.index or 0) < count:
            raise PlacementError(
                seen, f"This machine has {counted(count, 'accelerator')}", "Number them from 0 on in device_map"
            )


def _warn_about_unknown_names(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    known = {name for name, _ in [*model.named_modules(remove_duplicate=False), *tensors]}
    unknown = [name for name in device_map if name not in known]
    if unknown:
        warnings.warn(f"device_map keys do not match any submodules of the model: {unknown}", stacklevel=3)


def device_of(name: str, device_map: Mapping[str, Any]) -> Any:
    """Return the device of a tensor: that of the innermost module around it that has one.

    Raises:
        PlacementError: There is none.
    """
    module = name
    while module and module not in device_map:
        module = module.rpartition(".")[0]
    if module not in device_map:
        raise PlacementError(f"device_map has no device for {name}", "Every tensor needs one", "Add its module")
    return device_map[module]


def check_tied_parameters_on_same_device(tied_params: Sequence[Sequence[str]], device_map: Mapping[str, Any]) -> None:
    """Warn where parameters that are one are to go to different devices.

    Args:
        tied_params: Groups of names, as `find_tied_parameters` returned them.
        device_map: Devices by name of a module.
    """
    for group in tied_params:
        devices = {name: device_of(name, device_map) for name in group}
        if len(set(devices.values())) > 1:
            logger.warning(
                "Tied parameters are on different devices: %s. Each device will have a copy of its own. Put their "
                "modules on one device in device_map.",
                devices,
            )


def check_tied_parameters_in_config(model: nn.Module) -> bool:
    """Whether the configuration of a transformers model ties weights."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "tie_word_embeddings", False) or getattr(config, "tie_encoder_decoder", False))
