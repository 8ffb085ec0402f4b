"""When a run ends because memory ran out: who held it, and the smallest change under which it would fit."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING

import torch

from paceline.environment.device import describe_device
from paceline.planner import RunSettings, describe_out_of_memory, measure_memory, process_memory, requested_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from paceline.accelerator.assembly import RunComponents

__all__ = ["explain_out_of_memory", "find_out_of_memory", "report_out_of_memory_at_exit"]

_WORDS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
# What a run holds, asked for only when it ends: models, optimizers, samples of a rank's batch, steps of a window.
MemorySnapshot = tuple["Sequence[nn.Module]", "Sequence[Optimizer]", "int | None", int]


def report_out_of_memory_at_exit(
    owner: object, components: RunComponents, holdings: Callable[[], MemorySnapshot | None]
) -> None:
    """Add to the account of a failure, if it was for want of memory, when the process ends.

    Args:
        owner: When it goes, nothing is reported any more.
        components: The run.
        holdings: What it holds; must not keep the owner alive.
    """
    device = components.context.device
    libraries = process_memory(device) if device.type == "cpu" else 0
    report = partial(_report, components, holdings, os.getpid(), libraries)
    # Before anything is let go: the traceback still holds what filled the memory.
    atexit.register(report)
    weakref.finalize(owner, atexit.unregister, report).atexit = False


def find_out_of_memory(error: BaseException | None) -> BaseException | None:
    """The exception in a chain that says that memory ran out, on the device or the host."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in _WORDS):
            return error
        error = error.__cause__ or error.__context__
    return None


def explain_out_of_memory(
    components: RunComponents, holdings: MemorySnapshot, error: BaseException, *, libraries: int = 0
) -> str:
    """Say who holds the memory and what would help.

    Args:
        components: The run.
        holdings: What it holds.
        error: What said that memory ran out.
        libraries: Bytes that the process held before.
    """
    models, optimizers, micro_batch, accumulation = holdings
    context, plugin = components.context, components.context.config.fsdp_config
    run = RunSettings(
        ranks=context.world.size,
        micro_batch=micro_batch,
        accumulation=accumulation,
        checkpoints=plugin is not None and bool(plugin.activation_checkpointing),
        offloads=plugin is not None and bool(plugin.cpu_offload),
        on_cpu=context.device.type == "cpu",
    )
    return describe_out_of_memory(
        measure_memory(models, optimizers, context.device, libraries=libraries),
        run,
        requested_bytes(str(error)),
        rank=context.world.rank,
        device=describe_device(context.device),
    )


def _report(components: RunComponents, holdings: Callable[[], MemorySnapshot | None], pid: int, libraries: int) -> None:
    error = find_out_of_memory(getattr(sys, "last_value", None))
    held = holdings() if error is not None and os.getpid() == pid else None
    if error is None or held is None:
        return
    # Where memory has run out, there may be none for this either.
    with contextlib.suppress(MemoryError, RuntimeError):
        text = explain_out_of_memory(components, held, error, libraries=libraries)
        components.error_file.add_remark(text)
        components.error_file.print_unless_reported(text)
