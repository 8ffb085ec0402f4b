"""The accumulation window, the weights of what is in it, and the context around one micro-batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.errors import SteppingError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from paceline.collectives import Group
    from paceline.config import GradientAccumulationPlugin
    from paceline.data import ActiveLoaders
    from paceline.stepping.optimizer import AcceleratedOptimizer
    from paceline.strategies import Strategy

__all__ = ["Accumulation", "Window"]


class Window:
    """The micro-batches between two optimizer steps.

    Attributes:
        sync_gradients: Whether the micro-batch in work is the last of its window.
    """

    def __init__(self, plugin: GradientAccumulationPlugin, loaders: ActiveLoaders, group: Group) -> None:
        self.num_steps = plugin.num_steps
        self.sync_gradients = True
        self.follows_loader = plugin.sync_with_dataloader
        self._loaders = loaders
        self._group = group
        self._scales: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
        self._ended = True
        # Optimizers that were to step inside the open window, and those of the window before that were never stepped.
        self._held: set[AcceleratedOptimizer] = set()
        self._starved: set[AcceleratedOptimizer] = set()
        self._open()

    def _open(self) -> None:
        self._spent = False
        self._begun = 0
        self._planned = 1
        self._backwards = 0
        self._backwards_now = 0
        self._settled = False
        self._ended = False
        self._guessed = False
        self._weight: Tensor | None = None
        self._reference: Tensor | None = None

    # The way through a window

    def begin_micro_batch(self) -> bool:
        """Begin the next micro-batch; return whether it is the last of its window."""
        if self._ended or (self.sync_gradients and self._begun):
            self._open()
        if self.num_steps == 1:
            # Every micro-batch is a window: no need to ask the loader where it is.
            self._begun = 1
            self.sync_gradients = True
            return True
        if self.follows_loader:
            self._loaders.begin_micro_batch()
        if self._begun == 0:
            self._planned = self._plan(self._loaders.remaining if self.follows_loader else None)
        self._begun += 1
        self._backwards_now = 0
        self.sync_gradients = self._begun >= self.num_steps or (self.follows_loader and self._loaders.loop_ends)
        return self.sync_gradients

    def _plan(self, remaining: int | None) -> int:
        """How many micro-batches the window will have, as far as that can be known."""
        return self.num_steps if remaining is None else min(self.num_steps, remaining + 1)

    def scale_of(self, loss: Tensor, weight: float | Tensor | None) -> Tensor | None:
        """The first gradient of this backward pass; None is one.

        Args:
            loss: A mean (no weight), or a sum over what `weight` counts. Shape [].
            weight: How many tokens or samples this rank's sum is over.

        Raises:
            SteppingError: Weighted and unweighted losses in one window.
        """
        if self._ended:
            self._open()
        if self._backwards and (weight is None) != (self._weight is None):
            raise SteppingError(
                "backward() was called with a weight and without one in the same accumulation window",
                "A mean and a weighted sum have no common divisor",
                "Pass weight= in every backward() of the window, or in none",
            )
        self._backwards += 1
        self._backwards_now += 1
        if weight is not None:
            return self._weighted(loss, weight)
        return None if self._planned == 1 else self._constant(1.0 / self._planned, loss)

    def _constant(self, value: float, like: Tensor) -> Tensor:
        key = (value, like.dtype, like.device)
        if key not in self._scales:
            self._scales[key] = torch.full((), value, dtype=like.dtype, device=like.device)
        return self._scales[key]

    def _weighted(self, loss: Tensor, weight: float | Tensor) -> Tensor:
        """Divide by the window's total weight over all ranks, or by a guess of it while the window is open.

        The guess is the first micro-batch's total times the window's length, the same on all ranks. It keeps
        gradients near their true size, which fp16 needs; `settle` replaces it by the true total.
        """
        mine = _as_weight(weight, loss.device)
        several = bool(self._begun) and self._backwards_now > 1
        if several and self._planned > 1:
            raise SteppingError(
                f"backward() was called {self._backwards_now} times with a weight in one micro-batch of a window "
                f"of {self._planned}",
                "Their gradients are mixed before the window's total weight is known, so they cannot be divided apart",
                "Add the losses up and call it once, or build one Accelerator for each model",
            )
        if several or self._weight is None or self._reference is None:
            # Several losses of a window of one micro-batch are several means, and their gradients add up.
            reference = self._total(mine) * self._planned
            self._weight, self._reference = mine, torch.where(reference > 0, reference, torch.ones_like(reference))
            self._guessed = self._planned > 1
        else:
            self._weight = self._weight + mine
            self._guessed = True
        return (self._group.size / self._reference).to(loss.dtype)

    def _total(self, weight: Tensor) -> Tensor:
        return self._group.all_reduce(weight.clone(), "sum")

    def finalize_gradients(self, strategy: Strategy) -> None:
        """Replace the guessed divisor of a closing window by the true one, before anything reads the gradients.

        Collective when losses are weighted: every rank must call it.
        """
        if self._settled or self._ended or not self.sync_gradients or not self._backwards:
            return
        self._settled = True
        if self._weight is not None and self._reference is not None:
            if self._guessed:
                total = self._total(self._weight)
                factor = torch.where(total > 0, self._reference / total, torch.zeros_like(total))
                strategy.scale_gradients(strategy.parameters(), factor)
        elif self._begun and self._begun != self._planned:
            strategy.scale_gradients(strategy.parameters(), self._planned / self._begun)
            # A second model's backward in this micro-batch finds the length known.
            self._planned = self._begun

    def held_back(self, optimizer: AcceleratedOptimizer) -> None:
        """Note that an optimizer was to step inside the window."""
        self._held.add(optimizer)

    def stepped(self, optimizer: AcceleratedOptimizer) -> None:
        """Note that an optimizer took its step: outside of `accumulate` that ends the window."""
        self._held.discard(optimizer)
        self._spent = True
        self._ended = self._ended or not self._begun

    def dropped(self) -> None:
        """Note that the gradients gathered so far are gone."""
        self._spent = True

    def end_micro_batch(self, strategy: Strategy) -> None:
        """Note that a micro-batch is over, and with the last one the window."""
        self.finalize_gradients(strategy)
        self._ended = self.sync_gradients
        if self._ended and self._held:
            self._check_held()

    def _check_held(self) -> None:
        """Refuse two windows in a row that one optimizer ends and that pass over another which has never stepped."""
        starving = {optimizer for optimizer in self._held if not optimizer.num_steps} if self._spent else set()
        found = next(iter(starving & self._starved), None)
        self._held.clear()
        self._starved = starving
        if found is not None:
            raise SteppingError(
                f"{type(found.optimizer).__name__}.step() was called inside windows of {self._begun} micro-batches "
                "and never in the last one, in which another optimizer stepped",
                "Each `with accelerator.accumulate(...)` is one micro-batch of the window, whatever model it names, so "
                "this optimizer would never step",
                "Work on all models in one `with accelerator.accumulate(model, other):`, or build an Accelerator for "
                "each",
            )

    # What the wrapped objects ask

    @property
    def may_zero(self) -> bool:
        """Whether gradients may be dropped now without losing what the open window has gathered."""
        return self._ended or not self._backwards or (self.sync_gradients and self._backwards_now > 0)

    @property
    def has_gradients(self) -> bool:
        """Whether there are gradients that no optimizer has used yet."""
        return self._backwards > 0 and not self._spent

    @property
    def lacks_backward(self) -> bool:
        """Whether the window had several micro-batches, and none of them came through `backward`."""
        return self._begun > 1 and not self._backwards

    def refuse_foreign_gradients(self) -> None:
        """Refuse to step with gradients of several micro-batches that did not come through `backward`.

        Raises:
            SteppingError: Always.
        """
        raise SteppingError(
            f"optimizer.step() ended a window of {self._begun} micro-batches, in which accelerator.backward() was not "
            "called",
            f"loss.backward() adds gradients up, so the step would be {self._begun} times that of their mean",
            "Call accelerator.backward(loss), with the loss as it is",
        )

    def forget(self) -> None:
        """Let go of the optimizers."""
        self._held.clear()
        self._starved = set()

    def require_no_gradients(self, what: str) -> None:
        """Refuse what would lose gradients that no optimizer has used yet.

        Raises:
            SteppingError: There are some.
        """
        self.require_end(what)
        if self.has_gradients:
            raise SteppingError(
                f"{what} was called after backward() and before optimizer.step()",
                "Gradients are not part of a training state, so this batch would count as used without having been",
                "Call it after optimizer.step()",
            )

    def require_end(self, what: str) -> None:
        """Refuse what is right only when all of a window's gradients are there.

        Raises:
            SteppingError: The window is still open.
        """
        if not self.sync_gradients:
            raise SteppingError(
                f"{what} was called in micro-batch {self._begun} of a window of {self._planned}",
                "The gradients of the later micro-batches are not in yet, so it would act on a part of them",
                "Call it under `if accelerator.sync_gradients:`",
            )


class Accumulation:
    """The context around one micro-batch: `with accelerator.accumulate(model):`.

    One object serves every step, so that entering it makes nothing.
    """

    def __init__(self, window: Window, *, sync_each_batch: bool) -> None:
        self._window = window
        self._sync_each_batch = sync_each_batch
        self._strategy: Strategy | None = None
        self._models: Iterable[nn.Module] = ()
        self._held: dict[int, nn.Module] = {}

    def forget(self) -> None:
        """Let go of the models."""
        self._models = ()
        self._strategy = None
        self._held.clear()

    def for_models(self, models: Iterable[nn.Module], strategy: Strategy) -> Accumulation:
        """Aim at these models."""
        self._models = models
        self._strategy = strategy
        return self

    def __enter__(self) -> None:
        strategy = self._strategy
        assert strategy is not None
        if self._window.begin_micro_batch():
            for model in self._held.values():
                strategy.set_gradient_sync(model, True)
            self._held.clear()
        elif not self._sync_each_batch:
            for model in self._models:
                if id(model) not in self._held:
                    self._held[id(model)] = model
                    strategy.set_gradient_sync(model, False)

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
