"""Experiment trackers behind one small protocol, each on its own package; JSON lines need none."""

from __future__ import annotations

from paceline.tracking.base import GeneralTracker
from paceline.tracking.choice import choose_trackers
from paceline.tracking.files import METRICS_FILE, RECORD_FILE
from paceline.tracking.run import Trackers
from paceline.tracking.table import TRACKERS

__all__ = ["METRICS_FILE", "RECORD_FILE", "TRACKERS", "GeneralTracker", "Trackers", "choose_trackers"]
