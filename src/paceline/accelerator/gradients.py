"""Backward passes, and what acts on gradients before an optimizer steps."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from paceline.accelerator.stepping import AcceleratedOptimizer, Accumulation, scalar_loss
from paceline.errors import PrepareError, SteppingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from paceline.accelerator.prepared import Prepared
    from paceline.accelerator.recording import RunRecorder
    from paceline.accelerator.stepping import LossScaler, Window
    from paceline.accelerator.strategy_selection import StrategySelector
    from paceline.strategies import Strategy

__all__ = ["Gradients"]


class Gradients:
    """Computes, clips and unscales gradients through the strategy.

    Args:
        prepared: The models and optimizers.
        selector: Knows the strategy.
        window: The accumulation window.
        sync_each_batch: Exchange gradients in every micro-batch.
        scaler: The loss scaler of fp16.
        recorder: Records losses and norms where a check needs them.
    """

    def __init__(
        self,
        prepared: Prepared,
        selector: StrategySelector,
        window: Window,
        sync_each_batch: bool,
        *,
        scaler: LossScaler | None,
        recorder: RunRecorder | None,
    ) -> None:
        self._prepared = prepared
        self._selector = selector
        self._window = window
        self._accumulation = Accumulation(window, sync_each_batch=sync_each_batch)
        self._scaler = scaler
        self._recorder = recorder

    def accumulate(self, models: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """See `Accelerator.accumulate`."""
        return self._accumulation.for_models(models or self._prepared.models, self._selector.current)

    def set_sync(self, value: bool) -> None:
        """See `Accelerator.sync_gradients`."""
        self._window.sync_gradients = value

    def trigger_sync_in_backward(self, model: nn.Module) -> AbstractContextManager[None]:
        """See `Accelerator.trigger_sync_in_backward`."""
        return self._selector.current.sync_next_backward(model)

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """See `Accelerator.no_sync`."""
        strategy = self._selector.current
        strategy.hold_gradient_sync(model)
        try:
            yield
        finally:
            strategy.release_gradient_sync(model)

    @contextmanager
    def join_uneven_inputs(self, models: Sequence[nn.Module], even_batches: bool | None) -> Iterator[None]:
        """See `Accelerator.join_uneven_inputs`."""
        before = [(loader, loader.even_batches) for loader in self._prepared.loaders]
        if even_batches is not None:
            for loader in self._prepared.loaders:
                loader.even_batches = even_batches
        try:
            with self._selector.current.join(models):
                yield
        finally:
            for loader, value in before:
                loader.even_batches = value

    def backward(
        self, loss: Tensor, weight: float | Tensor | None, gradient: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        """See `Accelerator.backward`."""
        loss = scalar_loss(loss, gradient)
        if self._recorder is not None:
            self._recorder.note_loss(loss, weight)
        scale = self._window.scale_of(loss, weight)
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        strategy = self._selector.maybe_current
        if strategy is None:
            raise PrepareError(
                "backward() was called before any model was passed to prepare()",
                "The gradients would not be averaged over the ranks",
                "Write model, optimizer, loader = accelerator.prepare(model, optimizer, loader)",
            )
        strategy.set_window_end(self._window.boundary.sync_gradients)
        strategy.backward(loss, scale, **kwargs)

    def clip_norm(self, parameters: Any, max_norm: float, norm_type: float) -> Tensor:
        """See `Accelerator.clip_grad_norm_`."""
        strategy = self._selector.current
        listed = self._finalized("clip_grad_norm_", parameters, strategy)
        norm = strategy.clip_norm(listed, float(max_norm), float(norm_type))
        if self._recorder is not None:
            self._recorder.note_norm(norm, norm_type)
        return norm

    def clip_value(self, parameters: Any, clip_value: float) -> None:
        """See `Accelerator.clip_grad_value_`."""
        strategy = self._selector.current
        strategy.clip_value(self._finalized("clip_grad_value_", parameters, strategy), float(clip_value))

    def _finalized(self, what: str, parameters: Any, strategy: Strategy) -> list[nn.Parameter]:
        """The parameters as a list, their gradients final and unscaled."""
        if isinstance(parameters, nn.Module):
            raise SteppingError(
                f"{what} got a {type(parameters).__name__}, which is a model",
                "It takes parameters",
                f"Call {what}(model.parameters(), ...)",
            )
        self._window.require_end(what)
        if isinstance(parameters, Tensor):
            parameters = [parameters]
        listed: list[nn.Parameter] = list(parameters)
        strategy.complete_gradients(listed)
        self._window.finalize_gradients(strategy)
        if self._scaler is not None:
            ids = {id(p) for p in listed}
            for wrapper in self._prepared.optimizers:
                if any(id(p) in ids for group in wrapper.param_groups for p in group["params"]):
                    self._scaler.unscale_(wrapper.optimizer)
        return listed

    def unscale(self, optimizers: Optimizer | Sequence[Optimizer] | None) -> None:
        """See `Accelerator.unscale_gradients`."""
        if self._scaler is None:
            return
        if optimizers is None:
            optimizers = self._prepared.optimizers
        for optimizer in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            self._selector.current.complete_gradients(parameters)
            inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
            self._scaler.unscale_(inner)

    def release(self) -> None:
        """Let go of models and optimizers."""
        self._accumulation.release()
        self._window.release()
