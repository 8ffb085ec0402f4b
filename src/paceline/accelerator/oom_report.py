"""The report of a run that ended because memory ran out: what filled it, and the smallest change that would help."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from paceline.environment.device import describe_device
from paceline.environment.host import resident_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from paceline.accelerator.assembly import RunComponents

__all__ = ["MemorySnapshot", "explain_out_of_memory", "find_out_of_memory", "report_out_of_memory_at_exit"]

_MESSAGES = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class MemorySnapshot(NamedTuple):
    """What a run keeps in memory.

    Attributes:
        models: The prepared models.
        optimizers: The optimizers inside the prepared ones.
        micro_batch: Samples in a rank's batch; None if that is not known.
        accumulation: Micro-batches to an optimizer step.
    """

    models: Sequence[nn.Module]
    optimizers: Sequence[Optimizer]
    micro_batch: int | None
    accumulation: int


class _SnapshotOwner(Protocol):
    def memory_snapshot(self) -> MemorySnapshot: ...


def report_out_of_memory_at_exit(owner: _SnapshotOwner, components: RunComponents) -> None:
    """Explain a failure for lack of memory when the process ends.

    Args:
        owner: Knows what the run keeps in memory; once it is gone, nothing is reported any more.
        components: The run.
    """
    device = components.context.device
    libraries = resident_bytes() if device.type == "cpu" else 0
    snapshot = weakref.WeakMethod(owner.memory_snapshot)
    report = partial(_report, components, snapshot, os.getpid(), libraries)
    # When the interpreter exits, the traceback still keeps alive what filled the memory.
    atexit.register(report)
    weakref.finalize(owner, atexit.unregister, report).atexit = False


def find_out_of_memory(error: BaseException | None) -> BaseException | None:
    """The exception in a chain that says that memory ran out, on the device or the host; None without one."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in _MESSAGES):
            return error
        error = error.__cause__ or error.__context__
    return None


def explain_out_of_memory(
    components: RunComponents, snapshot: MemorySnapshot, error: BaseException, *, libraries: int = 0
) -> str:
    """Describe what fills the memory and what would help.

    Args:
        components: The run.
        snapshot: What it keeps in memory.
        error: The exception that said that memory ran out.
        libraries: Bytes that the process used before there was a model.
    """
    from paceline.planner import RunSettings, describe_out_of_memory, measure_memory, requested_bytes

    context, plugin = components.context, components.context.config.fsdp_config
    run = RunSettings(
        ranks=context.world.size,
        micro_batch=snapshot.micro_batch,
        accumulation=snapshot.accumulation,
        checkpoints=plugin is not None and bool(plugin.activation_checkpointing),
        offloads=plugin is not None and bool(plugin.cpu_offload),
        on_cpu=context.device.type == "cpu",
    )
    return describe_out_of_memory(
        measure_memory(snapshot.models, snapshot.optimizers, context.device, libraries=libraries),
        run,
        requested_bytes(str(error)),
        rank=context.world.rank,
        device=describe_device(context.device),
    )


def _report(
    components: RunComponents,
    take_snapshot: Callable[[], Callable[[], MemorySnapshot] | None],
    pid: int,
    libraries: int,
) -> None:
    error = find_out_of_memory(getattr(sys, "last_value", None))
    method = take_snapshot()
    if error is None or method is None or os.getpid() != pid:
        return
    # There may be no memory left for the report either.
    with contextlib.suppress(MemoryError, RuntimeError):
        text = explain_out_of_memory(components, method(), error, libraries=libraries)
        components.error_file.add_remark(text)
        components.error_file.print_unless_reported(text)
