"""The memory footprint of the training state, measured on the model and the optimizer's class."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.optim import Optimizer

# Optimizer state of Adam in fp32; assumed when an optimizer cannot be probed, and before one is known.
_ADAM_BYTES_PER_ELEMENT = 8.0
_PROBE_ELEMENTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of one unsharded copy of the training state, without activations.

    Attributes:
        parameters: All parameters and buffers.
        gradients: The gradients of all trainable parameters.
        optimizer: The state of the optimizers.
        placed: How much of `parameters` is already on the device.
    """

    parameters: int
    gradients: int
    optimizer: int
    placed: int = 0

    @property
    def total(self) -> int:
        """The sum of parameters, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer


def measure(models: Iterable[nn.Module], optimizers: Iterable[Optimizer], device: torch.device) -> Footprint:
    """Measure the training state of these models and optimizers.

    Args:
        models: Before they are placed or sharded; those on the meta device count too.
        optimizers: Each is probed with a small parameter. Without any, Adam in fp32 is assumed.
        device: The device that training will use.
    """
    tensors = list({id(t): t for model in models for t in (*model.parameters(), *model.buffers())}.values())
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    return Footprint(
        parameters=_num_bytes(tensors),
        gradients=_num_bytes(trained),
        optimizer=_optimizer_bytes(trained, optimizers),
        placed=_num_bytes(tensor for tensor in tensors if tensor.device.type == device.type),
    )


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _optimizer_bytes(trained: Iterable[torch.Tensor], optimizers: Iterable[Optimizer]) -> int:
    per_element = {id(p): cost for optimizer in optimizers for p, cost in _state_costs(optimizer)}
    default = 0.0 if per_element else _ADAM_BYTES_PER_ELEMENT
    return int(sum(p.numel() * per_element.get(id(p), default) for p in trained))


def _state_costs(optimizer: Optimizer) -> Iterable[tuple[torch.Tensor, float]]:
    for group in optimizer.param_groups:
        costs: dict[torch.dtype, float] = {}
        for parameter in group["params"]:
            dtype = parameter.dtype
            if dtype not in costs:
                costs[dtype] = _bytes_per_element(type(optimizer), group, dtype)
            yield parameter, costs[dtype]


def _bytes_per_element(cls: type[Optimizer], group: dict[str, Any], dtype: torch.dtype) -> float:
    """Let an optimizer of this class take one step on a small parameter, and measure its state."""
    settings = {key: copy.copy(value) for key, value in group.items() if key not in ("params", "initial_lr")}
    # Fused and capturable kernels may not exist on the CPU; their state is the same.
    settings |= {key: False for key in ("fused", "foreach", "capturable") if key in settings}
    probe = nn.Parameter(torch.zeros(_PROBE_ELEMENTS // 32, 32, dtype=dtype))
    probe.grad = torch.zeros_like(probe)
    try:
        trial: Any = cls([{"params": [probe], **settings}], **_required(cls, settings))
        trial.step()
    except Exception:
        # Some optimizers need a closure or a compiled kernel, which do not matter for an estimate.
        return _ADAM_BYTES_PER_ELEMENT
    state = [value for value in trial.state[probe].values() if torch.is_tensor(value) and value.numel() > 1]
    return sum(value.numel() * value.element_size() for value in state) / _PROBE_ELEMENTS


def _required(cls: type[Optimizer], settings: dict[str, Any]) -> dict[str, Any]:
    """Some optimizers require `lr` even when every group has its own."""
    return {"lr": settings["lr"]} if "lr" in settings else {}
