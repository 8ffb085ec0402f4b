"""One step under DeepSpeed: whose backward it is, where a window ends, clipping, and what the engine skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from paceline.errors import PrepareError, SteppingError
from paceline.strategies.base import multiply, refuse_join
from paceline.strategies.deepspeed.engines import Engines
from paceline.strategies.deepspeed.gradients import clip_norm, clip_value, runs_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from paceline.strategies.deepspeed.engine import ZeroEngine


class EngineStepping(Engines):
    """The verbs of a step, each handed to the engine that it concerns."""

    @override
    def set_gradient_sync(self, model: nn.Module, enabled: bool) -> None:
        zero = self._engine_of(model)
        if zero is not None:
            zero.ends = enabled
            zero.engine.set_gradient_accumulation_boundary(enabled)

    @override
    def backward(self, loss: Tensor, scale: Tensor | None = None, **kwargs: Any) -> None:
        retain = kwargs.pop("retain_graph", False)
        if kwargs or loss.ndim:
            saw = f"backward() got {', '.join(kwargs)}" if kwargs else f"backward() got a loss of shape {[*loss.shape]}"
            raise SteppingError(
                saw,
                "DeepSpeed's engine computes the gradients of one number and takes only retain_graph",
                "Pass a loss of shape [], or use another strategy",
            )
        zero = self._source()
        if zero.ended:
            raise SteppingError(
                f"backward() was called again on {type(zero.model).__name__} after the backward that ended its window",
                "DeepSpeed's engine would forget the gradients of the first one",
                "Add the losses up and call backward() once, or train under accumulate() without sync_each_batch",
            )
        zero.pending, zero.clipped, zero.ended = False, False, zero.ends
        zero.engine.backward(loss if scale is None else loss * scale, retain_graph=retain, scale_wrt_gas=False)

    def _source(self) -> ZeroEngine:
        """The engine that this loss comes from: the one whose forward ran since its last backward."""
        if len(self._engines) == 1:
            return self._engines[0]
        pending = [zero for zero in self._engines if zero.pending]
        if len(pending) == 1:
            return pending[0]
        names = ", ".join(type(zero.model).__name__ for zero in pending) or "none"
        raise SteppingError(
            f"backward() was called after the forward of several trained models: {names}",
            "Each has its own DeepSpeed engine, which must run the backward of its own loss",
            "Call forward and backward of one model before the forward of the next, with torch.no_grad() around a "
            "forward that needs no gradient; or use strategy='fsdp'",
        )

    @override
    @torch.no_grad()
    def scale_gradients(self, parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
        for _, runs in runs_of(self._engines, parameters, self.context.device):
            multiply(runs, factor)

    @override
    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float) -> Tensor:
        self._check_clip(max_norm)
        if max_norm != float("inf"):
            self._settings["gradient_clipping"] = max_norm
        found = runs_of(self._engines, parameters, self.context.device)
        for zero, _ in found:
            zero.clipped = True
        return clip_norm(found, max_norm, norm_type, self.context.group, self.context.device)

    @override
    def clip_value(self, parameters: Iterable[nn.Parameter], value: float) -> None:
        clip_value(runs_of(self._engines, parameters, self.context.device), value)

    def _check_clip(self, max_norm: float) -> None:
        """One owner for the largest norm: the script, or the configuration."""
        asked = self._clipping
        if asked is not None and max_norm not in (asked, float("inf")):
            raise SteppingError(
                f"clip_grad_norm_(max_norm={max_norm:g}) was called, and the DeepSpeed configuration says "
                f"gradient_clipping {asked:g}",
                "Only one of them can hold",
                'Write "auto" into the configuration, or pass the same value',
            )

    @property
    def _clipping(self) -> float | None:
        """The largest norm that the configuration asks for; None where the script decides."""
        asked = self._plugin.gradient_clipping
        return float(asked) if isinstance(asked, (int, float)) and asked > 0 else None

    @override
    def check_first_backward(self) -> None:
        if "scheduler" in self._settings and not self._scheduled:
            raise PrepareError(
                "The DeepSpeed configuration has a scheduler section, and no DummyScheduler was prepared",
                "Nobody would step what it describes",
                "Prepare a DummyScheduler(optimizer), or remove the section",
            )

    @override
    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            raise SteppingError(
                "optimizer.step(closure) was called under DeepSpeed",
                "Its engine computes the gradients before the step and cannot compute them again inside",
                "Use an optimizer that needs no closure, or strategy='ddp'",
            )
        zero = self._find(optimizer)
        assert zero is not None
        asked = self._clipping
        if asked is not None and not zero.clipped and zero.partitions.reaches_gradients:
            self.clip_norm([p for group in zero.groups for p in group], asked, 2.0)
        zero.engine.step()
        zero.ended = False
        return None

    @override
    def step_was_skipped(self, optimizer: Optimizer) -> bool:
        zero = self._find(optimizer)
        return zero is not None and bool(getattr(zero.engine.optimizer, "overflow", False))

    @override
    def zero_grad(self, optimizer: Optimizer, set_to_none: bool = True) -> None:
        zero = self._find(optimizer)
        assert zero is not None
        zero.partitions.drop_gradients()
        zero.ended = False

    @override
    def join(self, models: Sequence[nn.Module]) -> AbstractContextManager[Any]:
        raise refuse_join("DeepSpeed")
