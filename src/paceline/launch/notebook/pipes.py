"""Forwarding of the ranks' output to `sys.stdout` and `sys.stderr` of this program: in a notebook, to the cell."""

from __future__ import annotations

import codecs
import logging
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

_LOG = logging.getLogger(__name__)
_CHUNK = 65536
_DRAIN_TIMEOUT = 10.0
"""Seconds to wait, once all ranks have exited, for output of processes that they left behind."""


def is_stdout_redirected() -> bool:
    """Whether `sys.stdout` is not the console that a child process would inherit."""
    try:
        return sys.stdout.fileno() != 1
    except (AttributeError, OSError, ValueError):
        return True


class _Stream:
    """One pipe: both its ends, and the stream to which its text goes."""

    def __init__(self, path: Path, target: TextIO, prefix: str) -> None:
        os.mkfifo(path)
        self.reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        # While this is open the pipe survives a restart of the ranks.
        self.writer = os.open(path, os.O_WRONLY)
        self._target = target
        self._prefix = prefix
        self._at_line_start = True
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.num_lost = 0
        """Characters that the target did not take."""
        self.first_failure: Exception | None = None

    def forward(self) -> bool:
        """Forward what has arrived, or drop it where the target fails; False at the end.

        A rank blocks once its pipe is full, so the pipe is read to its end whatever becomes of the text.
        """
        try:
            data = os.read(self.reader, _CHUNK)
        except BlockingIOError:
            return True
        text = self._decoder.decode(data, final=not data)
        if self._prefix:
            text = "".join(map(self._with_prefix, text.splitlines(keepends=True)))
        if text:
            self._write(text)
        return bool(data)

    def _write(self, text: str) -> None:
        try:
            self._target.write(self._writable(text))
            self._target.flush()
        except Exception as error:  # a cell's stream is any object: its kernel may be gone, or the stream closed
            self.num_lost += len(text)
            self.first_failure = self.first_failure or error

    def _writable(self, text: str) -> str:
        """The text with escapes for characters that the target's encoding does not have."""
        encoding = getattr(self._target, "encoding", None)
        if not isinstance(encoding, str):
            return text
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _with_prefix(self, line: str) -> str:
        prefixed = f"{self._prefix}{line}" if self._at_line_start else line
        self._at_line_start = line.endswith(("\n", "\r"))
        return prefixed


class RankPipes:
    """A folder of pipes, two for each rank, and a thread that forwards their contents.

    Args:
        folder: Where to create the pipes.
        ranks: Number of ranks of this machine.
        template: Prefix of each line, with `$rank`, `$local_rank` and `$role_name` substituted; None adds none.
        first: The global rank of local rank 0.
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
        self._thread.join(_DRAIN_TIMEOUT)
        if not self._thread.is_alive():
            self._selector.close()
        self._report_lost()

    def _report_lost(self) -> None:
        lost = sum(stream.num_lost for stream in self._streams)
        if lost:
            failure = next(stream.first_failure for stream in self._streams if stream.first_failure is not None)
            _LOG.warning(
                "%d characters that ranks printed are lost: the output of this program failed (%s: %s). They ran on.",
                lost,
                type(failure).__name__,
                failure,
            )

    def _forward(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                if not key.data.forward():
                    self._selector.unregister(key.fd)
                    os.close(key.fd)
