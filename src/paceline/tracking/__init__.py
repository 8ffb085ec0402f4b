"""Experiment trackers behind one small protocol, one module per package; JSON lines need no package."""

from __future__ import annotations

from paceline.tracking.base import GeneralTracker
from paceline.tracking.files import METRICS_FILE, RECORD_FILE
from paceline.tracking.registry import TRACKERS
from paceline.tracking.selection import choose_trackers
from paceline.tracking.trackers import Trackers

__all__ = ["METRICS_FILE", "RECORD_FILE", "TRACKERS", "GeneralTracker", "Trackers", "choose_trackers"]
