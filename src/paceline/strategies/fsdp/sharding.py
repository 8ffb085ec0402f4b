"""Replaces whole parameters by shards: in their modules, with rank 0's values, and in optimizers."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from paceline.errors import PrepareError, named
from paceline.strategies.precision import short_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from paceline.collectives import Group

Owner = tuple[nn.Module, str]


class Ownership:
    """Which module attributes refer to which parameter, so that tied weights stay tied when they are replaced."""

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[int, tuple[nn.Parameter, list[Owner]]] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self._owners.setdefault(id(parameter), (parameter, []))[1].append((module, name))
        self._first = {key: key for key in self._owners}

    def __iter__(self) -> Iterator[tuple[nn.Parameter, list[Owner]]]:
        """Yield every original parameter with the attributes that referred to it."""
        return iter(self._owners.values())

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Put `new` in place of `old` everywhere."""
        first = self._first[id(old)]
        for module, name in self._owners[first][1]:
            setattr(module, name, new)
        self._first[id(new)] = first

    def check_ties(self, names: dict[int, str]) -> None:
        """Make sure that tied weights are still tied.

        Raises:
            PrepareError: They are not; it names the parameter.
        """
        for old, owners in self:
            current = {id(getattr(module, name)) for module, name in owners}
            if len(current) > 1:
                raise PrepareError(
                    f"The tied weight {names.get(id(old), '?')} became {len(current)} separate parameters",
                    "Each copy would get only a part of the gradient",
                    "Name blocks that contain all uses of the weight, or none",
                )


class Replacements:
    """Which sharded parameter replaced which whole one, for optimizers built before or after."""

    def __init__(self) -> None:
        self._new: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def record(self, ownership: Ownership) -> None:
        """Note what replaced each parameter, and free the whole parameters' memory."""
        for old, owners in ownership:
            module, name = owners[0]
            new = getattr(module, name)
            if new is not old:
                self._new[id(old)] = (weakref.ref(old), new)
                # An optimizer may refer to the old one until it is rebound; the shards have the values.
                old.data = old.data.new_empty(0)

    def rebind(self, optimizer: Optimizer) -> None:
        """Point an optimizer at the shards, and shard the state that it already has."""
        for group in optimizer.param_groups:
            group["params"] = [self.replacement_of(p) for p in group["params"]]
        for old in list(optimizer.state):
            new = self.replacement_of(old)
            if new is not old:
                state = optimizer.state.pop(old)
                optimizer.state[new] = {key: _like(value, new) for key, value in state.items()}

    def has_replaced(self, parameter: nn.Parameter) -> bool:
        """Whether a shard replaced this parameter."""
        return self.replacement_of(parameter) is not parameter

    def replacement_of(self, parameter: Any) -> Any:
        """The shard that replaced a whole parameter; any other parameter itself."""
        old, new = self._new.get(id(parameter), (None, parameter))
        return new if old is not None and old() is parameter else parameter


def _like(value: Any, parameter: nn.Parameter) -> Any:
    """Shard a state tensor of the parameter's full shape; return anything else, such as a step count, unchanged."""
    if not isinstance(parameter, DTensor) or not torch.is_tensor(value) or value.shape != parameter.shape:
        return value
    mesh = parameter.device_mesh
    sharded = distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements)
    return sharded.to(parameter.to_local().device)


def refuse_mixed_dtypes(units: Iterable[tuple[str, nn.Module]], ignored: Iterable[nn.Module]) -> None:
    """Refuse a unit whose trainable parameters have several dtypes; torch would, in the first forward.

    Args:
        units: Each with its name, units inside others first.
        ignored: Modules that are not sharded.

    Raises:
        PrepareError: It names a parameter of each dtype.
    """
    seen = {id(p) for module in ignored for p in module.parameters()}
    for unit, module in units:
        first: dict[torch.dtype, str] = {}
        for name, parameter in module.named_parameters():
            is_whole = not isinstance(parameter, DTensor)
            if is_whole and parameter.requires_grad and id(parameter) not in seen:
                first.setdefault(parameter.dtype, f"{unit}.{name}" if unit else name)
            seen.add(id(parameter))
        if len(first) > 1:
            found = ", ".join(f"{name} is {short_dtype(dtype)}" for dtype, name in first.items())
            raise PrepareError(
                f"One FSDP2 unit has trainable parameters of {len(first)} dtypes: {found}",
                "FSDP2 gathers the parameters of a unit together, in one dtype",
                "Convert the model before prepare(), as by model.float(); mixed_precision chooses what it computes in",
            )


def refuse_hooks_of_whole(model: nn.Module) -> None:
    """Refuse hooks of parameters that shards are about to replace.

    Raises:
        PrepareError: There are some; it names the parameters.
    """
    hooked = [
        name
        for name, p in model.named_parameters()
        if not isinstance(p, DTensor) and (p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None))
    ]
    if hooked:
        raise PrepareError(
            f"{type(model).__name__} has hooks on the gradients of {named(hooked)}",
            "FSDP2 replaces each parameter by a shard, and they would never be called",
            "Register them after prepare() by register_post_accumulate_grad_hook(), where the averaged gradient is a "
            "DTensor, or change parameter.grad between backward() and step()",
        )


def materialize(
    parameters: Iterable[nn.Parameter],
    buffers: Iterable[tuple[nn.Module, str]],
    ownership: Ownership,
    device: torch.device,
    group: Group,
) -> None:
    """Move one unit's values to the device, the same on all ranks: those of rank 0.

    Only this unit is whole on the device at a time. A parameter on the meta device needs no host memory, since it gets
    its values from rank 0: a machine needs one copy of the model, not one for each rank.
    Collective: every rank must call it.
    """
    for parameter in list(parameters):
        whole = _on_device(parameter.detach(), device)
        group.broadcast(whole)
        if parameter.is_meta:
            ownership.replace(parameter, nn.Parameter(whole, requires_grad=parameter.requires_grad))
        else:
            parameter.data = whole
    for module, name in buffers:
        buffer = module.get_buffer(name)
        whole = _on_device(buffer, device)
        group.broadcast(whole)
        setattr(module, name, whole)


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.is_meta:
        return torch.empty_like(tensor, device=device, memory_format=torch.contiguous_format)
    return tensor.to(device).contiguous()


def initialize_meta(model: nn.Module, ownership: Ownership) -> None:
    """Initialize the parameters on the meta device, as their modules' constructors would have.

    Raises:
        PrepareError: A module with meta parameters has no `reset_parameters`; it names the module.
    """
    without_reset = []
    for name, module in model.named_modules():
        own = [p for _, p in module.named_parameters(recurse=False)]
        if not any(p.is_meta for p in own):
            continue
        reset: Callable[[], Any] | None = getattr(module, "reset_parameters", None)
        if reset is None:
            without_reset.append(name or type(module).__name__)
            continue
        for parameter in own:
            if parameter.is_meta:
                empty = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                ownership.replace(parameter, empty)
        reset()
    if without_reset:
        raise PrepareError(
            f"The model of rank 0 is on the meta device, and {', '.join(without_reset[:5])} has no reset_parameters()",
            "No rank has values to start from",
            "Build the model with real values on rank 0, or give its modules a reset_parameters method",
        )


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[tuple[Tensor, Sequence[Any], Any]]:
    """This rank's shard of every gradient, with its placements and mesh; () and None for plain tensors."""
    gradients: list[tuple[Tensor, Sequence[Any], Any]] = []
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradients.append((gradient.to_local(), gradient.placements, gradient.device_mesh))
        elif gradient is not None:
            gradients.append((gradient, (), None))
    return gradients


def sharded_axes(placements: Sequence[Any]) -> tuple[int, ...]:
    """The mesh axes over which a tensor with these placements is sharded."""
    return tuple(axis for axis, placement in enumerate(placements) if isinstance(placement, Shard))
