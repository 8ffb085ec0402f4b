"""Where the ranks' output and error files go, as a `LogsSpecs` of torch elastic."""

from __future__ import annotations

import contextlib
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from paceline.environment.error_file import stacks_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.launch.failures import RankExit

__all__ = ["RankLogs", "move_stacks", "silence_elastic_logs"]

_ELASTIC = "torch.distributed.elastic"
_SILENT = logging.CRITICAL + 1


class RankLogs(LogsSpecs):
    """`rank_0.out` and `rank_0.err` of each rank in one folder, or the console; error files in another.

    torch elastic passes local ranks; the names of files contain global ranks.

    Args:
        folder: Folder of the error files.
        log_dir: Folder of the output; None leaves it on the console.
        tee: Whether to show the output on the console as well.
        attempt: How often the ranks were started before.
        requeued: How often Slurm started the whole job before; the files of those starts are kept.
        first: The global rank of this machine's local rank 0.
        pipes: A folder with a named pipe for each stream, which somebody reads.
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
        """The folder of the logs."""
        return str(self._logs)

    def error_file(self, rank: int) -> Path:
        """Return the file in which a rank records its failure."""
        return self._folder / f"rank_{self._first + rank}.json"

    def fault_file(self, rank: int) -> Path:
        """Return the file into which faulthandler dumps a rank's stack at a fatal signal."""
        return Path(f"{self.error_file(rank)}.fault")

    def log(self, rank: int) -> str:
        """Return the file with the rank's stderr; empty when the console shows it as well."""
        is_hidden = self._to_files and self._pipes is None and not self._tee_to_console
        return self._stream(rank, "err") if is_hidden else ""

    def variables(self, rank: int) -> dict[str, str]:
        """Return the variables to set for a rank; into files, Python would write late, or never."""
        unbuffered = {"PYTHONUNBUFFERED": "1"} if self._to_files else {}
        return {"TORCHELASTIC_ERROR_FILE": str(self.error_file(rank)), **unbuffered}

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return the files that each rank writes; called by torch elastic."""
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


def move_stacks(ends: tuple[RankExit, ...], run_id: str, attempt: int, log_dir: Path) -> tuple[RankExit, ...]:
    """Move the stacks that hanging ranks dumped to their logs, and return the exits with the new path in the report.

    Args:
        ends: The exits of the ranks.
        run_id: ID of the launch.
        attempt: How often the ranks were started before.
        log_dir: Folder of the logs.
    """
    dumped = stacks_folder(run_id, attempt)
    target = log_dir.absolute() / dumped.name
    if not dumped.is_dir():
        return ends
    try:
        shutil.move(dumped, target)
    except OSError:  # they stay where they are
        return ends
    return tuple(_with_new_path(end, str(dumped), str(target)) for end in ends)


def _with_new_path(end: RankExit, old: str, new: str) -> RankExit:
    record = end.record
    if record is None:
        return end
    return replace(end, record=replace(record, traceback=record.traceback.replace(old, new)))


@contextlib.contextmanager
def silence_elastic_logs() -> Iterator[None]:
    """Silence torch elastic's own log messages about failing processes: our report replaces them."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith(_ELASTIC)]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(_SILENT)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
