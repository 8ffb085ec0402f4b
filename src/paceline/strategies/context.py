"""What a strategy is told about the run, and what its kind is called in configuration files."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from paceline.collectives import Group
    from paceline.config import RunConfig
    from paceline.environment.world import World
    from paceline.precision import PrecisionPolicy


class DistributedType(str, enum.Enum):
    """How a run is distributed, under the names that configuration files use."""

    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    MULTI_XPU = "MULTI_XPU"
    MULTI_NPU = "MULTI_NPU"
    FSDP = "FSDP"
    DEEPSPEED = "DEEPSPEED"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """All that a strategy may know of the run around it.

    Attributes:
        world: Which rank this is, among how many.
        device: Where this rank computes.
        group: All ranks that share the global batch.
        precision: The number format of the forward.
        config: The run's configuration, complete and checked.
    """

    world: World
    device: torch.device
    group: Group
    precision: PrecisionPolicy
    config: RunConfig
