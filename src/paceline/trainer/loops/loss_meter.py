"""Losses on their way to a log: kept on the device, added up over ranks when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from paceline.accelerator.accelerator import Accelerator

__all__ = ["LossMeter"]

_FOLD_AFTER = 256


class LossMeter:
    """The mean over optimizer steps of the loss of each step.

    The loss of a step is the mean over its micro-batches and all ranks, weighted as its gradients are. Adding a loss
    costs nothing but a place in a list. Every 256 micro-batches, and when it is read, all ranks add theirs up.

    Args:
        accelerator: The ranks.
        only_finite: Leave losses out that are no finite numbers.
    """

    def __init__(self, accelerator: Accelerator, *, only_finite: bool) -> None:
        self._accelerator = accelerator
        self._only_finite = only_finite
        self._losses: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._step_of: list[int] = []
        self._steps = 0
        self._sum: Tensor | None = None
        self._count: Tensor | None = None
        self._past_sum = 0.0
        self._past_count = 0.0
        # A sum that was cut by a stop must come to the same: fp32 would show where it was cut.
        self._dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64

    def add(self, loss: Tensor, weight: Tensor | None) -> None:
        """Note the mean loss of a micro-batch, shape [], and over how much it is; None is one."""
        self._losses.append(loss)
        if weight is not None:
            self._weights.append(weight)
        self._step_of.append(self._steps)

    def end_step(self) -> None:
        """Note that an optimizer step is over. Collective now and then: every rank must call it."""
        self._steps += 1
        if len(self._losses) >= _FOLD_AFTER:
            self._fold()

    def read(self) -> tuple[float, bool]:
        """The mean since it was last read, and whether there is one; waits for the device.

        Collective: every rank must call it.
        """
        self._fold()
        if self._sum is None or self._count is None:
            return 0.0, False
        total, count = torch.stack([self._sum, self._count]).tolist()
        self._sum = self._count = None
        self._past_sum += total
        self._past_count += count
        return (total / count, True) if count else (float("nan"), True)

    def settle(self) -> None:
        """Add up what is there, for `state_dict`. Collective: every rank must call it."""
        self._fold()

    def state_dict(self) -> dict[str, float]:
        """What was added up so far."""
        open_ = [0.0, 0.0] if self._sum is None or self._count is None else [float(self._sum), float(self._count)]
        return {"sum": open_[0], "count": open_[1], "past_sum": self._past_sum, "past_count": self._past_count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on adding."""
        if state.get("count"):
            device = self._accelerator.device
            self._sum = torch.tensor(state["sum"], device=device, dtype=self._dtype)
            self._count = torch.tensor(state["count"], device=device, dtype=self._dtype)
        self._past_sum, self._past_count = state.get("past_sum", 0.0), state.get("past_count", 0.0)

    def drop_open_step(self) -> None:
        """Forget the micro-batches of a step that will be taken again."""
        kept = sum(step < self._steps for step in self._step_of)
        self._losses, self._step_of = self._losses[:kept], self._step_of[:kept]
        self._weights = self._weights[:kept]

    def mean_of_all(self) -> float:
        """The mean over everything that was read."""
        return self._past_sum / self._past_count if self._past_count else 0.0

    def _fold(self) -> None:
        """Add up what is in the lists. Collective: every rank must call it."""
        if not self._losses:
            return
        losses = torch.stack([loss.reshape(()) for loss in self._losses]).to(self._dtype)
        same = len(self._weights) == len(self._losses)
        weights = torch.stack(self._weights).to(losses) if same else torch.ones_like(losses)
        if self._only_finite:
            finite = torch.isfinite(losses)
            losses, weights = torch.where(finite, losses, 0.0), torch.where(finite, weights, 0.0)
        else:
            # A rank without tokens has no mean to speak of.
            losses = torch.where(weights > 0, losses, 0.0)
        step_of = torch.tensor(self._step_of, device=losses.device) - self._step_of[0]
        steps = self._step_of[-1] - self._step_of[0] + 1
        both = losses.new_zeros(2, steps).index_add_(1, step_of, torch.stack([losses * weights, weights]))
        sums, counts = self._accelerator.reduce(both, "sum")
        there = counts > 0
        mean = torch.where(there, sums / counts, 0.0).sum()
        self._sum = mean if self._sum is None else self._sum + mean
        self._count = there.sum().to(mean) if self._count is None else self._count + there.sum()
        self._losses, self._weights, self._step_of = [], [], []
