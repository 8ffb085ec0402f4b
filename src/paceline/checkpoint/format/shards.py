"""Tensor shards and optimizer states in the form that every strategy can provide.

Each engine shards differently, but every scheme in use (whole copies, FSDP2's rows, ZeRO's flat partitions) leaves
each rank one contiguous range of the tensor in row-major order. That range is what a rank saves, and what it needs
when a state is loaded by other ranks or under another strategy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["OptimizerState", "Slot", "TensorShard"]

Number = float | int | bool | None


@dataclass(frozen=True, slots=True)
class TensorShard:
    """The contiguous range of one tensor that one rank has, in live memory.

    Attributes:
        shape: Shape of the whole tensor.
        start: Index of the first element of the range in the whole tensor, in row-major order.
        values: Elements `[start, stop)`, in a tensor of any shape. Writing into it changes what is trained, once
            `Strategy.state_written` was called.
    """

    shape: tuple[int, ...]
    start: int
    values: Tensor

    @classmethod
    def whole(cls, tensor: Tensor) -> TensorShard:
        """A tensor that this rank has all of."""
        return cls(tuple(tensor.shape), 0, tensor.detach())

    @property
    def stop(self) -> int:
        """Index after the last element of the range."""
        return self.start + self.values.numel()

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype

    def flat(self) -> Tensor:
        """The range as a tensor of one dimension: a view if memory allows, else a copy."""
        return self.values.reshape(-1)

    def write(self, start: int, values: Tensor) -> None:
        """Copy `values` [n] over elements `[start, start + n)` of the whole tensor."""
        begin = start - self.start
        if self.values.is_contiguous():
            self.values.view(-1)[begin : begin + values.numel()].copy_(values)
            return
        flat = self.values.reshape(-1)
        flat[begin : begin + values.numel()].copy_(values)
        self.values.copy_(flat.view(self.values.shape))


@dataclass(frozen=True, slots=True)
class Slot:
    """Shape and dtype of a whole tensor, such as one of an optimizer's state."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(slots=True)
class OptimizerState:
    """An optimizer's state by parameter name.

    Attributes:
        slots: For each parameter, its tensors by their names in torch (`exp_avg`, `exp_avg_sq`, ...). A step count is
            always the slot `step`, of shape [] and fp32, however the engine stores it.
        numbers: For each parameter, its values that are not tensors.
        groups: For each parameter group its options, as JSON can hold them, and under `params` the names.
    """

    slots: dict[str, dict[str, TensorShard]] = field(default_factory=dict)
    numbers: dict[str, dict[str, Number]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
