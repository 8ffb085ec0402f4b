"""The output of ranks, shown where this program shows its own: in a notebook that is the cell."""

from __future__ import annotations

import codecs
import os
import selectors
import string
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import TextIO

    from typing_extensions import Self

__all__ = ["RankPipes", "is_stdout_redirected"]

_CHUNK = 65536
_LAST_WORDS = 10.0
"""Seconds to wait, when all ranks have ended, for what something that they left behind still writes."""


def is_stdout_redirected() -> bool:
    """Whether `sys.stdout` is not the console that a child process would inherit."""
    try:
        return sys.stdout.fileno() != 1
    except (AttributeError, OSError, ValueError):
        return True


class _Stream:
    """One pipe: its two ends here, and where its text goes."""

    def __init__(self, path: Path, target: TextIO, prefix: str) -> None:
        os.mkfifo(path)
        self.reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        # While this is open the pipe outlives ranks that are started again.
        self.writer = os.open(path, os.O_WRONLY)
        self._target = target
        self._prefix = prefix
        self._at_line_start = True
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def forward(self) -> bool:
        """Show what has come; false at the end."""
        try:
            data = os.read(self.reader, _CHUNK)
        except BlockingIOError:
            return True
        text = self._decoder.decode(data, final=not data)
        if self._prefix:
            text = "".join(map(self._marked, text.splitlines(keepends=True)))
        if text:
            self._target.write(text)
            self._target.flush()
        return bool(data)

    def _marked(self, line: str) -> str:
        marked = f"{self._prefix}{line}" if self._at_line_start else line
        self._at_line_start = line.endswith(("\n", "\r"))
        return marked


class RankPipes:
    """A folder of pipes, two for each rank, and a thread that forwards what comes out of them.

    Args:
        folder: Is to hold the pipes.
        ranks: Of this machine.
        template: What to put before each line: `$rank`, `$local_rank` and `$role_name` are filled in; None: nothing.
        first: The number among all of the first of them.
    """

    def __init__(self, folder: Path, ranks: int, template: str | None = None, *, first: int = 0) -> None:
        self.folder = folder
        self._selector = selectors.DefaultSelector()
        self._streams = []
        for rank in range(ranks):
            names = {"rank": str(first + rank), "local_rank": str(rank), "role_name": "default"}
            prefix = string.Template(template or "").safe_substitute(names)
            for kind, target in (("out", sys.stdout), ("err", sys.stderr)):
                self._streams.append(_Stream(folder / f"rank_{rank}.{kind}", target, prefix))
        for stream in self._streams:
            self._selector.register(stream.reader, selectors.EVENT_READ, stream)
        self._thread = threading.Thread(target=self._forward, name="paceline output of ranks", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams:
            os.close(stream.writer)
        self._thread.join(_LAST_WORDS)
        if not self._thread.is_alive():
            self._selector.close()

    def _forward(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                if not key.data.forward():
                    self._selector.unregister(key.fd)
                    os.close(key.fd)
