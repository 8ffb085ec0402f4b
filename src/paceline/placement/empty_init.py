"""Models built without memory for their weights, or straight on a device."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paceline.placement.tensors import is_same_device

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["init_empty_weights", "init_on_device"]


@contextmanager
def init_empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Build the models of this block on the meta device: they have shapes and dtypes, but no memory.

    Args:
        include_buffers: Put buffers there, too. Those that no checkpoint holds (rotary frequencies, masks) then have no
            values.

    Example:
        >>> from torch import nn
        >>> from paceline.placement import init_empty_weights
        >>> with init_empty_weights():
        ...     model = nn.Linear(10_000, 10_000)
        >>> model.weight.device
        device(type='meta')
    """
    with init_on_device(torch.device("meta"), include_buffers=include_buffers):
        yield


@contextmanager
def init_on_device(device: torch.device, include_buffers: bool = False) -> Iterator[None]:
    """Build the models of this block on a device.

    Args:
        device: The device.
        include_buffers: Build buffers there, too.
    """
    if include_buffers:
        with torch.device(device):
            yield
        return
    register = nn.Module.register_parameter

    def register_on_device(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        # One that is there already, under another name, stays the same one: tied weights.
        if parameter is not None and not is_same_device(parameter.device, device):
            module._parameters[name] = _moved(parameter, device)

    nn.Module.register_parameter = register_on_device  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _moved(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """The parameter on a device: of the same class, with the same attributes."""
    attributes = dict(vars(parameter))
    marks = {name: attributes.pop(name) for name in ("_is_hf_initialized",) if name in attributes}
    kind: Any = type(parameter)
    moved: nn.Parameter = kind(parameter.to(device), requires_grad=parameter.requires_grad, **attributes)
    vars(moved).update(marks)
    return moved
