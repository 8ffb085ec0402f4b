"""Settings handed to torch's own classes: DDP, autocast, the loss scaler, the group, the profiler."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from paceline.config.schema.base import Key, Section
from paceline.config.schema.readers import FilePath, Names

CommHook = Literal["no", "fp16", "bf16", "power_sgd", "batched_power_sgd"]


class DistributedDataParallelKwargs(Section):
    """How DDP averages gradients."""

    key_prefix: ClassVar[str] = "ddp_"

    dim: int = Field(0, description="Dimension along which DDP would scatter its inputs.")
    broadcast_buffers: bool = Field(True, description="Copy rank 0's buffers to all ranks before each forward.")
    bucket_cap_mb: Annotated[int | float, Field(gt=0)] = Field(
        25, description="Size in MiB of the buckets in which gradients are averaged."
    )
    find_unused_parameters: bool = Field(
        False, description="Walk the graph in every step for parameters that got no gradient."
    )
    check_reduction: bool = Field(False, description="Passed to DDP, which no longer uses it.")
    gradient_as_bucket_view: bool = Field(
        True, description="Let gradients be views of the buckets, which saves one copy of them."
    )
    static_graph: bool = Field(False, description="Promise that every step uses the same parameters.")
    comm_hook: CommHook = Field("no", description="Compression of gradients while they are averaged.")
    comm_wrapper: Literal["no", "fp16", "bf16"] = Field(
        "no", description="Precision to which the compression hook's input is cast."
    )
    comm_state_option: Annotated[dict[str, Any], Key(has_flag=False)] = Field(
        default_factory=dict, description="Options of the PowerSGD state."
    )


class GradScalerKwargs(Section):
    """How the fp16 loss scaler moves its scale."""

    init_scale: Annotated[float, Field(gt=0)] = Field(65536.0, description="Scale of the first step.")
    growth_factor: Annotated[float, Field(gt=1)] = Field(
        2.0, description="Factor by which the scale grows after enough good steps."
    )
    backoff_factor: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Factor by which the scale shrinks after an overflow."
    )
    growth_interval: Annotated[int, Field(ge=1)] = Field(
        2000, description="Good steps in a row before the scale grows."
    )
    enabled: bool = Field(True, description="Whether losses are scaled at all.")


class AutocastKwargs(Section):
    """How `torch.autocast` runs."""

    enabled: bool = Field(True, description="Whether operations run in the lower precision.")
    cache_enabled: bool | None = Field(
        None, description="Whether cast weights are kept within one forward; None leaves it to torch."
    )


class InitProcessGroupKwargs(Section):
    """How the process group is opened."""

    backend: str | None = Field(None, description="Backend of torch.distributed; None chooses by the device.")
    init_method: str | None = Field(None, description="Rendezvous URL; None uses the launcher's variables.")
    timeout: timedelta | None = Field(
        None, description="How long a collective may wait; None is torch's default for the backend."
    )


class ProfileKwargs(Section):
    """What `torch.profiler` records."""

    activities: Names | None = Field(
        None, description='Kinds of work to record, for example ["cpu", "cuda"]; None records all.'
    )
    schedule_option: dict[str, int] | None = Field(
        None, description="Arguments of torch.profiler.schedule: wait, warmup, active, repeat, skip_first."
    )
    on_trace_ready: Callable[..., Any] | None = Field(None, description="Called with the profiler at each trace.")
    record_shapes: bool = Field(False, description="Record the shapes of operator inputs.")
    profile_memory: bool = Field(False, description="Record memory use.")
    with_stack: bool = Field(False, description="Record source lines.")
    with_flops: bool = Field(False, description="Estimate floating-point operations.")
    with_modules: bool = Field(False, description="Record the module hierarchy.")
    output_trace_dir: FilePath | None = Field(None, description="Folder for Chrome traces, one file per rank.")
