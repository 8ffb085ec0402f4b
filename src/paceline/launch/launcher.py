"""The launcher: starts the ranks of a plan through torch elastic's process API, and restarts or stops them all at once.

The launcher hosts the store in which the ranks meet. So the port is taken before any rank starts, two launches at once
cannot pick the same one, and a restarted rank finds no address of a dead one in it.
"""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.elastic.multiprocessing import SignalException, start_processes
from torch.numa.binding import AffinityMode, NumaOptions

from paceline.errors import UsageError, WorkerError
from paceline.launch.coordination import Attempt, Coordinator, SingleNodeCoordinator
from paceline.launch.rank_logs import RankLogs, move_stacks, silence_elastic_logs
from paceline.launch.rendezvous.multi_node import MultiNodeCoordinator
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
    """Run `command` on every rank of this machine and return when all have exited with code 0.

    SIGINT, SIGTERM, SIGHUP, SIGQUIT and SIGUSR1 are forwarded to the ranks; a second signal kills them. A run that
    saved its state on a signal exits with code 75, and is not restarted here.

    Args:
        resolved: The configuration; the ranks get all of it in PACELINE_CONFIG.
        command: What each rank runs.
        env: The environment that the ranks inherit.
        log_dir: Folder for `rank_0.out`, `rank_0.err` and so on; the console then stays empty.
        tee: Show the ranks' output on the console too, each line with its rank.
        pipes: Folder of named pipes into which each rank writes instead of the console; see `notebook_launcher`.
        shutdown_timeout: Seconds from signalling the ranks to killing them.
        grace_period: The same after SIGTERM or SIGUSR1, on which ranks may save their state first.

    Raises:
        WorkerError: A rank failed, or a signal came; its text is the report and it carries the exit code.
        ConfigError: The configuration does not fit this machine. Nothing was started.
        UsageError: The script, module or program does not exist. Nothing was started.
    """
    config = resolved.config
    numa = NumaOptions(affinity_mode=AffinityMode.NODE) if config.enable_cpu_affinity else None
    timeouts = Timeouts(shutdown_timeout, grace_period, config.monitor_interval)
    with silence_elastic_logs(), Signals() as signals:
        coordinator = _coordinator(resolved, command, env, signals)
        try:
            if log_dir is not None:
                _make_folder(log_dir)
            failures = 0
            while True:
                attempt = coordinator.next()
                with tempfile.TemporaryDirectory(prefix="paceline_") as folder:
                    logs = RankLogs(
                        Path(folder),
                        log_dir=log_dir,
                        tee=tee,
                        attempt=attempt.number,
                        requeued=int(env.get("SLURM_RESTART_COUNT") or 0),
                        first=attempt.plan.first,
                        pipes=pipes,
                    )
                    outcome = _run_attempt(attempt, env, logs, numa, timeouts)
                if log_dir is not None:
                    ends = move_stacks(outcome.ends, attempt.run_id, attempt.number, log_dir)
                    outcome = replace(outcome, ends=ends)
                decision = coordinator.conclude(outcome)
                if decision.kind == "done":
                    return
                if decision.kind == "end":
                    raise WorkerError(decision.text, decision.code)
                failures += decision.kind == "restart"
                _announce(decision, failures, config.max_restarts)
        finally:
            coordinator.close()


def _coordinator(resolved: Resolved, command: Command, env: Mapping[str, str], signals: Signals) -> Coordinator:
    if resolved.config.max_machines > 1:
        signals.catch()
        return MultiNodeCoordinator(resolved, command, env, signals.received)
    return SingleNodeCoordinator(resolved, command, env)


def _announce(decision: Decision, failures: int, max_restarts: int) -> None:
    if decision.kind == "restart":
        _LOG.warning("%s\nrestarting (%d of %d)", decision.text, failures, max_restarts)
    else:
        _LOG.warning("paceline: another machine joins; restarting with it")


def _run_attempt(
    attempt: Attempt, env: Mapping[str, str], logs: RankLogs, numa: NumaOptions | None, timeouts: Timeouts
) -> AttemptOutcome:
    """Start every rank and wait until all have exited; if one failed, no process of theirs is left."""
    planned = attempt.plan
    environments = {
        local: {
            **env,
            **planned.variables,
            **r.variables,
            "MASTER_PORT": str(attempt.port),
            "TORCHELASTIC_RUN_ID": attempt.run_id,
            "TORCHELASTIC_RESTART_COUNT": str(attempt.number),
            **logs.variables(local),
        }
        for local, r in enumerate(planned.ranks)
    }
    with Signals() as signals:
        try:
            context = _start(planned, environments, logs, numa)
        except SignalException as early:
            return AttemptOutcome(signal=int(early.sigval))
        signals.catch()
        return supervise(context, logs, signals, timeouts, attempt.remote_request)


def _make_folder(log_dir: Path) -> None:
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"The log folder {str(log_dir)!r} cannot be created",
            error.strerror or str(error),
            "Give --log_dir a folder that you can write to",
        ) from error


def _start(
    planned: LaunchPlan, environments: dict[int, dict[str, str]], logs: RankLogs, numa: NumaOptions | None
) -> PContext:
    # A worker dies with this process.
    parent = ("--parent", str(os.getpid()))
    return start_processes(
        name="rank",
        entrypoint=planned.ranks[0].command[0],
        args={i: (*r.command[1:3], *parent, *r.command[3:]) for i, r in enumerate(planned.ranks)},
        envs=environments,
        logs_specs=logs,
        log_line_prefixes={i: f"[rank {r.rank}] " for i, r in enumerate(planned.ranks)},
        numa_options=numa,
    )
