"""Which number format a run computes in, and the autocast region around a model's forward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from paceline.environment.device import describe_device, supported_precisions
from paceline.errors import NotBuiltError, PrecisionError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.utils.hooks import RemovableHandle

    from paceline.config import AutocastKwargs

Mode = Literal["no", "bf16", "fp16"]

_DTYPES: dict[str, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionPolicy:
    """The number format of matrix products and convolutions; weights and sums stay in fp32.

    Attributes:
        mode: `no` computes in the dtype of the weights.
        device_type: The `torch.device.type` that autocast acts on.
        handler: What the user said about autocast.
    """

    mode: Mode
    device_type: str
    handler: AutocastKwargs

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which autocast runs matrix products."""
        return _DTYPES[self.mode]

    @property
    def uses_autocast(self) -> bool:
        """Whether a forward runs under autocast at all."""
        return self.mode != "no" and self.handler.enabled

    @property
    def needs_loss_scaling(self) -> bool:
        """Whether gradients can underflow, as they do in fp16 only."""
        return self.mode == "fp16"

    def context(self, handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """Open an autocast region; a null context when the mode is `no`."""
        handler = handler or self.handler
        if self.mode == "no":
            return nullcontext()
        return torch.autocast(
            self.device_type,
            dtype=self.compute_dtype,
            enabled=handler.enabled,
            cache_enabled=handler.cache_enabled,
        )


def policy_for(
    mode: str,
    device: torch.device,
    handler: AutocastKwargs | None = None,
    *,
    supported: Iterable[str] | None = None,
) -> PrecisionPolicy:
    """Check that the device can do what was asked, and describe it.

    Raises:
        PrecisionError: The device does not support `mode`; says what it does support.
        NotBuiltError: `mode` is `fp8`.
    """
    known = frozenset(supported_precisions(device) if supported is None else supported)
    if mode == "fp8":
        raise NotBuiltError("mixed_precision='fp8'", f"Use one of {', '.join(sorted(known - {'fp8'}))}")
    if mode not in known or mode not in _DTYPES:
        raise PrecisionError(mode, describe_device(device), known - {"fp8"})
    if handler is None:
        from paceline.config import AutocastKwargs

        handler = AutocastKwargs()
    checked: Any = mode
    return PrecisionPolicy(mode=checked, device_type=device.type, handler=handler)


def autocast_forward(model: nn.Module, policy: PrecisionPolicy) -> None:
    """Run every call of `model` under the policy's autocast; its outputs keep the dtype they have.

    Two hooks on the module do it, so `model.forward` stays the user's own, and so do the types of what it
    returns: copying every output to fp32 would cost 8 GB for the logits of one large-vocabulary batch.
    """
    # A model that was prepared before may be prepared for another precision.
    for hook in list(model._forward_pre_hooks.values()):
        before = getattr(hook, "__self__", None)
        if isinstance(before, _Regions):
            before.remove()
    if policy.uses_autocast:
        _Regions(policy).watch(model)


class _Regions:
    """The open autocast regions of one module; deeper than one only where a module calls itself."""

    def __init__(self, policy: PrecisionPolicy) -> None:
        self._policy = policy
        self._made: list[AbstractContextManager[Any]] = []
        self._depth = 0
        self._handles: list[RemovableHandle] = []

    def watch(self, model: nn.Module) -> None:
        """Open a region around each call of `model`."""
        enter = model.register_forward_pre_hook(self.enter, prepend=True)
        self._handles += [enter, model.register_forward_hook(self.leave, always_call=True)]

    def remove(self) -> None:
        """Open none any more."""
        for handle in self._handles:
            handle.remove()

    def enter(self, _module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        if self._depth == len(self._made):
            self._made.append(self._policy.context())
        self._made[self._depth].__enter__()
        self._depth += 1

    def leave(self, _module: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
        self._depth -= 1
        self._made[self._depth].__exit__(None, None, None)
