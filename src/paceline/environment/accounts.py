"""What a rank leaves for whoever started it: an account of its end, in the file that torch elastic names for it.

The launcher's worker writes one when the script fails, without importing anything. This is for what only the rest of
the library knows: an end that no exception tells of, and remarks that belong to a failure.
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

__all__ = ["Accounts", "stacks_folder"]


def stacks_folder(run_id: str, attempt: int) -> Path:
    """Where ranks of one start write their stacks when they have waited for each other too long."""
    return Path(tempfile.gettempdir()) / f"paceline-hang-{run_id.replace(os.sep, '_')}-{attempt}"


@dataclass(frozen=True, slots=True)
class Accounts:
    """Where accounts go.

    Attributes:
        path: The file; None when nobody reads one.
        told: Whether whoever started this process prints what is in it.
    """

    path: Path | None = None
    told: bool = False

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Accounts:
        """Read the launcher's variables."""
        path = env.get("TORCHELASTIC_ERROR_FILE")
        return cls(Path(path) if path else None, bool(path) and "PACELINE_CONFIG" in env)

    def leave(self, kind: str, headline: str, text: str, *, rank: int, code: int, secondary: bool) -> None:
        """Write an account of an end without an exception.

        Args:
            kind: Such as "hang".
            headline: One line.
            text: All there is to say.
            rank: Whose.
            code: The exit code that goes with it.
            secondary: Another rank tells the same.
        """
        now = time.time()
        account = {
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
        self._write({"message": {"message": headline, "extraInfo": extra}, "paceline": account})
        if not secondary:
            self.tell(text)

    def remark(self, text: str) -> None:
        """Put a remark beside the failure that this process has left an account of, over one that is there."""
        data: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            data = json.loads(self.path.read_text(encoding="utf-8"))
        if "paceline" in data:
            data["paceline"]["remark"] = text
            self._write(data)

    def tell(self, text: str) -> None:
        """Print what nobody would read in the account."""
        if not self.told:
            print(f"\n{text}", file=sys.stderr, flush=True)

    def _write(self, data: Mapping[str, Any]) -> None:
        if self.path is not None:
            unfinished = Path(f"{self.path}.part")
            unfinished.write_text(json.dumps(data), encoding="utf-8")
            unfinished.rename(self.path)
