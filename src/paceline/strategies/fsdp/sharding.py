"""From whole parameters to shards: who owns which, where the values come from, and what replaced what."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from paceline.errors import PrepareError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from paceline.collectives import Group

Owner = tuple[nn.Module, str]


class Ownership:
    """Which module attributes hold which parameter, so that ties survive a replacement."""

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[int, tuple[nn.Parameter, list[Owner]]] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self._owners.setdefault(id(parameter), (parameter, []))[1].append((module, name))
        self._first = {key: key for key in self._owners}

    def __iter__(self) -> Iterator[tuple[nn.Parameter, list[Owner]]]:
        """Yield every parameter as it was at first, with the attributes that held it."""
        return iter(self._owners.values())

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Put `new` wherever `old` is."""
        first = self._first[id(old)]
        for module, name in self._owners[first][1]:
            setattr(module, name, new)
        self._first[id(new)] = first

    def check_ties(self, names: dict[int, str]) -> None:
        """Make sure that what was one parameter still is one.

        Raises:
            PrepareError: A tie broke; names the parameter.
        """
        for old, owners in self:
            current = {id(getattr(module, name)) for module, name in owners}
            if len(current) > 1:
                raise PrepareError(
                    f"The tied weight {names.get(id(old), '?')} became {len(current)} separate parameters",
                    "Each copy would get a part of the gradient",
                    "Name blocks that do not hold one half of the tie",
                )


class Replacements:
    """Which sharded parameter stands where a whole one stood, for optimizers built before or after."""

    def __init__(self) -> None:
        self._new: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def record(self, ownership: Ownership) -> None:
        """Note what every owner holds now, and let go of the whole parameters' memory."""
        for old, owners in ownership:
            module, name = owners[0]
            new = getattr(module, name)
            if new is not old:
                self._new[id(old)] = (weakref.ref(old), new)
                # An optimizer may hold the old one for a while; its values live on in the shards.
                old.data = old.data.new_empty(0)

    def renew(self, optimizer: Optimizer) -> None:
        """Point an optimizer at the shards, and shard the state that it already has."""
        for group in optimizer.param_groups:
            group["params"] = [self.resolve_placeholder_optimizer(p) for p in group["params"]]
        for old in list(optimizer.state):
            new = self.resolve_placeholder_optimizer(old)
            if new is not old:
                state = optimizer.state.pop(old)
                optimizer.state[new] = {key: _like(value, new) for key, value in state.items()}

    def has_replaced(self, parameter: nn.Parameter) -> bool:
        """Whether a shard stands in place of this parameter."""
        return self.resolve_placeholder_optimizer(parameter) is not parameter

    def resolve_placeholder_optimizer(self, parameter: Any) -> Any:
        """What stands where a whole parameter stood; any other is its own successor."""
        held, new = self._new.get(id(parameter), (None, parameter))
        return new if held is not None and held() is parameter else parameter


def _like(value: Any, parameter: nn.Parameter) -> Any:
    """Shard a state tensor of the parameter's full shape; anything else (a step count) stays."""
    if not isinstance(parameter, DTensor) or not torch.is_tensor(value) or value.shape != parameter.shape:
        return value
    mesh = parameter.device_mesh
    sharded = distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements)
    return sharded.to(parameter.to_local().device)


def materialize(
    parameters: Iterable[nn.Parameter],
    buffers: Iterable[tuple[nn.Module, str]],
    ownership: Ownership,
    device: torch.device,
    group: Group,
) -> None:
    """Bring one unit's values onto the device, the same on all ranks: those of rank 0.

    Only this unit is ever whole on the device. A parameter on the meta device costs no host memory; it gets its
    values from rank 0, so a machine needs one copy of the model, not one a rank.
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
    """Give a model that has no values anywhere its first ones, as its modules' constructors would have.

    Raises:
        PrepareError: A module holds meta parameters and has no `reset_parameters`; names it.
    """
    helpless = []
    for name, module in model.named_modules():
        own = [p for _, p in module.named_parameters(recurse=False)]
        if not any(p.is_meta for p in own):
            continue
        reset: Callable[[], Any] | None = getattr(module, "reset_parameters", None)
        if reset is None:
            helpless.append(name or type(module).__name__)
            continue
        for parameter in own:
            if parameter.is_meta:
                empty = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                ownership.replace(parameter, empty)
        reset()
    if helpless:
        raise PrepareError(
            f"The model of rank 0 is on the meta device, and {', '.join(helpless[:5])} has no reset_parameters()",
            "Nobody has values to start from",
            "Build the model with real values on rank 0, or give its modules a reset_parameters method",
        )


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[tuple[Tensor, Sequence[Any], Any]]:
    """This rank's part of every gradient, with the placements and the mesh it is a part of (plain ones: none)."""
    found: list[tuple[Tensor, Sequence[Any], Any]] = []
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            found.append((gradient.to_local(), gradient.placements, gradient.device_mesh))
        elif gradient is not None:
            found.append((gradient, (), None))
    return found


def sharded_axes(placements: Sequence[Any]) -> tuple[int, ...]:
    """The mesh axes over which a tensor with these placements is cut into parts."""
    return tuple(axis for axis, placement in enumerate(placements) if isinstance(placement, Shard))
