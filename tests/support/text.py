"""Real text for tests and benchmarks: the sources of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def standard_library(most: int = 2_000_000) -> list[bytes]:
    """Python files of the standard library, always in the same order, until they have `most` bytes."""
    found: list[bytes] = []
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_bytes()
        found.append(text)
        size += len(text)
        if size >= most:
            break
    return found
