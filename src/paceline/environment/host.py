"""Memory and processor cores of this machine, within the limits of its container."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path

__all__ = ["core_count", "cpu_quota", "host_memory", "oom_kill_count", "processor_name", "resident_bytes"]

_CGROUP = Path("/sys/fs/cgroup")


def host_memory() -> tuple[int, int]:
    """Return (available, total) bytes of host memory; a container's limit counts when it is lower."""
    # Imported here and below because it takes as long as a sixth of the rest of this library.
    import psutil

    memory = psutil.virtual_memory()
    available, total = int(memory.available), int(memory.total)
    limit = _number(_CGROUP / "memory.max")
    used = _number(_CGROUP / "memory.current")
    if limit is None or used is None or limit >= total:
        return available, total
    # Cached files count as used by the container, and are dropped when memory is needed.
    reclaimable = _counters(_CGROUP / "memory.stat").get("inactive_file", 0)
    return min(available, max(0, limit - used + reclaimable)), limit


def resident_bytes() -> int:
    """Return the bytes of host memory that this process has in use."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:  # not Linux
        import psutil

        return int(psutil.Process().memory_info().rss)
    return int(pages) * resource.getpagesize()


def core_count() -> int:
    """Return the number of physical cores that this process may use; logical ones where those are unknown."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def cpu_quota() -> float | None:
    """Return the container's CPU quota in cores; None without one."""
    try:
        quota, _, period = (_CGROUP / "cpu.max").read_text().strip().partition(" ")
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or the word "max"
        return None


def processor_name() -> str:
    """Return the model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    if names:
        return names[0]
    return platform.processor() or platform.machine()


def oom_kill_count() -> int:
    """Return how many processes the kernel's OOM killer has killed since boot."""
    return _counters(Path("/proc/vmstat")).get("oom_kill", 0)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or the word "max"
        return None


def _counters(path: Path) -> dict[str, int]:
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}
