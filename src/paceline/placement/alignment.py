"""Hooks that bring a module's inputs and weights onto one device for its forward."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from paceline.collectives.nested import send_to_device, tensors
from paceline.placement.guard import ForwardLock, check_output, guarded
from paceline.placement.hooks import ModelHook, SequentialHook, add_hook_to_module, not_compiled
from paceline.placement.offload_folder import OffloadedWeightsLoader, PrefixedDataset, source_of
from paceline.placement.sizes import class_names
from paceline.placement.streaming import WeightGroup, WeightStream
from paceline.placement.tensors import (
    META,
    Device,
    TiedParameters,
    as_device,
    as_parameter,
    find_owner,
    get_non_persistent_buffers,
    is_same_device,
    named_module_tensors,
    set_module_tensor_to_device,
    tied_copies,
)
from paceline.placement.weight_file import FileSlice

__all__ = [
    "AlignDevicesHook",
    "attach_align_device_hook",
    "attach_align_device_hook_on_blocks",
    "attach_execution_device_hook",
]

Weights = Mapping[str, torch.Tensor]


class AlignDevicesHook(ModelHook):
    """Brings a module's inputs onto a device, and its weights, too, if they are kept somewhere else between forwards.

    Args:
        execution_device: Where the module runs; None to leave inputs where they are.
        offload: Keep the weights in `weights_map` between forwards, and on the meta device in the module.
        io_same_device: Bring the output to the device of the first input.
        weights_map: The weights by name; by default those that the module has, in host memory.
        offload_buffers: Offload buffers, too. Those that are not part of the state dict stay.
        place_submodules: Handle the weights of the modules inside it, too.
        skip_keys: Keyword arguments, and keys in them, that stay on their device.
        tied_params_map: Parameters that are already on a device, by the address of their original and by device.

    Attributes:
        stream: Brings offloaded weights ahead of need; None to copy each when it is needed.
        guards: Refuse weights without values while the module runs, on the CPU.
    """

    def __init__(
        self,
        execution_device: Device | None = None,
        offload: bool = False,
        io_same_device: bool = False,
        weights_map: Weights | None = None,
        offload_buffers: bool = False,
        place_submodules: bool = False,
        skip_keys: str | list[str] | None = None,
        tied_params_map: TiedParameters | None = None,
    ) -> None:
        self.execution_device = execution_device
        self.offload = offload
        self.io_same_device = io_same_device
        self.weights_map = weights_map
        self.offload_buffers = offload_buffers
        self.place_submodules = place_submodules
        self.skip_keys = skip_keys
        self.tied_params_map = tied_params_map
        self.stream: WeightStream | None = None
        self.input_device: torch.device | None = None
        self.original_devices: dict[str, torch.device] = {}
        self._loan = _Loan()
        self._plans = _Plans()
        self._device: tuple[Device | None, torch.device | None] = (None, None)
        self._offloaded: list[str] = []
        self.guards = False
        self._lock = ForwardLock()

    def __repr__(self) -> str:
        return (
            f"AlignDevicesHook(execution_device={self.execution_device}, offload={self.offload}, "
            f"io_same_device={self.io_same_device}, offload_buffers={self.offload_buffers}, "
            f"place_submodules={self.place_submodules}, skip_keys={self.skip_keys!r})"
        )

    def context(self, module: nn.Module) -> AbstractContextManager[Any] | None:
        """Return what is entered while the module runs: its weights are for one thread at a time."""
        if not self.guards:
            return self._lock if self.offload else None
        return guarded(module, self._lock if self.offload else None)

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Put the module's tensors where they belong between forwards."""
        if self.execution_device is not None and as_device(self.execution_device) == META:
            self.tied_params_map = None  # tensors without values have no address
        if self.offload:
            self._offload(module)
        elif self.execution_device is not None:
            for name, _ in named_module_tensors(module, recurse=self.place_submodules):
                set_module_tensor_to_device(module, name, self.execution_device, tied_params_map=self.tied_params_map)
        return module

    def _offload(self, module: nn.Module) -> None:
        """Leave tensors without values in the module."""
        everything = list(named_module_tensors(module, recurse=self.place_submodules))
        self.original_devices = {name: tensor.device for name, tensor in everything}
        if self.weights_map is None:
            self.weights_map = {name: tensor.to("cpu") for name, tensor in self._tensors(module, persistent=False)}
        self._offloaded = [name for name, _ in self._tensors(module)]
        for name in self._offloaded:
            set_module_tensor_to_device(module, name, META)
        if self.execution_device is None:
            return
        if self.offload_buffers:
            resident = get_non_persistent_buffers(module, recurse=self.place_submodules, fqns=True)
        else:
            resident = {name for name, _ in module.named_buffers(recurse=self.place_submodules)}
        for name in sorted(resident):
            set_module_tensor_to_device(module, name, self.execution_device, tied_params_map=self.tied_params_map)
        self._plan(module)

    def _tensors(self, module: nn.Module, persistent: bool = True) -> Any:
        """The tensors that are offloaded, with their names."""
        return named_module_tensors(
            module,
            include_buffers=self.offload_buffers,
            recurse=self.place_submodules,
            remove_non_persistent=persistent,
        )

    @property
    def offloaded(self) -> list[str]:
        """The names of the tensors that are kept in `weights_map` between forwards."""
        return self._offloaded

    @not_compiled
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Bring inputs and weights onto the device."""
        if self.io_same_device:
            self.input_device = next((tensor.device for tensor in tensors([args, kwargs])), None)
        if self.offload:
            self._bring(module)
        device = self._resolved_device()
        if device is None or (not kwargs and all(_is_on(each, device) for each in args)):
            return args, kwargs
        return send_to_device(args, device), send_to_device(kwargs, device, skip_keys=self.skip_keys)

    @not_compiled
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Give the weights back, and bring the output to the input's device if that is wanted."""
        if self.offload:
            self._keep_changed_buffers()
            self._loan.end(self.stream)
            if type(module).__name__ == "Linear8bitLt":
                _forget_scales(module)
        if self.io_same_device and self.input_device is not None:
            if self.guards and self.input_device != META:
                check_output(module, tensors(output))
            output = send_to_device(output, self.input_device, skip_keys=self.skip_keys)
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Put offloaded tensors back where they were."""
        if not self.offload:
            return module
        self._loan.end(self.stream)
        for device in list(self._plans):
            self._drop_plan(device)
        assert self.weights_map is not None
        for name, device in self.original_devices.items():
            if device == META:
                continue
            # Buffers that stayed with the module may have changed since: statistics, a cache.
            value = _with_memory_of_its_own(self.weights_map.get(name)) if name in self._offloaded else None
            scales = self._scales(name, value)
            set_module_tensor_to_device(module, name, device, value=value, fp16_statistics=scales)
        return module

    def _keep_changed_buffers(self) -> None:
        """Keep the values of offloaded buffers that the forward has changed, such as the statistics of a batch norm."""
        changed = self._loan.changed_buffers()
        if not changed:
            return
        assert self.weights_map is not None
        for name, value in changed.items():
            replace_weight(self.weights_map, name, value.detach().to("cpu"))
        for device in list(self._plans):
            self._drop_plan(device)  # they lead to the values of before

    def _bring(self, module: nn.Module) -> None:
        """Put the weights into the module."""
        self._loan.end(self.stream)  # a forward that raised has not given its weights back
        plan = self._plan(module)
        for name in plan.plain:
            self._bring_one(module, name)
        for group, names in plan.groups:
            self._loan.borrow(plan, group, names, self.tied_params_map)

    def _bring_one(self, module: nn.Module, name: str) -> None:
        """Copy one weight now."""
        assert self.execution_device is not None
        assert self.weights_map is not None
        value = self.weights_map[name]
        tied, device = self.tied_params_map, self.execution_device
        copies = tied_copies(tied, value)
        if copies is not None and device not in copies:
            self._loan.remove_later(copies, device)
        owner, last = find_owner(module, name)
        self._loan.keep_place(owner, last)
        set_module_tensor_to_device(
            module,
            name,
            device,
            value=value,
            fp16_statistics=self._scales(name, value),
            tied_params_map=tied,
        )
        self._loan.watch(owner, last, name)

    def _scales(self, name: str, value: torch.Tensor | None) -> torch.Tensor | None:
        """The scales of an 8-bit weight of bitsandbytes, which are an entry of their own."""
        if value is None or value.dtype != torch.int8 or "weight" not in name or self.weights_map is None:
            return None
        return self.weights_map.get(name.replace("weight", "SCB"))

    def _resolved_device(self) -> torch.device | None:
        """The device where the module runs."""
        if self.execution_device is not None and self._device[0] is not self.execution_device:
            self._device = (self.execution_device, _with_number(as_device(self.execution_device)))
        return None if self.execution_device is None else self._device[1]

    def _plan(self, module: nn.Module) -> _Plan:
        """How the weights come to the device: made once, and again when the weights were replaced."""
        device = self._resolved_device()
        assert self.weights_map is not None
        assert device is not None
        names = [name for name, _ in self._tensors(module)]
        plan = self._plans.get(device)
        if plan is None or plan.weights is not self.weights_map or plan.names != names:
            self._drop_plan(device)
            plan = _Plan(module, names, self.weights_map, device, self.stream, self.tied_params_map)
            self._plans[device] = plan
        return plan

    def _drop_plan(self, device: torch.device) -> None:
        plan = self._plans.pop(device, None)
        if plan is not None and plan.groups:
            assert self.stream is not None
            self.stream.forget([group for group, _ in plan.groups])


def align_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """Return the hooks of a module that align devices: none, one, or several one after the other."""
    hook = getattr(module, "_hf_hook", None)
    found = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [each for each in found if isinstance(each, AlignDevicesHook)]


def _with_number(device: torch.device) -> torch.device:
    """The device, with the number of the current one if it has none: tensors have one, and are compared with it."""
    index: int | None = device.index
    if index is None and device.type not in ("cpu", "meta", "mps"):
        return torch.device(device.type, torch.accelerator.current_device_index())
    return device


def _is_on(value: object, device: torch.device) -> bool:
    return type(value) is torch.Tensor and value.device == device


class _Plans(dict[torch.device, "_Plan"]):
    """How a module's offloaded weights come to each device; a copy of the hook makes its own."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Plans:
        return _Plans()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Plans, ()


class _Plan:
    """How a module's offloaded weights come to a device.

    Attributes:
        groups: What the stream brings: a group, and under which names its tensors go into the module.
        plain: Names of weights that are copied when they are needed.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        weights: Weights,
        device: torch.device,
        stream: WeightStream | None,
        tied: TiedParameters | None,
    ) -> None:
        self.names = list(names)
        self.weights = weights
        self.device = device
        self.stream = stream
        self.owners = {name: find_owner(module, name) for name in names}
        self.groups: list[tuple[WeightGroup, dict[str, str]]] = []
        self.plain: list[str] = []
        if stream is None or not stream.serves(device):
            self.plain = self.names
        else:
            self._make_groups(stream, tied)

    def _make_groups(self, stream: WeightStream, tied: TiedParameters | None) -> None:
        own = {}
        for name in self.names:
            source = source_of(self.weights, name)
            if not self._can_stream(name, source):
                self.plain.append(name)
            elif isinstance(source, torch.Tensor) and tied_copies(tied, source) is not None:
                self.groups.append((stream.shared_group(source, self.device), {"": name}))
            else:
                own[name] = source
        if own:
            on_pinned = self._replace if owns_memory(self.weights) else None
            self.groups.append((stream.group(own, self.device, on_pinned), {name: name for name in own}))

    def _can_stream(self, name: str, source: torch.Tensor | FileSlice) -> bool:
        """Whether a tensor is plain memory; others know themselves how they go to a device."""
        owner, last = self.owners[name]
        place = owner._parameters.get(last, None)
        if place is not None and type(place) is not nn.Parameter:
            return False
        if isinstance(source, FileSlice):
            return True
        is_plain = type(source) in (torch.Tensor, nn.Parameter) and source.layout == torch.strided
        return is_plain and source.device.type == "cpu" and not source.is_quantized

    def _replace(self, pinned: dict[str, torch.Tensor]) -> None:
        """Keep weights that are page-locked now, instead of their originals."""
        for name, tensor in pinned.items():
            replace_weight(self.weights, name, tensor)


class _Loan:
    """The weights that a module has during its forward, and what it has in their place otherwise."""

    def __init__(self) -> None:
        self._places: list[tuple[nn.Module, str, torch.Tensor]] = []
        self._groups: list[WeightGroup] = []
        self._tied: list[tuple[dict[Any, torch.Tensor], Any]] = []
        self._buffers: list[tuple[nn.Module, str, str, torch.Tensor, int]] = []

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Loan:
        return _Loan()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Loan, ()

    def keep_place(self, owner: nn.Module, name: str) -> None:
        """Remember what a module has under a name, without its values."""
        place = owner._parameters[name] if name in owner._parameters else owner._buffers[name]
        assert place is not None
        if place.device != META:
            empty = place.detach().to(META)
            place = as_parameter(place, empty, META) if isinstance(place, nn.Parameter) else empty
        self._places.append((owner, name, place))

    def remove_later(self, tied: dict[Any, torch.Tensor], device: Any) -> None:
        """Note a tied weight that leaves the device after the forward."""
        self._tied.append((tied, device))

    def borrow(self, plan: _Plan, group: WeightGroup, names: Mapping[str, str], tied: TiedParameters | None) -> None:
        """Put the weights of a group into the module."""
        assert plan.stream is not None
        resident = None
        if tied is not None and "" in names:
            resident = _resident(tied_copies(tied, plan.weights[names[""]]) or {}, plan.device)
        if resident is not None:
            values = {"": resident}
        else:
            values = plan.stream.fetch(group)
            self._groups.append(group)
        for key, name in names.items():
            owner, last = plan.owners[name]
            self.keep_place(owner, last)
            place = self._places[-1][2]
            value = values[key]
            if value.dtype != place.dtype:
                value = value.to(place.dtype)
            if isinstance(place, nn.Parameter):
                if not isinstance(value, nn.Parameter):
                    value = as_parameter(place, value, plan.device)
                owner._parameters[last] = value
            else:
                owner._buffers[last] = value
            self.watch(owner, last, name)

    def watch(self, owner: nn.Module, last: str, name: str) -> None:
        """Note what a module got: a buffer, to see whether it changes, or a parameter, whose gradient would be lost.

        Args:
            owner: The module that owns the tensor.
            last: Its name there.
            name: Its name in the weights.
        """
        buffer = owner._buffers.get(last)
        if buffer is not None:
            self._buffers.append((owner, last, name, buffer, _version(buffer)))
            return
        parameter = owner._parameters[last]
        if torch.is_grad_enabled() and parameter is not None and parameter.requires_grad and parameter.is_leaf:
            parameter.register_post_accumulate_grad_hook(_warn_of_lost_gradient)  # type: ignore[no-untyped-call]

    def changed_buffers(self) -> dict[str, torch.Tensor]:
        """The buffers that have other values than they came with, by their names in the weights."""
        changed = {}
        for owner, last, name, before, version in self._buffers:
            now = owner._buffers.get(last)
            if now is None:
                continue
            if now is not before or _version(now) != version or _updates_statistics(owner):
                changed[name] = now
        return changed

    def end(self, stream: WeightStream | None) -> None:
        """Take the weights out of the module."""
        for owner, name, place in self._places:
            if isinstance(place, nn.Parameter):
                owner._parameters[name] = place
            else:
                owner._buffers[name] = place
        for tied, device in self._tied:
            tied.pop(device, None)
        for group in self._groups:
            assert stream is not None
            stream.release(group)
        self._places, self._groups, self._tied, self._buffers = [], [], [], []


def _version(buffer: torch.Tensor) -> int:
    """What grows with each change in place; tensors of inference mode do not count."""
    return 0 if buffer.is_inference() else buffer._version


def _updates_statistics(module: nn.Module) -> bool:
    """Whether a forward changes the statistics of a module: torch does not count these changes in place."""
    return isinstance(module, _NormBase) and module.training and module.track_running_stats


def _warn_of_lost_gradient(_parameter: torch.Tensor) -> None:
    warnings.warn(
        "The backward pass gave gradients to offloaded weights, and they are lost: between forwards these weights are "
        "in host memory or on disk, where no optimizer reaches them. Freeze them (requires_grad_(False)) and train "
        "others, such as adapters, or train the model whole, sharded by FSDP2 or ZeRO.",
        stacklevel=2,
    )


def _with_memory_of_its_own(value: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, outside of the page-locked block that it shares with others."""
    if value is None or value.untyped_storage().nbytes() == value.nbytes:
        return value
    return value.clone()


def _resident(copies: Mapping[Any, torch.Tensor], device: torch.device) -> torch.Tensor | None:
    """The copy of a tied weight that is on a device anyway."""
    return next((copy for key, copy in copies.items() if is_same_device(as_device(key), device)), None)


def owns_memory(weights: Weights) -> bool:
    """Whether the tensors of a mapping may be replaced by page-locked ones with the same values."""
    if isinstance(weights, PrefixedDataset):
        return owns_memory(weights.dataset)
    return isinstance(weights, OffloadedWeightsLoader) and weights.owns_memory


def replace_weight(weights: Weights, name: str, tensor: torch.Tensor) -> None:
    """Keep another tensor under a name."""
    if isinstance(weights, PrefixedDataset):
        replace_weight(weights.dataset, f"{weights.prefix}{name}", tensor)
    elif isinstance(weights, OffloadedWeightsLoader):
        weights.replace(name, tensor)
    elif isinstance(weights, MutableMapping):
        weights[name] = tensor


def _forget_scales(module: nn.Module) -> None:
    """Drop what an 8-bit layer of bitsandbytes has computed from its weights."""
    state: Any = module.state
    state.SCB = None
    state.CxB = None


def _has_tensors(module: nn.Module) -> bool:
    return next(named_module_tensors(module), None) is not None


def attach_execution_device_hook(
    module: nn.Module,
    execution_device: Device | None,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    tied_params_map: TiedParameters | None = None,
) -> None:
    """Let every module that has weights get its inputs on a device; those with a hook keep that.

    Args:
        module: The outermost module.
        execution_device: The device.
        skip_keys: Keyword arguments that stay on their device.
        preload_module_classes: Classes whose inner modules get no hook.
        tied_params_map: Parameters that are already on a device.
    """
    if not hasattr(module, "_hf_hook") and module.state_dict():
        hook = AlignDevicesHook(execution_device, skip_keys=skip_keys, tied_params_map=tied_params_map)
        add_hook_to_module(module, hook)
    if _needs_all_weights(module, preload_module_classes):
        return
    for child in module.children():
        attach_execution_device_hook(child, execution_device, skip_keys, preload_module_classes, tied_params_map)


def _needs_all_weights(module: nn.Module, preload: Sequence[str] | None) -> bool:
    """Whether a module uses the weights of modules inside it without calling these."""
    return isinstance(module, nn.MultiheadAttention) or type(module).__name__ in class_names(preload)


def attach_align_device_hook(
    module: nn.Module,
    execution_device: Device | None = None,
    offload: bool = False,
    weights_map: Weights | None = None,
    offload_buffers: bool = False,
    module_name: str = "",
    skip_keys: str | list[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    tied_params_map: TiedParameters | None = None,
    *,
    stream: WeightStream | None = None,
) -> None:
    """Let every module that has weights of its own bring them onto a device for its forward.

    Args:
        module: The outermost module.
        execution_device: The device.
        offload: Keep the weights in `weights_map` between forwards.
        weights_map: Weights by full name; by default each module's own, in host memory.
        offload_buffers: Offload buffers, too.
        module_name: The outermost module's name in `weights_map`.
        skip_keys: Keyword arguments that stay on their device.
        preload_module_classes: Classes of modules that use the weights of modules inside them without calling these:
            all their weights are brought at once.
        tied_params_map: Parameters that are already on a device.
        stream: Brings the weights ahead of need; by default a new one.
    """
    stream = WeightStream() if stream is None else stream
    is_whole = offload and _needs_all_weights(module, preload_module_classes)
    if is_whole or _has_tensors(module):
        prefix = f"{module_name}." if module_name else ""
        hook = AlignDevicesHook(
            execution_device=execution_device,
            offload=offload,
            weights_map=None if weights_map is None else PrefixedDataset(weights_map, prefix),
            offload_buffers=offload_buffers,
            place_submodules=is_whole,
            skip_keys=skip_keys,
            tied_params_map=tied_params_map,
        )
        hook.stream = stream
        add_hook_to_module(module, hook, append=True)
    if is_whole:
        return
    for name, child in module.named_children():
        attach_align_device_hook(
            child,
            execution_device,
            offload,
            weights_map,
            offload_buffers,
            f"{module_name}.{name}" if module_name else name,
            skip_keys,
            preload_module_classes,
            tied_params_map,
            stream=stream,
        )


def attach_align_device_hook_on_blocks(
    module: nn.Module,
    execution_device: Device | Mapping[str, Device] | None = None,
    offload: bool | Mapping[str, bool] = False,
    weights_map: Weights | None = None,
    offload_buffers: bool = False,
    module_name: str = "",
    skip_keys: str | list[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    tied_params_map: TiedParameters | None = None,
    *,
    stream: WeightStream | None = None,
) -> None:
    """Let the blocks of a model run each on its device, and bring the weights of some of them there when they run.

    Args:
        module: The model.
        execution_device: One device, or one by name of a block.
        offload: Whether weights are kept in `weights_map`, for all blocks or by name.
        weights_map: Weights by full name.
        offload_buffers: Offload buffers, too.
        module_name: The model's name in `weights_map`.
        skip_keys: Keyword arguments that stay on their device.
        preload_module_classes: Classes of modules that use the weights of modules inside them without calling these.
        tied_params_map: Parameters that are already on a device.
        stream: Brings the weights ahead of need; by default a new one.
    """
    stream = WeightStream() if stream is None else stream
    blocks = _Blocks(weights_map, offload_buffers, skip_keys, preload_module_classes, tied_params_map, stream)
    if isinstance(execution_device, Mapping):
        devices: dict[str, Device | None] = dict(execution_device)
        offloaded = dict(offload) if isinstance(offload, Mapping) else dict.fromkeys(devices, offload)
    elif isinstance(offload, Mapping):
        offloaded = dict(offload)
        devices = dict.fromkeys(offloaded, execution_device)
    elif offload:
        blocks.attach_offloaded(module, module_name, execution_device, ())
        return
    else:
        hook = blocks.hook(execution_device, io_same_device=True, place_submodules=True)
        add_hook_to_module(module, hook)
        return
    blocks.attach(module, module_name, devices, offloaded)


def _entry(name: str, module: str, devices: Mapping[str, Any]) -> str:
    """The innermost entry inside a module that a tensor of it is in; empty if there is none."""
    while name != module and name not in devices:
        name = name.rpartition(".")[0]
    return "" if name == module else name


class _Blocks:
    """Adds hooks to the blocks of a model; the arguments are those of `attach_align_device_hook_on_blocks`."""

    def __init__(
        self,
        weights: Weights | None,
        offload_buffers: bool,
        skip_keys: str | list[str] | None,
        preload: Sequence[str] | None,
        tied: TiedParameters | None,
        stream: WeightStream,
    ) -> None:
        self._weights = weights
        self._offload_buffers = offload_buffers
        self._skip_keys = skip_keys
        self._preload = preload
        self._tied = tied
        self._stream = stream

    def hook(self, device: Device | None, **settings: Any) -> AlignDevicesHook:
        """Make a hook for a module whose weights stay on its device."""
        return AlignDevicesHook(device, skip_keys=self._skip_keys, tied_params_map=self._tied, **settings)

    def attach(
        self, module: nn.Module, name: str, devices: Mapping[str, Device | None], offloaded: Mapping[str, bool]
    ) -> None:
        """Add hooks to a module and those inside it."""
        if name in devices and name in offloaded:
            device = devices[name]
            if offloaded[name]:
                self.attach_offloaded(module, name, device, self._preload)
                if not hasattr(module, "_hf_hook"):
                    add_hook_to_module(module, self.hook(device, io_same_device=not name))
                attach_execution_device_hook(module, device, self._skip_keys, self._preload, self._tied)
            else:
                resident = self.hook(
                    device, io_same_device=not name, place_submodules=True, offload_buffers=self._offload_buffers
                )
                add_hook_to_module(module, resident)
                attach_execution_device_hook(module, device, self._skip_keys, None, self._tied)
        elif self._attach_to_tensors(module, name, devices, offloaded):
            return
        for child_name, child in module.named_children():
            self.attach(child, f"{name}.{child_name}" if name else child_name, devices, offloaded)

    def _attach_to_tensors(
        self, module: nn.Module, name: str, devices: Mapping[str, Device | None], offloaded: Mapping[str, bool]
    ) -> bool:
        """Add a hook to a module that was split: its tensors have devices, but not the module.

        Returns:
            Whether the hook brings the weights of the modules inside it, too, so that these need none.
        """
        prefix = f"{name}." if name else ""
        is_whole = _needs_all_weights(module, self._preload)
        tensors_of = functools.partial(named_module_tensors, module, recurse=is_whole)
        entries = {key: _entry(f"{prefix}{key}", name, devices) for key, _ in tensors_of()}
        device = next((devices[entry] for entry in entries.values() if entry), None) if name else devices.get("")
        movable = dict(tensors_of(include_buffers=self._offload_buffers, remove_non_persistent=True))
        if any(entries[key] and offloaded.get(entries[key]) for key in movable):
            hook = self.hook(
                device,
                io_same_device=not name,
                offload=True,
                weights_map=self._stored(movable, prefix),
                offload_buffers=self._offload_buffers,
                place_submodules=is_whole,
            )
            hook.stream = self._stream
            add_hook_to_module(module, hook)
            return is_whole
        if any(entries.values()) or not name:
            add_hook_to_module(module, self.hook(device, io_same_device=not name))
        return False

    def _stored(self, tensors: Mapping[str, torch.Tensor], prefix: str) -> Weights:
        """The weights of a module that is brought as a whole, also of those that only have them in the module."""
        stored = {} if self._weights is None else self._weights
        if all(f"{prefix}{key}" in stored for key in tensors):
            return PrefixedDataset(stored, prefix)
        return {
            key: stored[f"{prefix}{key}"] if f"{prefix}{key}" in stored else tensor.to("cpu")
            for key, tensor in tensors.items()
        }

    def attach_offloaded(
        self, module: nn.Module, name: str, device: Device | None, preload: Sequence[str] | None
    ) -> None:
        """Add hooks to a block whose weights are kept somewhere else."""
        attach_align_device_hook(
            module,
            device,
            True,
            self._weights,
            self._offload_buffers,
            name,
            self._skip_keys,
            preload,
            self._tied,
            stream=self._stream,
        )
