"""What the questionnaire detects about the machine before it asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paceline.config.packages import is_installed

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Machine", "detect_machine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine, as far as questions and their defaults depend on it.

    Attributes:
        devices: Number of visible accelerators.
        device_name: One of them, or the CPU, in words.
        processes: Number of processes that a launch without settings starts.
        precisions: The precisions that the device supports.
        has_deepspeed: Whether DeepSpeed is installed.
        env: The environment, with the variables of a scheduler.
    """

    devices: int
    device_name: str
    processes: int
    precisions: frozenset[str]
    has_deepspeed: bool
    env: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.devices} x {self.device_name}" if self.devices > 1 else self.device_name


def detect_machine(env: Mapping[str, str]) -> Machine:
    """Detect this machine; imports torch."""
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
        has_deepspeed=is_installed("deepspeed"),
        env=env,
    )
