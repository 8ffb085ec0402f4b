"""Times optimizer steps on a device without making the host wait in each of them."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch

__all__ = ["StepTimer"]

# Optimizer steps whose shortest is what a step takes.
TIMED_STEPS = 4


class StepTimer:
    """Lets some steps pass, and times those that follow.

    Args:
        device: Where steps compute.
        ignored: How many steps pass first, which allocate and tune.

    Attributes:
        has_idled: Whether the device was through with each step that was timed before the host had queued the next one.
    """

    def __init__(self, device: torch.device, ignored: int) -> None:
        self.has_idled = False
        self._device = device
        self._ignored = ignored
        self._steps = 0
        self._marks: list[Any] = []

    def restart(self, ignored: int) -> None:
        """Begin anew with the next step.

        Args:
            ignored: How many steps pass first.
        """
        self._ignored = ignored
        self._steps = 0
        self._marks = []

    def stepped(self) -> float | None:
        """Take note of the end of a step.

        Returns:
            After the last step that is timed, the seconds of the shortest, for which the host waits; else None.
        """
        self._steps += 1
        timed = self._steps - self._ignored
        if not 0 <= timed <= TIMED_STEPS:
            return None
        self._mark()
        return self._shortest() if timed == TIMED_STEPS else None

    def _mark(self) -> None:
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
            self.has_idled = True
            return
        self.has_idled = not self._marks or (self.has_idled and self._marks[-1].query())
        event = torch.Event(device=self._device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._device))
        self._marks.append(event)

    def _shortest(self) -> float:
        marks, self._marks = self._marks, []
        if self._device.type == "cpu":
            return float(min(late - early for early, late in pairwise(marks)))
        marks[-1].synchronize()
        return float(min(early.elapsed_time(late) for early, late in pairwise(marks))) / 1000
