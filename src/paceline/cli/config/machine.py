"""What the questionnaire looks up about the machine before it asks."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Machine", "look_around"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The facts from which questions and their defaults follow.

    Attributes:
        devices: How many accelerators are visible.
        device_name: One of them, in a phrase; the CPU without any.
        processes: How many processes a launch without settings would start.
        precisions: What the device computes in.
        has_deepspeed: Whether the package is installed.
        env: The environment, where a scheduler may say more.
    """

    devices: int
    device_name: str
    processes: int
    precisions: frozenset[str]
    has_deepspeed: bool
    env: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.devices} x {self.device_name}" if self.devices > 1 else self.device_name


def look_around(env: Mapping[str, str]) -> Machine:
    """Look at this machine; torch is imported for that."""
    import torch

    from paceline.environment.device import describe_device, supported_precisions
    from paceline.launch.accelerators import count_accelerators, detect

    kind, count = count_accelerators()
    device = torch.device("cpu") if kind is None else torch.device(kind, 0)
    processes = detect(env)["num_processes"]
    assert isinstance(processes, int)
    return Machine(
        devices=count,
        device_name=describe_device(device),
        processes=processes,
        precisions=supported_precisions(device),
        has_deepspeed=importlib.util.find_spec("deepspeed") is not None,
        env=env,
    )
