"""What every strategy can say of its state: which run of which tensor this rank holds.

A sharded tensor is cut differently by each engine, but every cut in use (whole copies, FSDP2's rows, ZeRO's flat
partitions) leaves each rank one contiguous run of the tensor laid out row by row. That run is what is saved, and
what is asked for when a state is loaded on other ranks or by another strategy.
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
    """One rank's run of one tensor, in live memory.

    Attributes:
        shape: Of the whole tensor.
        start: Index of the run's first element in the whole tensor, laid out row by row.
        values: The run. Of any shape; laid out row by row it is elements `[start, stop)`. Writing into it in place
            changes what is trained, once the strategy has been told by `state_written`.
    """

    shape: tuple[int, ...]
    start: int
    values: Tensor

    @classmethod
    def whole(cls, tensor: Tensor) -> TensorShard:
        """A tensor of which this rank holds all."""
        return cls(tuple(tensor.shape), 0, tensor.detach())

    @property
    def stop(self) -> int:
        """Index after the run's last element."""
        return self.start + self.values.numel()

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    def flat(self) -> Tensor:
        """The run as one dimension: a view where the memory allows it, else a copy."""
        return self.values.reshape(-1)

    def write(self, start: int, values: Tensor) -> None:
        """Copy `values` (one dimension) over the run's elements from index `start` of the whole tensor on."""
        begin = start - self.start
        if self.values.is_contiguous():
            self.values.view(-1)[begin : begin + values.numel()].copy_(values)
            return
        flat = self.values.reshape(-1)
        flat[begin : begin + values.numel()].copy_(values)
        self.values.copy_(flat.view(self.values.shape))


@dataclass(frozen=True, slots=True)
class Slot:
    """What one tensor of an optimizer's state looks like when whole."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(slots=True)
class OptimizerState:
    """An optimizer's state by the names of the parameters that it is about.

    Attributes:
        slots: For each parameter, its tensors by torch's names of them (`exp_avg`, `exp_avg_sq`, ...). A count of
            steps is always the slot `step`, of shape [] and fp32, however the engine keeps it.
        numbers: For each parameter, what is no tensor.
        groups: For each parameter group its options, as JSON can hold them, and under `params` the names.
    """

    slots: dict[str, dict[str, TensorShard]] = field(default_factory=dict)
    numbers: dict[str, dict[str, Number]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
