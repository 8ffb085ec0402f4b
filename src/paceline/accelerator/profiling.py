"""torch's profiler with a trace file per rank, and peak memory."""

from __future__ import annotations

import logging
import resource
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity

from paceline.errors import PacelineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.config import ProfileKwargs

_LOG = logging.getLogger(__name__)


@contextmanager
def profile(settings: ProfileKwargs, rank: int) -> Iterator[torch.profiler.profile]:
    """Profile the body; with `output_trace_dir`, write `profile_{rank}.json` at the end, if anything was recorded."""
    schedule = torch.profiler.schedule(**settings.schedule_option) if settings.schedule_option else None
    profiler = torch.profiler.profile(
        activities=_activities(settings.activities),
        schedule=schedule,
        on_trace_ready=settings.on_trace_ready,
        record_shapes=settings.record_shapes,
        profile_memory=settings.profile_memory,
        with_stack=settings.with_stack,
        with_flops=settings.with_flops,
        with_modules=settings.with_modules,
    )
    with profiler:
        yield profiler
    if settings.output_trace_dir is not None:
        write_trace(profiler, Path(settings.output_trace_dir), rank)


def write_trace(profiler: torch.profiler.profile, folder: Path, rank: int) -> None:
    """Write `profile_{rank}.json`; warn if the loop ended before the schedule's first active step."""
    if profiler.profiler is None:
        _LOG.warning("[rank %d] profile() recorded nothing: its schedule waits longer than the loop. No trace.", rank)
        return
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"profile_{rank}.json"))


def _activities(names: Any) -> list[ProfilerActivity] | None:
    if names is None:
        return None
    known = {activity.lower(): getattr(ProfilerActivity, activity) for activity in ("CPU", "CUDA", "XPU")}
    unknown = [name for name in names if name.lower() not in known]
    if unknown:
        raise PacelineError(
            f"ProfileKwargs(activities={list(names)!r})",
            f"torch's profiler has no activity {unknown[0]!r}",
            f"Choose among {', '.join(known)}",
        )
    return [known[name.lower()] for name in names]


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: of the device, or of host memory on a CPU."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    # In kilobytes on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
