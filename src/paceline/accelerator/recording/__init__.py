"""Notes of what a run did, for `paceline verify-resume` and `paceline parity`; a run that is not checked has none."""

from __future__ import annotations

from paceline.accelerator.recording.parity import ParityRecorder
from paceline.accelerator.recording.resume import Recorder

__all__ = ["ParityRecorder", "Recorder"]
