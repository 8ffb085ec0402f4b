"""Settings of torch's own classes: DDP, autocast, GradScaler, process group, profiler."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from paceline.config.schema.base import Key, Section
from paceline.config.schema.readers import FilePath, Names

CommHook = Literal["no", "fp16", "bf16", "power_sgd", "batched_power_sgd"]


class DistributedDataParallelKwargs(Section):
    """How `DistributedDataParallel` averages gradients; used under strategy ddp."""

    key_prefix: ClassVar[str] = "ddp_"

    dim: int = Field(0, description="Passed to DDP, where it has no effect with one device per process.")
    broadcast_buffers: bool = Field(True, description="Broadcast rank 0's buffers to all ranks before each forward.")
    bucket_cap_mb: Annotated[int | float, Field(gt=0), Key(unit="MiB")] = Field(
        25, description="Size in MiB of the buckets in which gradients are reduced."
    )
    find_unused_parameters: bool = Field(
        False, description="Search the graph in every step for parameters without a gradient; costs time."
    )
    check_reduction: bool = Field(False, description="Passed to DDP, which ignores it.")
    gradient_as_bucket_view: bool = Field(
        True, description="Make gradients views of the buckets, which saves one copy of them."
    )
    static_graph: bool = Field(False, description="Promise that every step uses the same parameters in the same order.")
    comm_hook: CommHook = Field(
        "no", description="Communication hook: how gradients are compressed while they are averaged."
    )
    comm_wrapper: Literal["no", "fp16", "bf16"] = Field(
        "no", description="Dtype to which gradients are cast before the communication hook."
    )
    comm_state_option: Annotated[dict[str, Any], Key(has_flag=False)] = Field(
        default_factory=dict, description="Arguments of PowerSGDState, under comm_hook power_sgd."
    )


class GradScalerKwargs(Section):
    """How `torch.amp.GradScaler` adapts the loss scale; used under mixed_precision fp16."""

    init_scale: Annotated[float, Field(gt=0)] = Field(65536.0, description="Loss scale of the first step.")
    growth_factor: Annotated[float, Field(gt=1)] = Field(
        2.0, description="Factor by which the scale grows after growth_interval steps without overflow."
    )
    backoff_factor: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Factor by which the scale shrinks after an overflow."
    )
    growth_interval: Annotated[int, Field(ge=1)] = Field(
        2000, description="Steps in a row without overflow before the scale grows."
    )
    enabled: bool = Field(True, description="Scale losses at all.")


class AutocastKwargs(Section):
    """How `torch.autocast` runs in forward."""

    enabled: bool = Field(True, description="Run operations in the lower precision.")
    cache_enabled: bool | None = Field(
        None, description="Cache cast weights within one forward; None takes torch's default."
    )


class InitProcessGroupKwargs(Section):
    """How `torch.distributed` opens the process group."""

    backend: str | None = Field(None, description="Backend, such as nccl or gloo; None chooses by the device.")
    init_method: str | None = Field(None, description="Rendezvous URL; None uses the launcher's variables.")
    timeout: timedelta | None = Field(
        None, description="How long a collective may wait, as a timedelta; None takes the backend's default."
    )


class ProfileKwargs(Section):
    """What `torch.profiler` records, and where traces go."""

    activities: Names | None = Field(
        None, description='Activities to record, for example ["cpu", "cuda"]; None records all.'
    )
    schedule_option: dict[str, int] | None = Field(
        None, description="Arguments of torch.profiler.schedule: wait, warmup, active, repeat, skip_first."
    )
    on_trace_ready: Callable[..., Any] | None = Field(
        None, description="Called with the profiler when a trace is ready."
    )
    record_shapes: bool = Field(False, description="Record the shapes of operator inputs.")
    profile_memory: bool = Field(False, description="Record memory use.")
    with_stack: bool = Field(False, description="Record source lines.")
    with_flops: bool = Field(False, description="Estimate floating-point operations.")
    with_modules: bool = Field(False, description="Record the module hierarchy.")
    output_trace_dir: FilePath | None = Field(None, description="Folder for Chrome traces, one file per rank.")
