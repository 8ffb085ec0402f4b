"""Every rank has the whole model; gradients are averaged during the backward."""

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
    keeps_addresses = True

    def __init__(self, context: RunContext) -> None:
        super().__init__(context)
        self._settings = context.config.ddp_config
        self._wrapped: list[NamingDDP] = []
        self._replicas = ReplicaCheck()
        self._own_group: Group | None = None
        self._close_own_group: weakref.finalize[..., DDPStrategy] | None = None

    @property
    @override
    def distributed_type(self) -> DistributedType:
        kind = self.context.device.type.upper()
        return DistributedType.MULTI_GPU if kind == "CUDA" else DistributedType(f"MULTI_{kind}")

    @override
    def prepare_model(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        if isinstance(model, DistributedDataParallel):
            model = _unwrap_own(model)
        sharded = [name for name, p in model.named_parameters() if hasattr(p, "placements")]
        if sharded:
            raise PrepareError(
                f"{named(sharded)} of {type(model).__name__} {'is' if len(sharded) == 1 else 'are'} sharded already",
                "DDP keeps every parameter whole on every rank",
                "Train with strategy='fsdp', or rebuild the model and prepare that",
            )
        self.fp8.convert(model)
        self.place_whole(model, place=place)
        self.compiler.compile(model)
        splits_graphs = not self.compiler.is_for_blocks
        wrapped = NamingDDP(model, self._open_group, splits_graphs=splits_graphs, **self._arguments(place))
        _register_hook(wrapped, self._settings)
        wrapped.num_hooks = len(wrapped._comm_hooks)
        # Without the wrapper of a call that was refused, which would average the same gradients once more.
        self._wrapped = [*(other for other in self._wrapped if other.module is not model), wrapped]
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
        # torch 2.13 warns about this argument whatever its value; the default is True.
        return arguments if settings.broadcast_buffers else arguments | {"broadcast_buffers": False}

    @override
    def unwrap(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, DistributedDataParallel) else model

    @override
    def set_gradient_sync(self, model: nn.Module, enabled: bool) -> None:
        # As DDP.no_sync() does, without a context manager in every step.
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = enabled

    @override
    @contextmanager
    def sync_next_backward(self, model: nn.Module) -> Iterator[None]:
        if not isinstance(model, NamingDDP):
            yield
            return
        before = model.require_backward_grad_sync
        model.expect_exchange()
        try:
            yield
        finally:
            model.require_backward_grad_sync = before

    @override
    def backward(self, loss: Tensor, scale: Tensor | None = None, **kwargs: Any) -> None:
        if kwargs.get("create_graph"):
            raise SteppingError(
                "backward() got create_graph=True",
                "DDP averages gradients without a graph, so that what is computed from them cannot be differentiated",
                "Use torch.autograd.grad(..., create_graph=True), and call backward() once for the whole loss",
            )
        before = [wrapped.begin_backward() for wrapped in self._wrapped]
        try:
            super().backward(loss, scale, **kwargs)
        except RuntimeError as error:
            self._translate(error)
            raise
        for wrapped, versions in zip(self._wrapped, before, strict=True):
            wrapped.end_backward(versions)

    @override
    def mean_loss(self, loss: Tensor) -> Tensor:
        if any(wrapped.joins_uneven_inputs for wrapped in self._wrapped):
            raise SteppingError(
                "optimizer.step(closure) was called under join_uneven_inputs",
                "The optimizer decides by the loss of all ranks, and those that have run out of batches have none",
                "Keep even_batches=True: it fills up the last batches, and gather_for_metrics drops the added samples",
            )
        return super().mean_loss(loss)

    def _translate(self, error: RuntimeError) -> None:
        """Name the parameter whose gradient was computed twice, or averaged by two models.

        Raises:
            SteppingError: DDP's error is about that.
        """
        if "not the expected DDP bucket view" in str(error) and (shared := self._shared_parameters()):
            raise SteppingError(
                f"{named(shared, 4)} {'is' if len(shared) == 1 else 'are'} in several prepared models, and a backward "
                "reached them between the forward and the backward of another of these models",
                "DDP averages the gradients of each model on its own, in memory of its own",
                "Put the models into one module that calls all of them, and prepare that; or call forward and backward "
                "of one model before the forward of the next",
            ) from error
        match = re.search(r"Parameter at index (\d+)(?: with name (\S+))? has been marked as ready twice", str(error))
        if match is None:
            return
        index = int(match[1])
        name = match[2] or ", or ".join(dict.fromkeys(wrapped.name_of(index) for wrapped in self._wrapped))
        raise SteppingError(
            f"The gradient of {name} was computed twice for one forward of the prepared model",
            "DDP averages a gradient as soon as it is computed, and another backward reached the parameter between the "
            "forward and its backward, through unwrap_model(model) or in a checkpoint with use_reentrant=True",
            "Add the losses up and call backward() once, or pass use_reentrant=False to the checkpoint",
        ) from error

    def _shared_parameters(self) -> list[str]:
        """The names, each in the first model that has it, of parameters that are in several models."""
        owners: dict[int, list[str]] = {}
        for wrapped in self._wrapped:
            for name, parameter in wrapped.trained:
                owners.setdefault(id(parameter), []).append(name)
        return [names[0] for names in owners.values() if len(names) > 1]

    @override
    def complete_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        incomplete = [wrapped for wrapped in self._wrapped if not wrapped.is_complete]
        if not incomplete:
            return
        requested = {id(p) for p in parameters}
        for wrapped in incomplete:
            if wrapped.has_any(requested):
                wrapped.complete()

    @override
    def stepped(self) -> None:
        super().stepped()
        # Without a wrapped model there is nothing to compare: something else has sharded what is trained.
        if self._wrapped and all(wrapped.keeps_replicas_alike for wrapped in self._wrapped):
            self._replicas.stepped(lambda: [p for wrapped in self._wrapped for p in wrapped.trained])

    @override
    def model_state(self, model: nn.Module) -> dict[str, TensorShard]:
        # Only one rank's weights are saved.
        self._replicas.check()
        return super().model_state(model)

    @override
    def add_group(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        super().add_group(optimizer, group)
        for wrapped in self._wrapped:
            wrapped.invalidate_reducer()

    def _open_group(self) -> Group:
        if self._own_group is None:
            opened = dist.new_group()
            self._own_group = TorchGroup(self.context.device, opened)
            # A group has its own threads, which would outlive the Accelerator in a long program.
            self._close_own_group = weakref.finalize(self, _close_group, opened)
            self._close_own_group.atexit = False
        return self._own_group

    @override
    def close(self) -> None:
        super().close()
        if self._close_own_group is not None:
            self._close_own_group()
        self._own_group = self._close_own_group = None

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
            lines.append(f"gradients are compressed by the communication hook {self._settings.comm_hook}")
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


def _unwrap_own(wrapped: DistributedDataParallel) -> nn.Module:
    """The module of a model that was prepared before: a wrapper around its wrapper would average again.

    Raises:
        PrepareError: The script has wrapped the model itself.
    """
    if isinstance(wrapped, NamingDDP):
        module: nn.Module = wrapped.module
        return module
    raise PrepareError(
        f"{type(wrapped.module).__name__} is wrapped in {type(wrapped).__name__} already",
        "prepare wraps it, with the settings of this run",
        "Pass the module itself, and DDP's settings as DistributedDataParallelKwargs",
    )


def _register_hook(wrapped: DistributedDataParallel, settings: DistributedDataParallelKwargs) -> None:
    """Register the communication hook, with a compressing wrapper around it if one is configured."""
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
            f"This backend does not support it: {error}",
            "Use fp16 or power_sgd, or no hook",
        ) from error
