"""Every rank holds the whole model; gradients are averaged while the backward runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from paceline.errors import PrepareError, UnusedParametersError
from paceline.strategies.base import Strategy
from paceline.strategies.compilation import compile_model
from paceline.strategies.context import DistributedType

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from paceline.config import DistributedDataParallelKwargs
    from paceline.strategies.context import RunContext

_HOOKS: dict[str, Callable[..., Any]] = {
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": default_hooks.bf16_compress_hook,
    "power_sgd": powerSGD_hook.powerSGD_hook,
    "batched_power_sgd": powerSGD_hook.batched_powerSGD_hook,
}
_WRAPPERS: dict[str, Callable[..., Any]] = {
    "fp16": default_hooks.fp16_compress_wrapper,
    "bf16": default_hooks.bf16_compress_wrapper,
}
_PLAIN_HOOK = default_hooks.allreduce_hook


class DDPStrategy(Strategy):
    """`torch.nn.parallel.DistributedDataParallel` around every trained model."""

    name = "ddp"

    def __init__(self, surroundings: RunContext) -> None:
        super().__init__(surroundings)
        self._settings = surroundings.config.ddp_config
        self._wrapped: list[NamingDDP] = []

    @property
    @override
    def distributed_type(self) -> DistributedType:
        kind = self.context.device.type.upper()
        return DistributedType.MULTI_GPU if kind == "CUDA" else DistributedType(f"MULTI_{kind}")

    @override
    def prepare_model(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        self.place_whole(model, place=place)
        compile_model(model, self.context.config.dynamo_config)
        wrapped = NamingDDP(model, **self._arguments(place))
        _register_hook(wrapped, self._settings)
        self._wrapped.append(wrapped)
        return wrapped

    def _arguments(self, place: bool) -> dict[str, Any]:
        settings = self._settings
        device = self.context.device
        arguments: dict[str, Any] = {
            "device_ids": [device] if place and device.type != "cpu" else None,
            "bucket_cap_mb": settings.bucket_cap_mb,
            "find_unused_parameters": settings.find_unused_parameters,
            "gradient_as_bucket_view": settings.gradient_as_bucket_view,
            "static_graph": settings.static_graph,
        }
        # torch 2.13 warns about this argument whatever its value, and True is what it does without it.
        return arguments if settings.broadcast_buffers else arguments | {"broadcast_buffers": False}

    @override
    def unwrap(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, DistributedDataParallel) else model

    @override
    def set_gradient_sync(self, model: nn.Module, enabled: bool) -> None:
        # What DDP.no_sync() sets, without a context manager a step.
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = enabled

    @override
    def check_first_backward(self) -> None:
        """Name the parameters that got no gradient: DDP would train on with unaveraged ones until the next forward.

        Raises:
            UnusedParametersError: With their names.
        """
        if self._settings.find_unused_parameters or self._settings.static_graph:
            return
        for wrapped in self._wrapped:
            trained = [(n, p) for n, p in wrapped.module.named_parameters() if p.requires_grad]
            unused = [name for name, parameter in trained if parameter.grad is None]
            if unused and len(unused) < len(trained):
                raise UnusedParametersError(unused)

    @override
    def join(self, models: Sequence[nn.Module]) -> AbstractContextManager[Any]:
        return Join([model for model in models if isinstance(model, DistributedDataParallel)])

    @override
    def describe(self) -> list[str]:
        count = self.context.world.size
        lines = [f"DDP: each of {count} ranks holds the whole model; gradients are averaged in the backward"]
        if self._settings.comm_hook != "no":
            lines.append(f"gradients travel through the {self._settings.comm_hook} hook")
        return lines

    @override
    def dtypes(self) -> dict[str, str]:
        table = super().dtypes()
        if self._settings.comm_hook in ("fp16", "bf16"):
            table["reduce"] = self._settings.comm_hook
        return table


class NamingDDP(DistributedDataParallel):
    """DDP whose complaint about missing gradients names the parameters instead of counting them."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the module.

        Raises:
            UnusedParametersError: Parameters got no gradient in the step before.
        """
        try:
            return super().forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            unused = self._unused(str(error))
            if not unused:
                raise
            raise UnusedParametersError(unused) from error

    def _unused(self, message: str) -> list[str]:
        if "Expected to have finished reduction" not in message:
            return []
        found = re.search(r"did not receive grad for rank \d+: ([\d ,]+)", message)
        if found is None:
            return [name for name, p in self.module.named_parameters() if p.requires_grad and p.grad is None]
        names = [name for name, p in self.module.named_parameters() if p.requires_grad]
        return [names[int(index)] for index in re.findall(r"\d+", found[1])]


def _register_hook(wrapped: DistributedDataParallel, settings: DistributedDataParallelKwargs) -> None:
    """Register the communication hook, itself wrapped in a compressing one where asked."""
    if settings.comm_hook == "no" and settings.comm_wrapper == "no":
        return
    hook = _HOOKS.get(settings.comm_hook, _PLAIN_HOOK)
    if settings.comm_wrapper != "no":
        hook = _WRAPPERS[settings.comm_wrapper](hook)
    state = None
    if settings.comm_hook.endswith("power_sgd"):
        state = powerSGD_hook.PowerSGDState(process_group=None, **settings.comm_state_option)
    try:
        wrapped.register_comm_hook(state, hook)
    except TypeError as error:
        raise PrepareError(
            f"comm_hook={settings.comm_hook!r}, comm_wrapper={settings.comm_wrapper!r}",
            f"This backend cannot carry it: {error}",
            "Use fp16 or power_sgd here, or no hook",
        ) from error
