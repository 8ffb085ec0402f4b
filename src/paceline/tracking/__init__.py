"""Experiment trackers behind one small protocol, one module per package; JSON lines need no package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.environment.lazy_names import lazy_attributes

if TYPE_CHECKING:
    from paceline.tracking.base import GeneralTracker
    from paceline.tracking.files import METRICS_FILE, RECORD_FILE
    from paceline.tracking.registry import TRACKERS
    from paceline.tracking.selection import choose_trackers
    from paceline.tracking.trackers import Trackers
else:
    __getattr__, _ = lazy_attributes(
        __name__,
        {
            "base": "GeneralTracker",
            "files": "METRICS_FILE RECORD_FILE",
            "registry": "TRACKERS",
            "selection": "choose_trackers",
            "trackers": "Trackers",
        },
    )

__all__ = ["METRICS_FILE", "RECORD_FILE", "TRACKERS", "GeneralTracker", "Trackers", "choose_trackers"]
