"""Processes that are known by a variable in their environment, however they came from each other."""

from __future__ import annotations

import contextlib
import time

import psutil


def marked(marker: str) -> list[psutil.Process]:
    """Every process that runs with this marker as TEST_MARKER."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TEST_MARKER") == marker:
                found.append(process)
    return found


def none_marked(marker: str, within: float) -> bool:
    """Whether all of them are gone after so many seconds."""
    deadline = time.monotonic() + within
    while marked(marker):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
