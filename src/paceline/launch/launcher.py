"""Starting the ranks of a plan through torch elastic's process API, and ending them all together.

The launcher itself hosts the store in which the ranks meet. So the port is taken before any rank starts, two
launches at once cannot pick the same one, and a second attempt finds no address of a dead rank in it.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.elastic.multiprocessing import SignalException, start_processes
from torch.numa.binding import AffinityMode, NumaOptions

from paceline.errors import UsageError, WorkerError
from paceline.launch.coordination import Attempt, Coordinator, SingleNodeCoordinator
from paceline.launch.rank_logs import RankLogs, silence_elastic_logs
from paceline.launch.rendezvous.multi_node import MultiNodeCoordinator
from paceline.launch.stacks import keep_stacks
from paceline.launch.supervision import AttemptOutcome, Signals, Timeouts, supervise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed.elastic.multiprocessing import PContext

    from paceline.config import Resolved
    from paceline.launch.command import Command
    from paceline.launch.decision import Decision
    from paceline.launch.planning import LaunchPlan

__all__ = ["launch"]

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
    config = resolved.config
    numa = NumaOptions(affinity_mode=AffinityMode.NODE) if config.enable_cpu_affinity else None
    times = Timeouts(shutdown_timeout, grace_period, config.monitor_interval)
    rounds: Coordinator
    with silence_elastic_logs(), Signals() as signals:
        if config.max_machines > 1:
            signals.catch()
            rounds = MultiNodeCoordinator(resolved, command, env, signals.received)
        else:
            rounds = SingleNodeCoordinator(resolved, command, env)
        try:
            if log_dir is not None:
                _make_folder(log_dir)
            failures = 0
            while True:
                current = rounds.next()
                with tempfile.TemporaryDirectory(prefix="paceline_") as folder:
                    streams = RankLogs(
                        Path(folder),
                        log_dir=log_dir,
                        tee=tee,
                        attempt=current.number,
                        requeued=int(env.get("SLURM_RESTART_COUNT") or 0),
                        first=current.plan.first,
                        pipes=pipes,
                    )
                    outcome = _run_once(current, env, streams, numa, times)
                if log_dir is not None:
                    outcome = keep_stacks(outcome, current.run_id, current.number, log_dir)
                verdict = rounds.conclude(outcome)
                if verdict.kind == "done":
                    return
                if verdict.kind == "end":
                    raise WorkerError(verdict.text, verdict.code)
                failures += verdict.kind == "again"
                _tell(verdict, failures, config.max_restarts)
        finally:
            rounds.close()


def _tell(verdict: Decision, failures: int, allowed: int) -> None:
    if verdict.kind == "again":
        _LOG.warning("%s\nstarting again (%d of %d)", verdict.text, failures, allowed)
    else:
        _LOG.warning("paceline: another machine takes part; starting again with it")


def _run_once(
    current: Attempt, env: Mapping[str, str], streams: RankLogs, numa: NumaOptions | None, times: Timeouts
) -> AttemptOutcome:
    """Start every rank, wait for the end of all; no process of theirs is left if one failed."""
    planned = current.plan
    environments = {
        local: {
            **env,
            **planned.variables,
            **r.variables,
            "MASTER_PORT": str(current.port),
            "TORCHELASTIC_RUN_ID": current.run_id,
            "TORCHELASTIC_RESTART_COUNT": str(current.number),
            **streams.variables(local),
        }
        for local, r in enumerate(planned.ranks)
    }
    with Signals() as signals:
        try:
            context = _start(planned, environments, streams, numa)
        except SignalException as early:
            return AttemptOutcome(signal=int(early.sigval))
        signals.catch()
        return supervise(context, streams, signals, times, current.remote_request)


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
    planned: LaunchPlan,
    environments: dict[int, dict[str, str]],
    streams: RankLogs,
    numa: NumaOptions | None,
) -> PContext:
    # The worker must know whose death it shall not outlive.
    parent = ("--parent", str(os.getpid()))
    return start_processes(
        name="rank",
        entrypoint=planned.ranks[0].command[0],
        args={i: (*r.command[1:3], *parent, *r.command[3:]) for i, r in enumerate(planned.ranks)},
        envs=environments,
        logs_specs=streams,
        log_line_prefixes={i: f"[rank {r.rank}] " for i, r in enumerate(planned.ranks)},
        numa_options=numa,
    )
