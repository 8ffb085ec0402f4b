"""The coordinator for several machines: their launchers agree on each attempt, and on what follows from it.

Machine 0's launcher hosts one store. In it the launchers write heartbeats, information about their machines, and how
their ranks exited; the ranks meet in it too. The machines of an attempt are those numbered from 0 (`static`), or those
in torch elastic's dynamic rendezvous (`c10d`), in which machines join and leave.
"""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

from torch._C._distributed_c10d import PrefixStore

from paceline.config.schema.rendezvous import read_rendezvous_options
from paceline.errors import ConfigError, UsageError, WorkerError, WorldError, counted
from paceline.launch.coordination import Attempt
from paceline.launch.decision import Decision, MachineExit, decide
from paceline.launch.network import gloo_variables
from paceline.launch.planning import local_size, plan, plan_machine, rendezvous_endpoint
from paceline.launch.rendezvous.heartbeat import Heartbeat
from paceline.launch.rendezvous.machine_info import MachineInfo, clock_skews, local_machine_info, mismatches
from paceline.launch.rendezvous.membership import ElasticMembership, StaticMembership
from paceline.launch.rendezvous.preflight import connectivity_error
from paceline.launch.rendezvous.store import WaitTimer, expected, open_rendezvous_store
from paceline.launch.rendezvous.store_client import CutOffError, StoreClient

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.config import Resolved
    from paceline.launch.command import Command
    from paceline.launch.planning import LaunchPlan
    from paceline.launch.rendezvous.store import RendezvousStore
    from paceline.launch.supervision import AttemptOutcome

__all__ = ["MultiNodeCoordinator"]

_LOG = logging.getLogger(__name__)
_POLL = 0.1
# How long machine 0 keeps the store open for the others at the end. Seconds.
_CLOSE_TIMEOUT = 10.0
# How long one step of the preflight may take on the slowest machine. Seconds.
_PREFLIGHT_TIMEOUT = 20.0


class MultiNodeCoordinator:
    """Coordinator of one machine in a launch over several."""

    def __init__(
        self, resolved: Resolved, command: Command, env: Mapping[str, str], signals: Sequence[int] = ()
    ) -> None:
        """Host or connect to the store.

        Args:
            resolved: The configuration.
            command: What each rank runs.
            env: The launcher's environment.
            signals: Signals that this process received while no ranks run; one ends the wait.

        Raises:
            WorldError: This machine cannot connect to machine 0, or cannot listen as machine 0.
        """
        self._resolved, self._command, self._env, self._signals = resolved, command, env, signals
        config = self._config = resolved.config
        problem = self._local_problem()
        name, port = rendezvous_endpoint(config, env)
        self._options = read_rendezvous_options(config.rdzv_conf)
        self._store: RendezvousStore = open_rendezvous_store(config, name, port, self._options, self._timer())
        self._client = StoreClient(self._store.connect(), max(self._options.lost_after, 20.0))
        is_detected = not resolved.origin("num_processes").is_explicit
        self._local = local_machine_info(
            config,
            command,
            self._store.address,
            processes=0 if problem else local_size(config, env),
            detected=is_detected,
            problems=[problem] if problem else [],
        )
        self._heartbeat = Heartbeat(self._store.connect(), self._local.token, self._options)
        self._plan: LaunchPlan
        self._has_started_ranks = self._ended = False
        self._machines: tuple[MachineInfo, ...] = ()
        self._index = self._number = self._num_failures = 0
        self._checked: frozenset[str] = frozenset()
        if self._store.is_host:
            self._client.put("host", self._local.to_json())
            self._client.put("run_id", uuid.uuid4().hex[:12])
        self._members: StaticMembership | ElasticMembership = (
            StaticMembership(self._client, self._local)
            if config.rdzv_backend == "static"
            else ElasticMembership(self._client, config, self._options, self._local, self._store.connect())
        )

    def _local_problem(self) -> str:
        """Why this machine cannot start; reported to the others if there is a preflight, else raised."""
        try:
            plan(self._resolved, self._command, self._env)
        except (ConfigError, UsageError) as error:
            if not self._config.preflight or not rendezvous_endpoint(self._config, self._env)[0]:
                raise
            return str(error)
        return ""

    def next(self) -> Attempt:
        """Meet the other machines and assign ranks.

        Raises:
            WorldError: Machines are missing, or do not match.
        """
        try:
            return self._next()
        except CutOffError as error:
            raise WorldError(*self._lost_host(error.saw), "Check the launcher's output on machine 0") from error
        except (WorldError, WorkerError) as error:
            # Under static the others cannot start without this machine; a run that has started goes on without it.
            if self._store.is_host or (self._config.rdzv_backend == "static" and not self._has_started()):
                self._abort(str(error))
            raise

    def _timer(self, limit: float | None = None) -> WaitTimer:
        return WaitTimer(self._options.timeout if limit is None else limit, self._signals)

    def _has_started(self) -> bool:
        try:
            return self._has_started_ranks or self._client.has("started")
        except CutOffError:
            return True

    def _next(self) -> Attempt:
        self._heartbeat.pause()
        timer = self._timer()
        if not self._store.is_host and self._config.preflight and self._config.rdzv_backend == "c10d":
            self._compare((MachineInfo.from_json(self._wait_for("host", timer)), self._local))
        machines: tuple[MachineInfo, ...] = ()
        while not machines:
            self._number, self._index, count = self._members.gather(timer, self._watch_others)
            self._client.put(self._key(f"here/{self._index}"), self._local.to_json())
            machines = self._wait_for_machines(count, timer)
        self._machines = machines
        self._heartbeat.watch(
            [m.token for m in self._machines if m is not self._machines[self._index]],
            self._key("stop"),
            self._members.waiting if self._members.can_grow(len(machines)) else None,
        )
        self._preflight()
        self._num_failures = self._client.add("failures", 0)
        sizes = tuple(machine.processes for machine in self._machines)
        interface = self._store.interface if self._config.same_network else None
        extra = gloo_variables(interface, self._env)
        self._plan = plan_machine(self._resolved, self._command, self._env, self._index, sizes, **extra)
        run_id = self._wait_for("run_id", timer).decode()
        self._has_started_ranks = True
        self._client.put("started", "1")
        return Attempt(self._plan, self._store.port, run_id, self._number, self._heartbeat.remote_request)

    def _wait_for_machines(self, count: int, timer: WaitTimer) -> tuple[MachineInfo, ...]:
        """Wait until every machine of the attempt has reported itself; empty when one is dropped."""
        begin = timer.seconds
        while missing := [i for i in range(count) if not self._client.has(self._key(f"here/{i}"))]:
            timer.report(f"waiting for {_machines(missing)} (of {count})")
            if timer.is_expired:
                raise self._missing_machines(missing, count)
            if timer.seconds - begin > self._members.join_timeout:
                return ()
            self._watch_others()
            time.sleep(_POLL)
        return tuple(MachineInfo.from_json(self._client.get(self._key(f"here/{i}"))) for i in range(count))

    def _missing_machines(self, missing: Sequence[int], count: int) -> WorldError:
        seen, mistake = count - len(missing), self._store.likely_mistake()
        why = f"{_machines(missing)} did not join within {self._options.timeout:.0f} s"
        return WorldError(
            f"{self._local} sees {counted(seen, 'machine')}, expected {expected(self._config)}: "
            f"{why}{f'; {mistake}' if mistake else ''}",
            f"Machines meet at {self._store.name}, port {self._store.port}",
            "Start the same command there, each with its --machine_rank; rdzv_conf timeout=SECONDS waits longer",
        )

    def _preflight(self) -> None:
        """Compare all machines with the first, compare their clocks, and check their connections."""
        tokens = frozenset(machine.token for machine in self._machines)
        if not self._config.preflight or tokens <= self._checked:
            return
        self._compare(self._machines)
        times = self._read_clocks()
        for line in clock_skews(self._machines, times):
            _LOG.warning("paceline: %s; the report may name the wrong rank as the first that failed", line)
        store = PrefixStore(self._key("preflight"), self._store.connect())
        error = connectivity_error(store, self._index, self._machines, self._watch_others)
        self._client.put(self._key(f"connected/{self._index}"), error)
        errors = [text.decode() for text in self._from_all("connected")]
        _require_none([line for line in errors if line], "A firewall blocks them, or they use the wrong interface")
        self._checked = tokens

    def _read_clocks(self) -> list[float]:
        self._client.put(self._key(f"clock/{self._index}"), str(time.time()))
        return [float(text) for text in self._from_all("clock")]

    def _from_all(self, name: str) -> list[bytes]:
        """Return what each machine wrote under a name, in their order."""
        timer = self._timer(_PREFLIGHT_TIMEOUT)
        keys = [(self._key(f"{name}/{index}"), machine.host) for index, machine in enumerate(self._machines)]
        return [self._wait_for(key, timer, host) for key, host in keys]

    def _compare(self, machines: Sequence[MachineInfo]) -> None:
        problems = [f"{machine}: {problem}" for machine in machines for problem in machine.problems]
        _require_none(problems + mismatches(machines), "All machines must run the same script with the same settings")

    def _wait_for(self, key: str, timer: WaitTimer, whom: str = "machine 0") -> bytes:
        while not self._client.has(key):
            timer.report(f"waiting for {whom}")
            if timer.is_expired:
                raise WorldError(
                    f"{self._local} waited {timer.seconds:.0f} s for {whom} ({key.rpartition('/')[0] or key})",
                    "It had joined before",
                    "Check its launcher's output",
                )
            self._watch_others()
            time.sleep(_POLL)
        return self._client.get(key)

    def _watch_others(self) -> None:
        """Raise when another machine aborts, or is lost before the ranks start."""
        if self._heartbeat.cut_off:
            raise CutOffError(self._heartbeat.cut_off)
        if self._client.has("over"):
            raise _AbortedError(self._client.get("over").decode())
        for token, why in self._heartbeat.lost.items():
            raise WorldError(f"{self._name_of(token)} is lost before its ranks start: {why}")

    def _name_of(self, token: str) -> str:
        return next((str(machine) for machine in self._machines if machine.token == token), "a machine")

    def conclude(self, outcome: AttemptOutcome) -> Decision:
        """Report how this machine's ranks exited, collect the others' reports, and return the common decision."""
        local = MachineExit.of(outcome, self._local.host, self._plan)
        try:
            return self._conclude(outcome, local)
        except CutOffError as error:
            saw, why = self._lost_host(error.saw)
            lost = MachineExit(self._host_name(), self._machines[0].processes, lost=f"{saw}; {why}")
            return decide([local, lost], may_restart=False)

    def _conclude(self, outcome: AttemptOutcome, local: MachineExit) -> Decision:
        if (outcome.failed and not outcome.preempted) or outcome.signal is not None:
            self._stop_all()
        self._client.put(self._key(f"end/{self._index}"), local.to_json())
        try:
            ends = self._collect()
        except WorkerError:  # a signal came after the ranks here had exited: stop the other machines too
            self._stop_all()
            local = replace(local, signal=self._signals[0])
            self._client.put(self._key(f"end/{self._index}"), local.to_json())
            self._signals = ()
            ends = self._collect()
        lost = [end for end in ends if end.lost]
        left = len(ends) - len(lost)
        may_restart = self._num_failures < self._config.max_restarts and self._members.can_restart(left, len(ends))
        decision = decide(ends, may_restart=may_restart, regroup=self._regroups())
        decision = Decision.from_json(self._client.claim(self._key("verdict"), decision.to_json()))
        if decision.kind == "restart" and self._client.add(self._key("counted"), 1) == 1:
            self._client.add("failures", 1)
        self._ended = decision.kind in ("done", "end")
        if self._ended:
            self._wait_for_readers(left)
        return decision

    def _stop_all(self) -> None:
        self._client.claim(self._key("stop"), self._local.host)

    def _regroups(self) -> bool:
        if self._heartbeat.regroup:
            self._client.claim(self._key("regroup"), self._local.host)
        return self._client.has(self._key("regroup"))

    def _collect(self) -> list[MachineExit]:
        """Wait until each machine has reported how its ranks exited, or is lost."""
        if self._heartbeat.regroup:
            self._client.claim(self._key("regroup"), self._local.host)
        timer = WaitTimer(float("inf"), self._signals)
        ends: dict[int, MachineExit] = {}
        while len(ends) < len(self._machines):
            if self._heartbeat.cut_off:
                raise CutOffError(self._heartbeat.cut_off)
            lost = self._heartbeat.lost
            for index, machine in enumerate(self._machines):
                key = self._key(f"end/{index}")
                if index not in ends and self._client.has(key):
                    ends[index] = MachineExit.from_json(self._client.get(key))
                elif index not in ends and machine.token in lost:
                    ends[index] = MachineExit(machine.host, machine.processes, lost=lost[machine.token])
                    self._stop_all()
            missing = [str(m) for i, m in enumerate(self._machines) if i not in ends]
            timer.report(f"the ranks here have exited; waiting for {', '.join(missing)}")
            time.sleep(_POLL)
        return [ends[index] for index in range(len(self._machines))]

    def _wait_for_readers(self, left: int) -> None:
        """On machine 0, wait until the others have read the decision: the store closes with its process."""
        count = self._client.add(self._key("bye"), 1)
        timer = WaitTimer(_CLOSE_TIMEOUT)
        while self._store.is_host and count < left and not timer.is_expired:
            time.sleep(_POLL)
            count = self._client.add(self._key("bye"), 0)

    def _abort(self, message: str) -> None:
        """Tell the others that this machine aborts, and stay until they can have read it."""
        try:
            first = self._client.claim("over", message).decode()
        except CutOffError:
            return
        if self._store.is_host and (first == message or self._config.rdzv_backend == "static"):
            time.sleep(min(2.0, _CLOSE_TIMEOUT))

    def _lost_host(self, why: str) -> tuple[str, str]:
        return f"{self._local} lost the connection to machine 0 ({self._host_name()})", why

    def _host_name(self) -> str:
        return self._store.name if not self._machines or self._store.is_host else str(self._machines[0])

    def _key(self, name: str) -> str:
        return f"round/{self._number}/{name}"

    def close(self) -> None:
        """Stop the heartbeat and disconnect."""
        self._members.close(ended=self._ended)
        self._heartbeat.close()
        self._client.close()


class _AbortedError(WorldError):
    """Another machine aborted the launch; carries its message."""


def _require_none(problems: Sequence[str], why: str) -> None:
    if problems:
        lines = "".join(f"\n  {problem.strip()}" for problem in problems)
        raise WorldError(
            f"The machines do not match:{lines}\n", why, "Nothing was started; --preflight false skips this"
        )


def _machines(numbers: Sequence[int]) -> str:
    shown = [str(number) for number in numbers]
    if len(shown) == 1:
        return f"machine {shown[0]}"
    return f"machines {', '.join(shown[:-1])} and {shown[-1]}"
