"""Which dtype a run computes in, and the autocast region of a model's forward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from paceline.environment.device import describe_device, supported_precisions, why_no_fp8
from paceline.errors import PrecisionError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.utils.hooks import RemovableHandle

    from paceline.config import AutocastKwargs

Mode = Literal["no", "bf16", "fp16", "fp8"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes that settings name."""

# Under fp8 only the products of large linear layers are in 8 bits; everything else is as under bf16.
_DTYPES_OF_MODES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def short_dtype(dtype: torch.dtype) -> str:
    """Shorten a dtype's name.

    Args:
        dtype: Any dtype.

    Returns:
        `fp32`, `bf16`, `fp16` or `fp64`; torch's own name for any other.
    """
    name = str(dtype).removeprefix("torch.")
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}.get(name, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionPolicy:
    """The dtype of matrix products and convolutions; weights and reductions stay in fp32.

    Attributes:
        mode: `bf16`, `fp16` or `fp8`; `no` computes in the dtype of the weights.
        device_type: The `torch.device.type` that autocast acts on.
        handler: The settings of autocast.
    """

    mode: Mode
    device_type: str
    handler: AutocastKwargs

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which autocast runs matrix products."""
        return _DTYPES_OF_MODES[self.mode]

    @property
    def uses_autocast(self) -> bool:
        """Whether a forward runs under autocast at all."""
        return self.mode != "no" and self.handler.enabled

    @property
    def needs_loss_scaling(self) -> bool:
        """Whether gradients could underflow without a loss scale, as in fp16."""
        return self.mode == "fp16"

    def context(self, handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """Open an autocast region; a null context when the mode is `no`.

        Args:
            handler: Settings that replace the policy's own inside.
        """
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
    """Check that the device can compute in a precision, and return the policy for it.

    Args:
        mode: `no`, `bf16`, `fp16` or `fp8`.
        device: Where the run computes.
        handler: Settings of autocast; torch's defaults when left out.
        supported: The modes that the device supports; looked up when left out.

    Raises:
        PrecisionError: The device does not support `mode`; names those that it does.
    """
    known = frozenset(supported_precisions(device) if supported is None else supported)
    if mode not in known or mode not in _DTYPES_OF_MODES:
        raise PrecisionError(mode, describe_device(device), known, why_no_fp8(device) if mode == "fp8" else "")
    if handler is None:
        from paceline.config import AutocastKwargs

        handler = AutocastKwargs()
    checked_mode: Any = mode
    return PrecisionPolicy(mode=checked_mode, device_type=device.type, handler=handler)


def autocast_forward(model: nn.Module, policy: PrecisionPolicy) -> None:
    """Run every call of `model` under the policy's autocast; its outputs keep their dtype.

    Two hooks on the module do it, so `model.forward` stays the user's own. Outputs are not copied to fp32, which
    would cost 8 GB for the logits of one large-vocabulary batch.
    """
    # A model may be prepared again, for another precision.
    for hook in list(model._forward_pre_hooks.values()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, _AutocastRegions):
            owner.remove_hooks()
    if policy.uses_autocast:
        _AutocastRegions(policy).register_hooks(model)


class _AutocastRegions:
    """The autocast regions open in one module; more than one only where a module calls itself."""

    def __init__(self, policy: PrecisionPolicy) -> None:
        self._policy = policy
        self._regions: list[AbstractContextManager[Any]] = []
        self._depth = 0
        self._handles: list[RemovableHandle] = []

    def register_hooks(self, model: nn.Module) -> None:
        """Open a region for each call of `model`."""
        enter = model.register_forward_pre_hook(self.enter, prepend=True)
        self._handles += [enter, model.register_forward_hook(self.exit, always_call=True)]

    def remove_hooks(self) -> None:
        """Leave the module without autocast."""
        for handle in self._handles:
            handle.remove()

    def enter(self, _module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        if self._depth == len(self._regions):
            self._regions.append(self._policy.context())
        self._regions[self._depth].__enter__()
        self._depth += 1

    def exit(self, _module: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
        self._depth -= 1
        self._regions[self._depth].__exit__(None, None, None)
