"""FSDP2's switches for overlapping communication with computation, where the installed torch has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule

from paceline.errors import PrepareError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from paceline.config import FullyShardedDataParallelPlugin

__all__ = ["check_switches", "describe_switches", "set_switches"]

# Setting, its value without the switch, and FSDP2's method.
_METHODS: tuple[tuple[str, Any, str], ...] = (
    ("separate_reduce_scatter_group", False, "set_separate_reduce_scatter_group"),
    ("reduce_scatter_buffers", 1, "set_reduce_scatter_max_input_buffers"),
    ("find_unused_parameters", False, "set_reduce_scatter_unused_params"),
)


def check_switches(plugin: FullyShardedDataParallelPlugin) -> None:
    """Refuse settings for which the installed torch has no switch.

    Raises:
        PrepareError: It names the setting and the method.
    """
    for setting, off, method in _METHODS:
        if getattr(plugin, setting) != off and not hasattr(FSDPModule, method):
            raise PrepareError(
                f"fsdp_{setting} is {getattr(plugin, setting)}, and torch {torch.__version__} is installed",
                f"Its FSDP2 has no {method}",
                f"Leave fsdp_{setting} out, or install torch 2.13 or later",
            )


def set_switches(
    model: nn.Module, units: Sequence[str], plugin: FullyShardedDataParallelPlugin
) -> tuple[FSDPModule, ...]:
    """Set the switches of a sharded model. Collective with a separate group for reduce-scatter.

    Args:
        model: Sharded as a whole.
        units: Names of the units inside it, in the order in which they are computed.
        plugin: The settings.

    Returns:
        The units whose parameters stay gathered after a forward.
    """
    assert isinstance(model, FSDPModule)
    inner = [module for module in map(model.get_submodule, units) if isinstance(module, FSDPModule)]
    if plugin.prefetch_units:
        _prefetch(model, inner, plugin.prefetch_units)
    for setting, off, method in _METHODS:
        value = getattr(plugin, setting)
        if value != off:
            getattr(model, method)(value)
    if plugin.reshard_after_forward is False:
        return (*inner, model)
    if plugin.reshard_after_forward is not True or not plugin.keep_last_unit or not inner:
        return ()
    # The backward begins with the last unit and what follows it, which would be gathered again at once.
    kept = (inner[-1], model)
    for unit in kept:
        module: Any = unit
        unit.set_reshard_after_forward(False, recurse=False)
        module.register_forward_hook(_drop_without_gradients)
    return kept


def _drop_without_gradients(unit: Any, _inputs: Any, _output: Any) -> None:
    """Drop gathered parameters after a forward that no backward follows."""
    if not torch.is_grad_enabled():
        unit.reshard()


def _prefetch(model: FSDPModule, inner: Sequence[FSDPModule], count: int) -> None:
    """Gather the next units while one is computed, in forward and backward."""
    model.set_modules_to_forward_prefetch(list(inner[:count]))
    for i, unit in enumerate(inner):
        unit.set_modules_to_forward_prefetch(list(inner[i + 1 : i + 1 + count]))
        unit.set_modules_to_backward_prefetch(list(inner[max(0, i - count) : i])[::-1])


def describe_switches(plugin: FullyShardedDataParallelPlugin) -> list[str]:
    """Describe the switches that are on, in a few words each."""
    texts = []
    if plugin.reshard_after_forward is True and plugin.keep_last_unit:
        texts.append("but for the last unit and the rest")
    if plugin.prefetch_units:
        texts.append(f"{plugin.prefetch_units} units gathered ahead")
    if plugin.separate_reduce_scatter_group:
        texts.append("gradients reduced in a group of their own")
    if plugin.reduce_scatter_buffers > 1:
        texts.append(f"{plugin.reduce_scatter_buffers} buffers of gradients")
    if plugin.find_unused_parameters:
        texts.append("unused parameters have zero gradients")
    return texts
