"""Every rank holds the whole model; gradients are averaged while the backward runs."""

from __future__ import annotations

import re
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from paceline.collectives import TorchGroup
from paceline.errors import PrepareError, SteppingError, named
from paceline.strategies.base import Strategy
from paceline.strategies.compilation import compile_model
from paceline.strategies.context import DistributedType
from paceline.strategies.ddp.module import NamingDDP
from paceline.strategies.ddp.replica_check import ReplicaCheck

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from paceline.checkpoint.format.shards import TensorShard
    from paceline.collectives import Group
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
        self._replicas = ReplicaCheck()
        self._second: Group | None = None
        self._close_second: weakref.finalize[..., DDPStrategy] | None = None

    @property
    @override
    def distributed_type(self) -> DistributedType:
        kind = self.context.device.type.upper()
        return DistributedType.MULTI_GPU if kind == "CUDA" else DistributedType(f"MULTI_{kind}")

    @override
    def prepare_model(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        if isinstance(model, DistributedDataParallel):
            model = _inside(model)
        sharded = [name for name, p in model.named_parameters() if hasattr(p, "placements")]
        if sharded:
            raise PrepareError(
                f"{named(sharded)} of {type(model).__name__} {'is' if len(sharded) == 1 else 'are'} sharded already",
                "DDP keeps every parameter whole on every rank",
                "Train with strategy='fsdp', or build the model anew and prepare that",
            )
        self.place_whole(model, place=place)
        compile_model(model, self.context.config.dynamo_config)
        wrapped = NamingDDP(model, self._open_group, **self._arguments(place))
        _register_hook(wrapped, self._settings)
        wrapped.num_hooks = len(wrapped._comm_hooks)
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
    def backward(self, loss: Tensor, scale: Tensor | None = None, **kwargs: Any) -> None:
        before = [wrapped.begin_backward() for wrapped in self._wrapped]
        try:
            super().backward(loss, scale, **kwargs)
        except RuntimeError as error:
            self._translate(error)
            raise
        for wrapped, versions in zip(self._wrapped, before, strict=True):
            wrapped.end_backward(versions)

    def _translate(self, error: RuntimeError) -> None:
        """Say in our words that a parameter's gradient came twice, and of which parameter."""
        found = re.search(r"Parameter at index (\d+)(?: with name (\S+))? has been marked as ready twice", str(error))
        if found is None:
            return
        index = int(found[1])
        name = found[2] or ", or ".join(dict.fromkeys(wrapped.name_of(index) for wrapped in self._wrapped))
        raise SteppingError(
            f"The gradient of {name} was computed twice for one forward of the prepared model",
            "DDP averages a gradient as soon as it is there: between the forward and its backward another backward "
            "reached the parameter, through unwrap_model(model) or in a checkpoint with use_reentrant=True",
            "Add the losses up and call backward() once, or pass use_reentrant=False to the checkpoint",
        ) from error

    @override
    def complete_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        open_ones = [wrapped for wrapped in self._wrapped if not wrapped.is_complete]
        if not open_ones:
            return
        asked = {id(p) for p in parameters}
        for wrapped in open_ones:
            if wrapped.holds_any(asked):
                wrapped.complete()

    @override
    def stepped(self) -> None:
        if all(wrapped.keeps_replicas_alike for wrapped in self._wrapped):
            self._replicas.stepped(lambda: [p for wrapped in self._wrapped for p in wrapped.trained])

    @override
    def model_state(self, model: nn.Module) -> dict[str, TensorShard]:
        # One rank's weights are saved for all.
        self._replicas.look()
        return super().model_state(model)

    @override
    def add_group(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        super().add_group(optimizer, group)
        for wrapped in self._wrapped:
            wrapped.look_again()

    def _open_group(self) -> Group:
        if self._second is None:
            opened = dist.new_group()
            self._second = TorchGroup(self.context.device, opened)
            # A group has threads of its own, which would outlive every Accelerator of a long program.
            self._close_second = weakref.finalize(self, _close_group, opened)
            self._close_second.atexit = False
        return self._second

    @override
    def close(self) -> None:
        if self._close_second is not None:
            self._close_second()
        self._second = self._close_second = None

    @override
    @contextmanager
    def join(self, models: Sequence[nn.Module]) -> Iterator[None]:
        with Join([model for model in models if isinstance(model, DistributedDataParallel)]):
            yield
        # Ranks may have taken different numbers of steps.
        self._replicas.restart()

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


def _close_group(group: dist.ProcessGroup | None) -> None:
    """Close a group, unless the end of the default group has closed it already."""
    with suppress(ValueError, AssertionError):
        dist.destroy_process_group(group)


def _inside(wrapped: DistributedDataParallel) -> nn.Module:
    """The module of a model that was prepared before; around the wrapper itself, a second would average again.

    Raises:
        PrepareError: The script has wrapped it.
    """
    if isinstance(wrapped, NamingDDP):
        module: nn.Module = wrapped.module
        return module
    raise PrepareError(
        f"{type(wrapped.module).__name__} is wrapped in {type(wrapped).__name__} already",
        "prepare wraps it, with the settings of this run",
        "Hand over the module itself, and its settings as DistributedDataParallelKwargs",
    )


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
