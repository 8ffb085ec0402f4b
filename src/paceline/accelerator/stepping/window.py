"""The accumulation window: which micro-batch ends it, and what its gradients are divided by.

What it divides by, and who says where it ends, can be exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import torch

from paceline.config.leniency import STRICT
from paceline.errors import SteppingError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from paceline.collectives import Group
    from paceline.config.leniency import Leniency
    from paceline.data import LoopPosition
    from paceline.strategies import Strategy

__all__ = ["TRUE_MEAN", "Accumulation", "GradientBoundary", "OwnBoundary", "Window", "WindowPolicy"]


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


class WindowedOptimizer(Protocol):
    """What a window needs to know of a prepared optimizer."""

    num_steps: int

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer inside."""
        ...


Phase: TypeAlias = Literal["accumulating", "final", "closed"]
"""What may still happen to the gradients of a window.

`accumulating`: backward passes add to them; they are divided by what the window is expected to hold.
`final`: they are divided by what the window really held, and may be clipped and stepped with.
`closed`: the window is over, and whatever comes next opens a new one.
"""


@dataclass(slots=True)
class LossWeights:
    """The weights of a window's losses.

    Attributes:
        local_sum: Of this rank, shape [].
        divisor: What gradients are divided by until the window closes: the total over all ranks, or an estimate.
        is_estimate: Whether the total may turn out to be another one.
    """

    local_sum: Tensor
    divisor: Tensor
    is_estimate: bool


@dataclass(slots=True)
class WindowState:
    """What has happened in one window.

    Attributes:
        phase: What may still happen to its gradients.
        micro_batches: How many `accumulate` has begun; 0 outside of `accumulate`.
        expected_micro_batches: How many it will have, as far as is known: what means are divided by.
        backward_calls: In the window.
        backward_calls_in_micro_batch: In the current micro-batch.
        gradients_used: Whether an optimizer has stepped with the gradients, or dropped them.
        weights: Of the losses; None while they are means.
    """

    phase: Phase = "accumulating"
    micro_batches: int = 0
    expected_micro_batches: int = 1
    backward_calls: int = 0
    backward_calls_in_micro_batch: int = 0
    gradients_used: bool = False
    weights: LossWeights | None = None


class Window:
    """The micro-batches between two optimizer steps.

    Args:
        num_steps: Micro-batches in a full window.
        loop: Where the loop over the prepared loaders is.
        group: All ranks.
        sync_with_dataloader: Close the window when the loop ends, however short it is.
        policy: What gradients are divided by.
        boundary: Holds `sync_gradients`; None for one of its own.
        leniency: What is tolerated.

    Attributes:
        num_steps: Micro-batches in a full window.
        boundary: Holds `sync_gradients`.
    """

    def __init__(
        self,
        num_steps: int,
        loop: LoopPosition,
        group: Group,
        *,
        sync_with_dataloader: bool = True,
        policy: WindowPolicy = TRUE_MEAN,
        boundary: GradientBoundary | None = None,
        leniency: Leniency = STRICT,
    ) -> None:
        self.num_steps = num_steps
        self._sync_with_dataloader = sync_with_dataloader
        self._divides_by_num_steps = policy.divide_by == "num_steps"
        self.boundary: GradientBoundary = OwnBoundary() if boundary is None else boundary
        self._leniency = leniency
        self._loop = loop
        self._group = group
        self._state = WindowState()
        self._constants: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
        # Optimizers whose step() came inside this window, and those that had never stepped when the last one ended.
        self._deferred: set[WindowedOptimizer] = set()
        self._never_stepped: set[WindowedOptimizer] = set()

    @property
    def sync_gradients(self) -> bool:
        """Whether the current micro-batch is the last of its window; `accumulate` sets it, and the script may."""
        return self.boundary.sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        self.boundary.sync_gradients = value

    # From the first micro-batch to the last

    def begin_micro_batch(self) -> bool:
        """Begin the next micro-batch; return whether it is the last of its window."""
        state = self._state
        if state.phase == "closed" or (self.boundary.sync_gradients and state.micro_batches):
            state = self._state = WindowState()
        if self.num_steps == 1:
            # Every micro-batch is a window, wherever the loop is.
            state.micro_batches = 1
            self.boundary.sync_gradients = True
            return True
        if self._sync_with_dataloader:
            self._loop.begin_micro_batch()
        if state.micro_batches == 0:
            state.expected_micro_batches = self._expected_length()
        state.micro_batches += 1
        state.backward_calls_in_micro_batch = 0
        is_full = state.micro_batches >= self.num_steps
        is_last = is_full or (self._sync_with_dataloader and self._loop.loop_ends)
        self.boundary.sync_gradients = is_last
        return is_last

    def _expected_length(self) -> int:
        """How many micro-batches the window will have, as far as is known."""
        if self._divides_by_num_steps or not self._sync_with_dataloader:
            return self.num_steps
        remaining = self._loop.remaining
        return self.num_steps if remaining is None else min(self.num_steps, remaining + 1)

    def scale_of(self, loss: Tensor, weight: float | Tensor | None) -> Tensor | None:
        """The first gradient of this backward pass, shape []; None stands for 1.

        Args:
            loss: A mean (no weight), or a sum over what `weight` counts. Shape [].
            weight: How many tokens or samples this rank's sum is over.

        Raises:
            SteppingError: The window has losses with and without a weight.
        """
        if self._state.phase == "closed":
            self._state = WindowState()
        state = self._state
        if state.backward_calls and (weight is None) != (state.weights is None):
            raise SteppingError(
                "backward() was called with a weight and without one in the same accumulation window",
                "A mean and a weighted sum have no common divisor",
                "Pass weight= in every backward() of the window, or in none",
            )
        state.backward_calls += 1
        state.backward_calls_in_micro_batch += 1
        if weight is not None:
            return self._weighted_scale(loss, weight)
        expected = self.num_steps if self._divides_by_num_steps else state.expected_micro_batches
        return None if expected == 1 else self._constant(1.0 / expected, loss)

    def _constant(self, value: float, like: Tensor) -> Tensor:
        key = (value, like.dtype, like.device)
        if key not in self._constants:
            self._constants[key] = torch.full((), value, dtype=like.dtype, device=like.device)
        return self._constants[key]

    def _weighted_scale(self, loss: Tensor, weight: float | Tensor) -> Tensor:
        """Divide by the window's total weight over all ranks, or by an estimate of it while the window is open.

        The estimate is the first micro-batch's total times the window's length, the same on all ranks. It keeps
        gradients near their true size, which fp16 needs; `finalize_gradients` replaces it by the true total.
        """
        state = self._state
        local = _as_weight(weight, loss.device)
        expected = state.expected_micro_batches
        is_repeated = bool(state.micro_batches) and state.backward_calls_in_micro_batch > 1
        if is_repeated and expected > 1:
            raise SteppingError(
                f"backward() was called {state.backward_calls_in_micro_batch} times with a weight in one micro-batch "
                f"of a window of {expected}",
                "Their gradients are added up before the window's total weight is known, so they cannot be divided "
                "separately",
                "Add the losses up and call backward() once, or build one Accelerator for each model",
            )
        if is_repeated or state.weights is None:
            # Several losses of a window of one micro-batch are several means, and their gradients add up.
            total = self._total(local) * expected
            divisor = torch.where(total > 0, total, torch.ones_like(total))
            state.weights = LossWeights(local, divisor, is_estimate=expected > 1)
        else:
            state.weights.local_sum = state.weights.local_sum + local
            state.weights.is_estimate = True
        return (self._group.size / state.weights.divisor).to(loss.dtype)

    def _total(self, weight: Tensor) -> Tensor:
        return self._group.all_reduce(weight.clone(), "sum")

    def finalize_gradients(self, strategy: Strategy) -> None:
        """Replace the estimated divisor of a closing window by the true one, before anything reads the gradients.

        Collective when losses are weighted: every rank must call it.
        """
        state = self._state
        if state.phase != "accumulating" or not self.boundary.sync_gradients or not state.backward_calls:
            return
        state.phase = "final"
        weights = state.weights
        if weights is not None:
            if weights.is_estimate:
                total = self._total(weights.local_sum)
                factor = torch.where(total > 0, weights.divisor / total, torch.zeros_like(total))
                strategy.scale_gradients(strategy.parameters(), factor)
        elif self._divides_by_num_steps:
            return
        elif state.micro_batches and state.micro_batches != state.expected_micro_batches:
            factor_of_mean = state.expected_micro_batches / state.micro_batches
            strategy.scale_gradients(strategy.parameters(), factor_of_mean)
            # A second model's backward in this micro-batch is divided by the true length.
            state.expected_micro_batches = state.micro_batches

    def defer_step(self, optimizer: WindowedOptimizer) -> None:
        """Note that an optimizer's `step` was called inside the window, and did nothing."""
        self._deferred.add(optimizer)

    def record_step(self, optimizer: WindowedOptimizer) -> None:
        """Note that an optimizer took its step: outside of `accumulate` that closes the window."""
        state = self._state
        if self._deferred:
            self._deferred.discard(optimizer)
        state.gradients_used = True
        if not state.micro_batches:
            state.phase = "closed"

    def record_zero_grad(self) -> None:
        """Note that the gradients accumulated so far were dropped."""
        self._state.gradients_used = True

    def end_micro_batch(self, strategy: Strategy) -> None:
        """End the current micro-batch, and with the last one the window."""
        if not self.boundary.sync_gradients:
            return
        if self._state.phase == "accumulating":
            self.finalize_gradients(strategy)
        self._state.phase = "closed"
        if self._deferred:
            self._check_deferred()

    def _check_deferred(self) -> None:
        """Refuse two windows in a row that one optimizer closes, and in which another, which never stepped, could not.

        Raises:
            SteppingError: There is such an optimizer.
        """
        never_stepped: set[WindowedOptimizer] = set()
        if self._state.gradients_used:
            never_stepped = {optimizer for optimizer in self._deferred if not optimizer.num_steps}
        repeated = never_stepped & self._never_stepped
        self._deferred.clear()
        self._never_stepped = never_stepped
        if repeated:
            name = type(next(iter(repeated)).optimizer).__name__
            raise SteppingError(
                f"{name}.step() was called inside windows of {self._state.micro_batches} micro-batches and never in "
                "the last one, in which another optimizer stepped",
                "Each `with accelerator.accumulate(...)` is one micro-batch of the window, whatever model it names, so "
                "this optimizer would never step",
                "Train all models in one `with accelerator.accumulate(model, other):`, or build an Accelerator for "
                "each",
            )

    # What prepared objects ask

    @property
    def can_zero_gradients(self) -> bool:
        """Whether gradients can be dropped now without losing what the open window has accumulated."""
        state = self._state
        if state.phase == "closed" or not state.backward_calls:
            return True
        return self.boundary.sync_gradients and state.backward_calls_in_micro_batch > 0

    @property
    def has_gradients(self) -> bool:
        """Whether there are gradients that no optimizer has used yet."""
        return self._state.backward_calls > 0 and not self._state.gradients_used

    @property
    def lacks_backward(self) -> bool:
        """Whether the window had several micro-batches, and none of them called `accelerator.backward`."""
        return self._state.micro_batches > 1 and not self._state.backward_calls

    def refuse_foreign_gradients(self) -> None:
        """Refuse to step with gradients of several micro-batches that did not come from `accelerator.backward`.

        Raises:
            SteppingError: Always.
        """
        count = self._state.micro_batches
        raise SteppingError(
            f"optimizer.step() ended a window of {count} micro-batches, in which accelerator.backward() was not called",
            f"loss.backward() adds gradients up, so the step would be {count} times that of their mean",
            "Call accelerator.backward(loss), with the loss as it is",
        )

    def check_closure(self) -> None:
        """Refuse the gradients of a closure that has computed those of some of the window's micro-batches.

        Raises:
            SteppingError: It has called `backward` less often than there are micro-batches.
        """
        count, calls = self._state.micro_batches, self._state.backward_calls
        if not 0 < calls < count:
            return
        raise SteppingError(
            f"The closure that ended a window of {count} micro-batches called accelerator.backward() "
            f"{'once' if calls == 1 else f'{calls} times'}",
            "Only the last step() of a window calls its closure, so the gradients of the other micro-batches would be "
            "missing",
            "Leave gradient_accumulation_steps out, or let the closure call backward() for each of the micro-batches",
        )

    def release(self) -> None:
        """Let go of the optimizers, and of a window that a loop left open: its gradients were theirs."""
        self._state = WindowState()
        self.boundary.sync_gradients = True
        self._deferred.clear()
        self._never_stepped = set()

    def require_no_gradients(self, what: str) -> None:
        """Refuse a call that would lose gradients that no optimizer has used yet.

        Raises:
            SteppingError: There are some.
        """
        if self._leniency.save_open_gradients:
            return
        if not self.boundary.sync_gradients:
            self._refuse_inside_window(
                what, "A training state holds no gradients, so those of the micro-batches so far would be lost"
            )
        if self.has_gradients:
            raise SteppingError(
                f"{what} was called after backward() and before optimizer.step()",
                "Gradients are not part of a training state, so this batch would count as used without having been",
                "Call it after optimizer.step()",
            )

    def require_end(self, what: str) -> None:
        """Refuse a call that is right only when all of a window's gradients are there.

        Raises:
            SteppingError: The window is still open, and that is not tolerated.
        """
        if not self.boundary.sync_gradients and not self._leniency.clip_inside_window:
            self._refuse_inside_window(
                what, "The gradients of the later micro-batches are still missing, so it would act on a part of the sum"
            )

    def _refuse_inside_window(self, what: str, why: str) -> None:
        state = self._state
        raise SteppingError(
            f"{what} was called in micro-batch {state.micro_batches} of a window of {state.expected_micro_batches}",
            why,
            "Call it under `if accelerator.sync_gradients:`",
        )


class Accumulation:
    """The context of one micro-batch: `with accelerator.accumulate(model):`.

    One object serves every step, so that entering it allocates nothing.
    """

    def __init__(self, window: Window, *, sync_each_batch: bool) -> None:
        self._window = window
        self._sync_each_batch = sync_each_batch
        self._strategy: Strategy | None = None
        self._models: Iterable[nn.Module] = ()
        self._unsynced: dict[int, nn.Module] = {}

    def release(self) -> None:
        """Let go of the models."""
        if self._strategy is not None:
            self._release_all(self._strategy)
        self._models = ()
        self._strategy = None

    def _release_all(self, strategy: Strategy) -> None:
        for model in self._unsynced.values():
            strategy.release_gradient_sync(model)
        self._unsynced.clear()

    def for_models(self, models: Iterable[nn.Module], strategy: Strategy) -> Accumulation:
        """Return the context for the micro-batches of these models."""
        self._models = models
        self._strategy = strategy
        return self

    def __enter__(self) -> None:
        strategy = self._strategy
        assert strategy is not None
        if self._window.begin_micro_batch():
            if self._unsynced:
                self._release_all(strategy)
        elif not self._sync_each_batch:
            for model in self._models:
                if id(model) not in self._unsynced:
                    self._unsynced[id(model)] = model
                    strategy.hold_gradient_sync(model)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._strategy is not None:
            self._window.end_micro_batch(self._strategy)


def _as_weight(weight: float | Tensor, device: torch.device) -> Tensor:
    """One fp32 number on the device, made without a copy from the host that would wait for the device."""
    if isinstance(weight, torch.Tensor):
        if weight.numel() != 1:
            raise SteppingError(
                f"backward() got a weight of shape {[*weight.shape]}",
                "It counts what the loss is a sum over, which is one number",
                "Pass weight.sum()",
            )
        return weight.detach().to(device=device, dtype=torch.float32, non_blocking=True).reshape(())
    return torch.full((), float(weight), dtype=torch.float32, device=device)
