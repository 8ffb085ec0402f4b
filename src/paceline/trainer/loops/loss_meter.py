"""Mean training losses for the log: kept on the device, and summed over ranks when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from paceline.accelerator.accelerator import Accelerator

__all__ = ["LossMeter"]

_REDUCE_AFTER = 256


class LossMeter:
    """The mean over optimizer steps of the loss of each step.

    The loss of a step is the mean over its micro-batches and all ranks, with the weights of its gradients. Adding a
    loss only appends to a list; sums over all ranks are computed every 256 micro-batches and on reading.

    Args:
        accelerator: Communicates with the other ranks.
        only_finite: Leave NaN and infinite losses out.
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
        # Sums must not depend on where a training was interrupted; with float32 they would (MPS has no float64).
        self._dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64

    def add(self, loss: Tensor, weight: Tensor | None) -> None:
        """Add the mean loss of a micro-batch, shape [], and its weight; None weighs 1."""
        self._losses.append(loss)
        if weight is not None:
            self._weights.append(weight)
        self._step_of.append(self._steps)

    def end_step(self) -> None:
        """Mark the end of an optimizer step. Collective: every rank must call it."""
        self._steps += 1
        if len(self._losses) >= _REDUCE_AFTER:
            self._reduce()

    def read(self) -> tuple[float, bool]:
        """The mean since the last reading, and whether there is one. Waits for the device.

        Collective: every rank must call it.
        """
        self._reduce()
        if self._sum is None or self._count is None:
            return 0.0, False
        total, count = torch.stack([self._sum, self._count]).tolist()
        self._sum = self._count = None
        self._past_sum += total
        self._past_count += count
        if count:
            return (total / count, True)
        return (float("nan"), True)

    def reduce_pending(self) -> None:
        """Sum over ranks what was added, for `state_dict`. Collective: every rank must call it."""
        self._reduce()

    def state_dict(self) -> dict[str, float]:
        """The sums so far."""
        return {
            "sum": 0.0 if self._sum is None else float(self._sum),
            "count": 0.0 if self._count is None else float(self._count),
            "past_sum": self._past_sum,
            "past_count": self._past_count,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the sums."""
        if state.get("count"):
            device = self._accelerator.device
            self._sum = torch.tensor(state["sum"], device=device, dtype=self._dtype)
            self._count = torch.tensor(state["count"], device=device, dtype=self._dtype)
        self._past_sum, self._past_count = state.get("past_sum", 0.0), state.get("past_count", 0.0)

    def drop_open_step(self) -> None:
        """Discard the micro-batches of a step that will be repeated."""
        kept = sum(step < self._steps for step in self._step_of)
        self._losses, self._step_of = self._losses[:kept], self._step_of[:kept]
        self._weights = self._weights[:kept]

    def mean_of_all(self) -> float:
        """The mean over everything that was read so far."""
        return self._past_sum / self._past_count if self._past_count else 0.0

    def _reduce(self) -> None:
        """Sum the lists over ranks. Collective: every rank must call it."""
        if not self._losses:
            return
        losses = torch.stack([loss.reshape(()) for loss in self._losses]).to(self._dtype)
        weights = torch.ones_like(losses)
        if len(self._weights) == len(self._losses):
            weights = torch.stack(self._weights).to(losses)
        if self._only_finite:
            finite = torch.isfinite(losses)
            losses, weights = torch.where(finite, losses, 0.0), torch.where(finite, weights, 0.0)
        else:
            # The mean of a rank without targets is NaN.
            losses = torch.where(weights > 0, losses, 0.0)
        step_of = torch.tensor(self._step_of, device=losses.device) - self._step_of[0]
        steps = self._step_of[-1] - self._step_of[0] + 1
        both = losses.new_zeros(2, steps).index_add_(1, step_of, torch.stack([losses * weights, weights]))
        sums, counts = self._accelerator.reduce(both, "sum")
        is_counted = counts > 0
        mean = torch.where(is_counted, sums / counts, 0.0).sum()
        self._sum = mean if self._sum is None else self._sum + mean
        self._count = is_counted.sum().to(mean) if self._count is None else self._count + is_counted.sum()
        self._losses, self._weights, self._step_of = [], [], []
