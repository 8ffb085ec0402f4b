"""The record that every run writes: `metrics.jsonl`, one line per entry, and `run.json`, its description."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.tracking.base import Backend
from paceline.tracking.log_values import to_json

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["METRICS_FILE", "RECORD_FILE", "Tracker"]

METRICS_FILE = "metrics.jsonl"
RECORD_FILE = "run.json"
_MAX_STARTS = 100


class Tracker(Backend):
    """Appends lines of JSON; needs no package.

    A line has `step`, `time` in seconds since 1970, the values, and what the run itself adds, such as `samples_seen`
    and `peak_memory_bytes`. A value with such a name is written as `logged/time`, for example; only where the script
    passes no step, a number logged as `step` is the line's. It is written when `log` returns. NaN and infinities are
    the texts `NaN`, `Infinity` and `-Infinity`, so that every JSON parser can read them.
    """

    name = "jsonl"
    requires_logging_directory = True

    def start(self) -> None:
        """Create the folder; an existing file is continued."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._record: dict[str, Any] = {}
        self._run = self.folder / METRICS_FILE

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Add the script's settings to `run.json`."""
        self.store_record({"settings": values})

    def store_record(self, more: Mapping[str, Any]) -> None:
        """Add to `run.json`."""
        assert self.folder is not None
        if not self._record:
            self._record = {"project": self.project, "run_name": self.run_name, "starts": _starts(self.folder)}
        self._record |= to_json(more)
        path = self.folder / RECORD_FILE
        unfinished = path.with_suffix(".json.part")
        unfinished.write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Write one line."""
        line = _line({"step": step, "time": round(time.time(), 3), **kwargs}, values)
        # Opened for each line, so that a kill loses nothing that was logged before, and no file is left open.
        with self._run.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(line)) + "\n")

    def finish(self) -> None:
        """Record how the run ended."""
        assert self.folder is not None
        if self._record and self.folder.is_dir():
            last = {**self._record["starts"][-1], "ended": time.time(), "crashed": self.crashed}
            self.store_record({"starts": [*self._record["starts"][:-1], last]})


def _line(own: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What is written: the line's own fields, and the values under names that are still free."""
    line = {**own, **{name: value for name, value in values.items() if name not in own}}
    for name in own:
        if name not in values:
            continue
        if name == "step" and line[name] is None and _is_step(values[name]):
            line[name] = values[name]
            continue
        free = f"logged/{name}"
        while free in line:
            free = f"logged/{free}"
        line[free] = values[name]
    return line


def _is_step(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _starts(folder: Path) -> list[dict[str, Any]]:
    """When the run was started, including earlier starts in the same folder."""
    try:
        earlier = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        earlier = []
    starts = []
    if isinstance(earlier, list):
        starts = [start for start in earlier if isinstance(start, dict)]
    return [*starts[-_MAX_STARTS:], {"began": time.time()}]
