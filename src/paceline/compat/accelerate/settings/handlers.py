"""Keyword arguments of torch's own classes, as they are passed in `Accelerator(kwargs_handlers=[...])`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from paceline.compat.accelerate.settings.enums import DDPCommunicationHookType
from paceline.compat.accelerate.settings.errors import InvalidValueError, UnsupportedError
from paceline.compat.accelerate.settings.variables import clear_environment, parse_flag_from_env
from paceline.errors import MissingExtraError

if TYPE_CHECKING:
    import torch

__all__ = [
    "AORecipeKwargs",
    "AutocastKwargs",
    "DistributedDataParallelKwargs",
    "FP8RecipeKwargs",
    "GradScalerKwargs",
    "InitProcessGroupKwargs",
    "KwargsHandler",
    "MSAMPRecipeKwargs",
    "ProfileKwargs",
    "TERecipeKwargs",
]


class KwargsHandler:
    """A dataclass whose changed fields become keyword arguments."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, copied."""
        return copy.deepcopy(self.__dict__)

    def to_kwargs(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults; the environment does not count as a default."""
        with clear_environment():
            defaults = type(self)().to_dict()
        return {name: value for name, value in self.to_dict().items() if defaults[name] != value}


@dataclass
class AutocastKwargs(KwargsHandler):
    """How `torch.autocast` runs in forward."""

    enabled: bool = True
    cache_enabled: bool | None = None


@dataclass
class DistributedDataParallelKwargs(KwargsHandler):
    """How `DistributedDataParallel` averages gradients."""

    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: int = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    comm_hook: DDPCommunicationHookType = DDPCommunicationHookType.NO
    comm_wrapper: DDPCommunicationHookType = DDPCommunicationHookType.NO
    comm_state_option: dict[str, Any] = field(default_factory=dict)

    def to_dict(self, ignore_keys: tuple[str, ...] = ("comm_hook", "comm_wrapper", "comm_state_option")) -> Any:
        """Return the fields that the constructor of DDP takes."""
        return {name: value for name, value in super().to_dict().items() if name not in ignore_keys}

    def register_comm_hook(self, model: Any) -> None:
        """Register the communication hook on a model that DDP has wrapped."""
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        powers = {
            DDPCommunicationHookType.POWER_SGD: powerSGD_hook.powerSGD_hook,
            DDPCommunicationHookType.BATCHED_POWER_SGD: powerSGD_hook.batched_powerSGD_hook,
        }
        hooks: dict[DDPCommunicationHookType, Any] = {
            DDPCommunicationHookType.FP16: default_hooks.fp16_compress_hook,
            DDPCommunicationHookType.BF16: default_hooks.bf16_compress_hook,
            **powers,
        }
        wrappers: dict[DDPCommunicationHookType, Any] = {
            DDPCommunicationHookType.FP16: default_hooks.fp16_compress_wrapper,
            DDPCommunicationHookType.BF16: default_hooks.bf16_compress_wrapper,
        }
        hook = hooks.get(self.comm_hook)
        if hook is None:
            return
        if self.comm_wrapper in wrappers:
            hook = wrappers[self.comm_wrapper](hook)
        state = powerSGD_hook.PowerSGDState(None, **self.comm_state_option) if self.comm_hook in powers else None
        model.register_comm_hook(state=state, hook=hook)


@dataclass
class GradScalerKwargs(KwargsHandler):
    """How `torch.amp.GradScaler` adapts the loss scale."""

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True


@dataclass
class InitProcessGroupKwargs(KwargsHandler):
    """How `torch.distributed` opens the process group; without a timeout, 10 minutes under NCCL and 30 elsewhere."""

    backend: str | None = "nccl"
    init_method: str | None = None
    timeout: timedelta | None = None

    def __post_init__(self) -> None:
        if self.timeout is None:
            self.timeout = timedelta(minutes=10 if self.backend == "nccl" else 30)


@dataclass
class ProfileKwargs(KwargsHandler):
    """What `torch.profiler` records, and where traces go."""

    activities: list[Literal["cpu", "xpu", "mtia", "cuda", "hpu"]] | None = None
    schedule_option: dict[str, int] | None = None
    on_trace_ready: Callable[..., Any] | None = None
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | None = None

    def build(self) -> torch.profiler.profile:
        """Return a profiler with these settings.

        Raises:
            InvalidValueError: Torch's profiler has no such activity.
        """
        from torch import profiler

        activities = None if self.activities is None else [_activity(name) for name in self.activities]
        schedule = None if self.schedule_option is None else profiler.schedule(**self.schedule_option)
        return profiler.profile(
            activities=activities,
            schedule=schedule,
            on_trace_ready=self.on_trace_ready,
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            with_flops=self.with_flops,
            with_modules=self.with_modules,
        )


def _activity(name: str) -> Any:
    from torch.profiler import ProfilerActivity

    known = {each.lower(): getattr(ProfilerActivity, each) for each in ProfilerActivity.__members__}
    if name not in known:
        raise InvalidValueError(
            f"ProfileKwargs got the activity {name!r}",
            "Torch's profiler has no such activity",
            f"Use some of {', '.join(known)}",
        )
    return known[name]


_NO_FP8 = "paceline does not compute in 8-bit floats yet"
_USE_BF16 = "Use mixed_precision='bf16' and leave the recipe out"


class _Recipe(KwargsHandler):
    """A recipe for 8-bit floats: importable, as programs test for its type; making one raises."""

    def __post_init__(self) -> None:
        raise UnsupportedError(f"{type(self).__name__}(…) was made", _NO_FP8, _USE_BF16)


@dataclass
class AORecipeKwargs(KwargsHandler):
    """How torchao computes in 8-bit floats. What is not set comes from `ACCELERATE_FP8_*`.

    Raises:
        MissingExtraError: torchao is not installed.
    """

    config: Any = None
    module_filter_func: Callable[..., bool] | None = None
    pad_inner_dim: bool | None = None
    enable_fsdp_float8_all_gather: bool | None = None

    def __post_init__(self) -> None:
        if find_spec("torchao") is None:
            raise MissingExtraError("torchao", "torchao", "AORecipeKwargs")
        if self.config is not None:
            return
        for name in ("pad_inner_dim", "enable_fsdp_float8_all_gather"):
            if getattr(self, name) is None:
                setattr(self, name, parse_flag_from_env(f"ACCELERATE_FP8_{name.upper()}", True))
        self.config = import_module("torchao.float8").Float8LinearConfig(
            pad_inner_dim=self.pad_inner_dim, enable_fsdp_float8_all_gather=self.enable_fsdp_float8_all_gather
        )


@dataclass
class TERecipeKwargs(_Recipe):
    """A recipe for Transformer Engine."""

    use_autocast_during_eval: bool | None = None
    margin: int | None = None
    interval: int | None = None
    fp8_format: Literal["HYBRID", "E4M3", "E5M2"] | None = None
    amax_history_len: int | None = None
    amax_compute_algo: Literal["max", "most_recent"] | None = None
    override_linear_precision: tuple[bool, bool, bool] | None = None
    use_mxfp8_block_scaling: bool | None = None


@dataclass
class MSAMPRecipeKwargs(_Recipe):
    """A recipe for MS-AMP."""

    opt_level: Literal["O1", "O2"] | None = None


@dataclass
class FP8RecipeKwargs(TERecipeKwargs, MSAMPRecipeKwargs):
    """A recipe for Transformer Engine or MS-AMP."""

    backend: Literal["MSAMP", "TE"] | None = None
