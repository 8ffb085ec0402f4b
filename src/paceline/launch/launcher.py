"""Starting the ranks of a plan through torch elastic's process API, and ending them all together.

The launcher itself hosts the store in which the ranks meet. So the port is taken before any rank starts, two
launches at once cannot pick the same one, and a second attempt finds no address of a dead rank in it.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import uuid
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import SignalException, start_processes
from torch.numa.binding import AffinityMode, NumaOptions

from paceline.errors import PREEMPTED, UsageError, WorkerError, WorldError
from paceline.launch.failures import exit_code, first_failure, report
from paceline.launch.planning import Plan, plan
from paceline.launch.streams import RankStreams, quiet_elastic
from paceline.launch.supervision import Outcome, Signals, Times, supervise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed.elastic.multiprocessing import PContext

    from paceline.config import Resolved
    from paceline.launch.command import Command

__all__ = ["launch"]

_STORE_PATIENCE = timedelta(seconds=20)
_LOG = logging.getLogger(__name__)


def launch(
    resolved: Resolved,
    command: Command,
    *,
    env: Mapping[str, str],
    log_dir: Path | None = None,
    tee: bool = False,
    pipes: Path | None = None,
    shutdown_timeout: float = 5.0,
    grace_period: float = 300.0,
) -> None:
    """Run `command` on every rank of this machine and return when all have ended well.

    SIGINT, SIGTERM, SIGHUP, SIGQUIT and SIGUSR1 are passed on to the ranks; a second one kills them. A run that
    saved its state on a signal ends with exit code 75, and is not started again here.

    Args:
        resolved: The configuration; the ranks get it whole, in PACELINE_CONFIG.
        command: What to run.
        env: The environment that the ranks inherit.
        log_dir: Folder for `rank_0.out`, `rank_0.err` and so on; the console then stays empty.
        tee: Write each rank's lines to the console too, with the rank before them.
        pipes: Folder of pipes into which each rank writes in place of the console; see `notebook_launcher`.
        shutdown_timeout: Seconds from asking ranks to end to killing them.
        grace_period: The same after SIGTERM or SIGUSR1, on which ranks may save their state first.

    Raises:
        WorkerError: A rank failed, or a signal came; its text is the report and it carries the exit code.
        ConfigError: The configuration does not fit this machine. Nothing was started.
        UsageError: There is nothing to run under that name. Nothing was started.
    """
    planned = plan(resolved, command, env)
    config = resolved.config
    numa = NumaOptions(affinity_mode=AffinityMode.NODE) if config.enable_cpu_affinity else None
    if log_dir is not None:
        _make_folder(log_dir)
    run_id = uuid.uuid4().hex[:12]
    for attempt in range(planned.max_restarts + 1):
        with tempfile.TemporaryDirectory(prefix="paceline_") as folder:
            streams = RankStreams(Path(folder), log_dir=log_dir, tee=tee, attempt=attempt, pipes=pipes)
            times = Times(shutdown_timeout, grace_period, config.monitor_interval)
            outcome = _run_once(planned, env, streams, run_id, attempt, numa, times)
        if outcome.signal is not None:
            name, count = signal.Signals(outcome.signal).name, len(planned.ranks)
            ended = "its process has ended" if count == 1 else f"all {count} processes have ended"
            raise WorkerError(f"stopped by {name}; {ended}\n", 128 + outcome.signal)
        if not outcome.failed:
            return
        if outcome.made_room:
            raise WorkerError("made room as asked: the state was saved, start again to go on\n", PREEMPTED)
        text = report(outcome.ends)
        if attempt == planned.max_restarts:
            raise WorkerError(text, exit_code(first_failure(outcome.ends)))
        _LOG.warning("%s\nstarting again (%d of %d)", text, attempt + 1, planned.max_restarts)


def _run_once(
    planned: Plan,
    env: Mapping[str, str],
    streams: RankStreams,
    run_id: str,
    attempt: int,
    numa: NumaOptions | None,
    times: Times,
) -> Outcome:
    """Start every rank, wait for the end of all; no process of theirs is left if one failed."""
    store = _open_store(planned.address, planned.port)
    environments = {
        r.rank: {
            **env,
            **planned.variables,
            **r.variables,
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_RUN_ID": run_id,
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            **streams.variables(r.rank),
        }
        for r in planned.ranks
    }
    with quiet_elastic(), Signals() as signals:
        try:
            context = _start(planned, environments, streams, numa)
        except SignalException as early:
            return Outcome(signal=int(early.sigval))
        signals.catch()
        return supervise(context, streams, signals, times)


def _open_store(address: str, port: int) -> TCPStore:
    try:
        return TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=_STORE_PATIENCE)
    except DistError as error:
        reason = str(error).partition("\n")[0]
        raise WorldError(
            f"The ranks cannot meet at {address}:{port or '(a free port)'} ({reason})",
            "The address is not this machine's, or another program took the port this moment",
            "Leave main_process_ip and main_process_port out: one machine needs neither",
        ) from error


def _make_folder(log_dir: Path) -> None:
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"The logs cannot be written to {str(log_dir)!r}",
            error.strerror or str(error),
            "Give --log_dir a folder that can be made",
        ) from error


def _start(
    planned: Plan,
    environments: dict[int, dict[str, str]],
    streams: RankStreams,
    numa: NumaOptions | None,
) -> PContext:
    # The worker must know whose death it shall not outlive.
    parent = ("--parent", str(os.getpid()))
    return start_processes(
        name="rank",
        entrypoint=planned.ranks[0].command[0],
        args={r.rank: (*r.command[1:3], *parent, *r.command[3:]) for r in planned.ranks},
        envs=environments,
        logs_specs=streams,
        log_line_prefixes={r.rank: f"[rank {r.rank}] " for r in planned.ranks},
        numa_options=numa,
    )
