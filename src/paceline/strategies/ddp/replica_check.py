"""Checks now and then that all ranks of replicated training have the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from paceline.errors import SteppingError, named
from paceline.strategies.check_schedule import is_due

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    Named = Sequence[tuple[str, nn.Parameter]]

_SAMPLES = 8
# Different hardware rounds differently; gradients that were not averaged move weights by more in a step or two.
_TOLERANCE = 1e-4


class ReplicaCheck:
    """Compares a few elements of each weight over the ranks, after steps 1, 2, 4 ... 128, 256, 512, 768 ...

    A comparison is started after a step and checked when the next one is started, so neither the host nor the device
    waits for it.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._pending: tuple[int, list[str], list[int], Tensor, Any, torch.Event | None] | None = None

    def restart(self) -> None:
        """Start counting steps again, as ranks may have taken different numbers of them."""
        self._steps = 0
        self._pending = None

    def stepped(self, parameters: Callable[[], Named]) -> None:
        """Count a step, and compare when it is due. Collective: every rank must call it.

        Raises:
            SteppingError: The ranks' weights differed at the previous comparison; it names them.
        """
        self._steps += 1
        if is_due(self._steps):
            self.check()
            self._start(parameters())

    @torch.no_grad()
    def _start(self, parameters: Named) -> None:
        parameters = [(name, p) for name, p in parameters if p.numel()]
        parts = [_sample(p) for _, p in parameters]
        values = torch.nan_to_num(torch.cat(parts), nan=1e30, posinf=1e31, neginf=-1e31)
        extremes = torch.cat([values, -values])
        work = dist.all_reduce(extremes, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        event = None
        if extremes.device.type != "cpu":
            # The stream waits, not the host; the result is in host memory long before the next check.
            work.wait()
            extremes = torch.empty_like(extremes, device="cpu", pin_memory=True).copy_(extremes, non_blocking=True)
            event = torch.Event(device=values.device)
            event.record()
        names = [name for name, _ in parameters]
        self._pending = (self._steps, names, [len(part) for part in parts], extremes, work, event)

    def check(self) -> None:
        """Check the result of the comparison that was started last.

        Raises:
            SteppingError: The ranks' weights differed; it names them.
        """
        if self._pending is None:
            return
        step, names, lengths, extremes, work, event = self._pending
        self._pending = None
        if event is None:
            work.wait()
        else:
            event.synchronize()
        largest, smallest = extremes[: len(extremes) // 2], -extremes[len(extremes) // 2 :]
        differing = []
        for name, high, low in zip(names, torch.split(largest, lengths), torch.split(smallest, lengths), strict=True):
            spread = (high - low).max()
            if spread > _TOLERANCE * torch.maximum(high.abs(), low.abs()).max():
                differing.append(f"{name} (by {float(spread):.3g})")
        if differing:
            raise SteppingError(
                f"After {step} steps the ranks have different weights: {named(differing, 4)}",
                "Something changed them on some ranks only: a backward that DDP does not see (a second "
                "loss.backward(), or one that bypasses the prepared model), weights changed by hand, or an optimizer "
                "that draws random numbers",
                "Call the prepared model and accelerator.backward(loss), and change weights alike on all ranks",
            )


def _sample(parameter: Tensor) -> Tensor:
    """A few elements from the middle, as real numbers of at least fp32; an embedding's first rows are often padding."""
    values = parameter.detach()
    values = (torch.view_as_real(values) if values.is_complex() else values).reshape(-1)
    middle = max(0, (len(values) - _SAMPLES) // 2)
    part = values[middle : middle + _SAMPLES]
    return part if part.dtype == torch.float64 else part.float()
