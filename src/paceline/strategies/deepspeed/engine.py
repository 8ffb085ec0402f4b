"""One model in training under DeepSpeed: its engine, and what went into it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from paceline.strategies.deepspeed.partitions import Partitions, PartitionSlice


@dataclass(slots=True, eq=False)
class ZeroEngine:
    """One model in training: its engine, and what went into it."""

    engine: Any
    model: nn.Module
    given: Optimizer
    partitions: Partitions
    groups: list[list[nn.Parameter]]
    dtypes: dict[int, torch.dtype]
    # Where it is in a window: whether the next backward ends it, whether one did, and whether it was clipped.
    ends: bool = True
    ended: bool = False
    clipped: bool = False
    # Whether a forward ran whose loss has not come back yet.
    pending: bool = False
    steps: dict[int, tuple[PartitionSlice, list[Tensor]]] = field(default_factory=dict)

    @property
    def optimizer(self) -> Any:
        """The optimizer that holds the states: the user's own, or the one that the configuration describes."""
        return self.engine.basic_optimizer


def let_go(engine: Any) -> None:
    """End an engine, so that it can be collected with its model and its buckets of some GiB.

    Its hooks hang on autograd's accumulators of gradients, where the collector does not see them, and ZeRO-3 keeps a
    list of all models that it ever sharded.
    """
    from deepspeed.runtime.zero import parameter_offload

    engine.destroy()
    sharded = parameter_offload.FWD_MODULE_STACK
    sharded[:] = [module for module in sharded if module is not engine.module]
