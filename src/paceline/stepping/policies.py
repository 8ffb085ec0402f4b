"""What an accumulation window divides by, and who says where it ends; both can be exchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["TRUE_MEAN", "GradientBoundary", "OwnBoundary", "WindowPolicy"]


class GradientBoundary(Protocol):
    """Holds whether the current micro-batch is the last of its window. The window and the script both set it."""

    sync_gradients: bool


@dataclass(slots=True)
class OwnBoundary:
    """A boundary of one Accelerator."""

    sync_gradients: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPolicy:
    """How the gradients of a window become a mean.

    Attributes:
        divide_by: `micro_batches` divides by what was in the window, so that a short last one weighs as much per
            sample as the others. `num_steps` always divides by the length of a full window, within `accumulate` and
            outside of it, as Accelerate does.
    """

    divide_by: Literal["micro_batches", "num_steps"] = "micro_batches"


TRUE_MEAN = WindowPolicy()
"""Divides by what was in the window."""
