"""Where the ranks' output and their accounts of failure go, told to torch elastic in its own terms."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RankLogs", "silence_elastic_logs"]

_ELASTIC = "torch.distributed.elastic"
_SILENT = logging.CRITICAL + 1


class RankLogs(LogsSpecs):
    """`rank_0.out` and `rank_0.err` of each rank in one folder, or the console; accounts in another.

    torch elastic numbers the ranks of this machine from 0; in the names of files stands their number among all.

    Args:
        folder: For the accounts.
        log_dir: For the output; None leaves it on the console.
        tee: Show the lines on the console as well.
        attempt: How often the ranks were started before.
        requeued: How often Slurm started the whole job before; the files of those starts are kept.
        first: The number among all of this machine's first rank.
        pipes: A folder that holds a pipe of those names for each stream, which somebody reads.
    """

    def __init__(
        self,
        folder: Path,
        *,
        log_dir: Path | None,
        tee: bool,
        attempt: int = 0,
        requeued: int = 0,
        first: int = 0,
        pipes: Path | None = None,
    ) -> None:
        super().__init__(log_dir=str(log_dir or folder))
        self._folder = folder
        self._first = first
        self._pipes = pipes
        self._to_files = log_dir is not None or tee or pipes is not None
        self._tee_to_console = tee
        self._suffix = (f".requeue_{requeued}" if requeued else "") + (f".attempt_{attempt}" if attempt else "")
        self._logs = log_dir or folder

    @property
    def root_log_dir(self) -> str:
        """The folder that holds the logs."""
        return str(self._logs)

    def error_file(self, rank: int) -> Path:
        """Return the file in which a rank leaves its account of a failure."""
        return self._folder / f"rank_{self._first + rank}.json"

    def fault_file(self, rank: int) -> Path:
        """Return the file in which Python notes where it was when a signal ended it."""
        return Path(f"{self.error_file(rank)}.fault")

    def log(self, rank: int) -> str:
        """Return the file that alone holds the rank's error output; empty when the console shows it."""
        hidden = self._to_files and self._pipes is None and not self._tee_to_console
        return self._stream(rank, "err") if hidden else ""

    def variables(self, rank: int) -> dict[str, str]:
        """Return the variables that go with this: into files, python's output would come late, or never."""
        unbuffered = {"PYTHONUNBUFFERED": "1"} if self._to_files else {}
        return {"TORCHELASTIC_ERROR_FILE": str(self.error_file(rank)), **unbuffered}

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Say for each rank which files it writes; called by torch elastic."""
        out = {rank: self._stream(rank, "out") if self._to_files else "" for rank in envs}
        err = {rank: self._stream(rank, "err") if self._to_files else "" for rank in envs}
        return LogsDest(
            stdouts=out,
            stderrs=err,
            tee_stdouts=out if self._tee_to_console else {},
            tee_stderrs=err if self._tee_to_console else {},
            error_files={rank: str(self.error_file(rank)) for rank in envs},
        )

    def _stream(self, rank: int, kind: str) -> str:
        if self._pipes is not None:
            return str(self._pipes / f"rank_{rank}.{kind}")
        return str(self._logs / f"rank_{self._first + rank}{self._suffix}.{kind}")


@contextlib.contextmanager
def silence_elastic_logs() -> Iterator[None]:
    """Keep torch elastic's own remarks about failing processes off the console: ours says it once."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith(_ELASTIC)]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(_SILENT)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
