"""The run as a strategy sees it, and the names of distributed types in configuration files."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.config.leniency import STRICT

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from paceline.collectives import Group
    from paceline.config import Leniency, RunConfig
    from paceline.environment.world import World
    from paceline.strategies.precision import PrecisionPolicy


class DistributedType(str, enum.Enum):
    """How a run is distributed, by the names in configuration files."""

    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    MULTI_XPU = "MULTI_XPU"
    MULTI_NPU = "MULTI_NPU"
    FSDP = "FSDP"
    DEEPSPEED = "DEEPSPEED"

    def __str__(self) -> str:
        return self.value


def unknown_length() -> None:
    """The steps that are left in a run of unknown length."""


def unknown_source(key: str) -> str:
    """The place where a setting was made, where nobody knows any."""
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """Everything that a strategy knows of its run.

    Attributes:
        world: This process's rank, and the number of ranks.
        device: The device of this rank.
        group: All ranks that share the global batch.
        precision: The dtype of the forward, and autocast.
        config: The resolved configuration.
        leniency: What is tolerated.
        source_of: Returns for a dotted key of the configuration where its value was set.
        remaining_steps: Returns how many optimizer steps are left; None while nobody knows.
    """

    world: World
    device: torch.device
    group: Group
    precision: PrecisionPolicy
    config: RunConfig
    leniency: Leniency = STRICT
    source_of: Callable[[str], str] = unknown_source
    remaining_steps: Callable[[], int | None] = unknown_length
