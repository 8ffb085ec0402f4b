"""The error file in which a failing rank reports itself to the launcher, in torch elastic's format with our fields.

The launcher's worker writes it when the script raises, without importing anything. This module adds what only the rest
of the library knows: an end without an exception (a hang), and remarks on a failure.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ErrorFile", "stacks_folder"]


def stacks_folder(run_id: str, attempt: int) -> Path:
    """Return the folder into which the ranks of one attempt dump their stacks when they hang."""
    return Path(tempfile.gettempdir()) / f"paceline-hang-{run_id.replace(os.sep, '_')}-{attempt}"


@dataclass(frozen=True, slots=True)
class ErrorFile:
    """The error file of this rank.

    Attributes:
        path: Where to write; None when no launcher reads it.
        is_reported: Whether the launcher prints what the file contains.
    """

    path: Path | None = None
    is_reported: bool = False

    @classmethod
    def read(cls, env: Mapping[str, str]) -> ErrorFile:
        """Find the file by the launcher's variables."""
        path = env.get("TORCHELASTIC_ERROR_FILE")
        return cls(Path(path) if path else None, bool(path) and "PACELINE_CONFIG" in env)

    def write(self, kind: str, headline: str, text: str, *, rank: int, code: int, secondary: bool) -> None:
        """Record a failure that no exception describes.

        Args:
            kind: Such as "hang".
            headline: One line.
            text: The whole report.
            rank: The rank that failed.
            code: The process's exit code.
            secondary: Whether another rank reports the same failure.
        """
        now = time.time()
        record = {
            "kind": kind,
            "rank": rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": now,
            "code": code,
            "where": "",
            "headline": headline,
            "traceback": text,
            "secondary": secondary,
        }
        extra = {"py_callstack": text, "timestamp": str(int(now))}
        self._write({"message": {"message": headline, "extraInfo": extra}, "paceline": record})
        if not secondary:
            self.print_unless_reported(text)

    def add_remark(self, text: str) -> None:
        """Add a remark to the failure recorded in the file, in place of an earlier remark; no-op without a failure."""
        data: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            data = json.loads(self.path.read_text(encoding="utf-8"))
        if "paceline" in data:
            data["paceline"]["remark"] = text
            self._write(data)

    def print_unless_reported(self, text: str) -> None:
        """Print to stderr what no launcher would report."""
        if not self.is_reported:
            print(f"\n{text}", file=sys.stderr, flush=True)

    def _write(self, data: Mapping[str, Any]) -> None:
        if self.path is not None:
            unfinished = Path(f"{self.path}.part")
            unfinished.write_text(json.dumps(data), encoding="utf-8")
            unfinished.rename(self.path)
