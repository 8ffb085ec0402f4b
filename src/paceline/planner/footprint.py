"""How many bytes training a model takes, measured on the model and the optimizer class at hand."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.optim import Optimizer

# What Adam in fp32 keeps for an element; taken when an optimizer cannot be tried out, and before one is known.
_ADAM_BYTES_PER_ELEMENT = 8.0
_PROBE_ELEMENTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of one whole copy of the training state; activations come on top.

    Attributes:
        parameters: All parameters and buffers.
        gradients: One for each trainable parameter.
        optimizer: What the optimizers keep between steps.
        placed: How much of it is on the device already.
    """

    parameters: int
    gradients: int
    optimizer: int
    placed: int = 0

    @property
    def total(self) -> int:
        """All of it together."""
        return self.parameters + self.gradients + self.optimizer


def measure(models: Iterable[nn.Module], optimizers: Iterable[Optimizer], device: torch.device) -> Footprint:
    """Measure what training these models with these optimizers keeps in memory.

    Args:
        models: Before they are placed or sharded; those on the meta device count too.
        optimizers: Each is tried out on a small parameter. Without any, Adam in fp32 is assumed.
        device: Where training will run.
    """
    tensors = {id(t): t for model in models for t in (*model.parameters(), *model.buffers())}
    trained = [t for t in tensors.values() if t.requires_grad]
    per_element = {id(p): cost for opt in optimizers for p, cost in _state_costs(opt)}
    default = _ADAM_BYTES_PER_ELEMENT if not per_element else 0.0
    state = sum(p.numel() * per_element.get(id(p), default) for p in trained)
    return Footprint(
        parameters=sum(t.numel() * t.element_size() for t in tensors.values()),
        gradients=sum(t.numel() * t.element_size() for t in trained),
        optimizer=int(state),
        placed=sum(t.numel() * t.element_size() for t in tensors.values() if t.device.type == device.type),
    )


def _state_costs(optimizer: Optimizer) -> Iterable[tuple[torch.Tensor, float]]:
    for group in optimizer.param_groups:
        costs: dict[torch.dtype, float] = {}
        for parameter in group["params"]:
            dtype = parameter.dtype
            if dtype not in costs:
                costs[dtype] = _bytes_per_element(type(optimizer), group, dtype)
            yield parameter, costs[dtype]


def _bytes_per_element(cls: type[Optimizer], group: dict[str, Any], dtype: torch.dtype) -> float:
    """Let an optimizer of this class take one step on a small parameter and weigh what it keeps."""
    settings = {key: copy.copy(value) for key, value in group.items() if key not in ("params", "initial_lr")}
    # Fused and capturable kernels may not exist for a probe on the CPU; what they keep is the same.
    settings |= {key: False for key in ("fused", "foreach", "capturable") if key in settings}
    probe = nn.Parameter(torch.zeros(_PROBE_ELEMENTS // 32, 32, dtype=dtype))
    probe.grad = torch.zeros_like(probe)
    try:
        trial: Any = cls([{"params": [probe], **settings}], **_required(cls, settings))
        trial.step()
    except Exception:
        # Some optimizers step through a closure or a compiled kernel; none of that matters for an estimate.
        return _ADAM_BYTES_PER_ELEMENT
    kept = [value for value in trial.state[probe].values() if torch.is_tensor(value) and value.numel() > 1]
    return sum(value.numel() * value.element_size() for value in kept) / _PROBE_ELEMENTS


def _required(cls: type[Optimizer], settings: dict[str, Any]) -> dict[str, Any]:
    """`lr` is a required argument of some optimizers even when every group brings its own."""
    return {"lr": settings["lr"]} if "lr" in settings else {}
