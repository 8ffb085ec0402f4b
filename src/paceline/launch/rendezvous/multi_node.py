"""Several machines: their launchers agree on each round, and on what follows from it.

Machine 0's launcher hosts one store. In it the launchers give signs of life, tell about themselves, and write how
their ranks ended; the ranks meet in it too. Who takes part in a round is the machine's number (`static`), or what
torch elastic's dynamic rendezvous says (`c10d`), in which machines come and go.
"""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

from torch._C._distributed_c10d import PrefixStore

from paceline.config.schema.rendezvous import read_rendezvous_options
from paceline.errors import ConfigError, UsageError, WorkerError, WorldError
from paceline.launch.coordination import Attempt
from paceline.launch.decision import Decision, MachineExit, decide
from paceline.launch.network import gloo_variables
from paceline.launch.planning import local_size, place, plan, rendezvous_endpoint
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
# How long the last word of machine 0 stays readable for the others. Seconds.
_FAREWELL = 10.0
# How long one step of the preflight may take on the slowest machine. Seconds.
_PATIENCE = 20.0


class MultiNodeCoordinator:
    """This machine's part in a launch over several."""

    def __init__(
        self, resolved: Resolved, command: Command, env: Mapping[str, str], signals: Sequence[int] = ()
    ) -> None:
        """Come to the place where the machines meet.

        Args:
            resolved: The configuration.
            command: What each rank runs.
            env: The launcher's environment.
            signals: Those that came to this process while no ranks run; one ends the waiting.

        Raises:
            WorldError: This machine does not find machine 0, or cannot listen as machine 0.
        """
        self._resolved, self._command, self._env, self._signals = resolved, command, env, signals
        config = self._config = resolved.config
        problem = self._own_problem()
        name, port = rendezvous_endpoint(config, env)
        self._options = read_rendezvous_options(config.rdzv_conf)
        self._place: RendezvousStore = open_rendezvous_store(config, name, port, self._options, self._clock())
        self._client = StoreClient(self._place.connect(), max(self._options.lost_after, 20.0))
        counted = not resolved.origin("num_processes").is_explicit
        self._facts = local_machine_info(
            config,
            command,
            self._place.address,
            processes=0 if problem else local_size(config, env),
            counted=counted,
            problems=[problem] if problem else [],
        )
        self._heartbeat = Heartbeat(self._place.connect(), self._facts.token, self._options)
        self._plan: LaunchPlan
        self._started = self._ended = False
        self._machines: tuple[MachineInfo, ...] = ()
        self._index = self._number = self._used = 0
        self._alike: frozenset[str] = frozenset()
        if self._place.listens:
            self._client.put("host", self._facts.to_json())
            self._client.put("run_id", uuid.uuid4().hex[:12])
        self._members: StaticMembership | ElasticMembership = (
            StaticMembership(self._client, self._facts, self._place)
            if config.rdzv_backend == "static"
            else ElasticMembership(self._client, config, self._options, self._facts, self._place.connect())
        )

    def _own_problem(self) -> str:
        """What keeps this machine from taking part; the others are told, unless they were not to be asked."""
        try:
            plan(self._resolved, self._command, self._env)
        except (ConfigError, UsageError) as error:
            if not self._config.preflight or not rendezvous_endpoint(self._config, self._env)[0]:
                raise
            return str(error)
        return ""

    def next(self) -> Attempt:
        """Meet the other machines and agree on who has which ranks.

        Raises:
            WorldError: They do not come, or they do not fit together.
        """
        try:
            return self._next()
        except CutOffError as error:
            raise WorldError(*self._lost_host(error.saw), "Look at what machine 0 said") from error
        except (WorldError, WorkerError) as error:
            # Without this machine no others can start under static; a run that has started is not this one's to end.
            if self._place.listens or (self._config.rdzv_backend == "static" and not self._has_started()):
                self._give_up(str(error))
            raise

    def _clock(self, limit: float | None = None) -> WaitTimer:
        return WaitTimer(self._options.timeout if limit is None else limit, self._signals)

    def _has_started(self) -> bool:
        try:
            return self._started or self._client.has("started")
        except CutOffError:
            return True

    def _next(self) -> Attempt:
        self._heartbeat.rest()
        clock = self._clock()
        if not self._place.listens and self._config.preflight and self._config.rdzv_backend == "c10d":
            self._compare((MachineInfo.from_json(self._wait_for("host", clock)), self._facts))
        machines: tuple[MachineInfo, ...] = ()
        while not machines:
            self._number, self._index, count = self._members.gather(clock, self._watch_others)
            self._client.put(self._key(f"here/{self._index}"), self._facts.to_json())
            machines = self._roll_call(count, clock)
        self._machines = machines
        self._heartbeat.watch(
            [m.token for m in self._machines if m is not self._machines[self._index]],
            self._key("stop"),
            self._members.waiting if self._members.can_grow(len(machines)) else None,
        )
        self._preflight()
        self._used = self._client.add("failures", 0)
        sizes = tuple(machine.processes for machine in self._machines)
        interface = self._place.interface if self._config.same_network else None
        extra = gloo_variables(interface, self._env)
        self._plan = place(self._resolved, self._command, self._env, self._index, sizes, **extra)
        run_id = self._wait_for("run_id", clock).decode()
        self._started = True
        self._client.put("started", "1")
        return Attempt(self._plan, self._place.port, run_id, self._number, self._heartbeat.remote_request)

    def _roll_call(self, count: int, clock: WaitTimer) -> tuple[MachineInfo, ...]:
        """Wait for every machine of the round to tell about itself; empty when one is given up."""
        begin = clock.seconds
        while missing := [i for i in range(count) if not self._client.has(self._key(f"here/{i}"))]:
            clock.say(f"waiting for {_machines(missing)} (of {count})")
            if clock.is_over:
                raise self._not_all(missing, count)
            if clock.seconds - begin > self._members.patience:
                return ()
            self._watch_others()
            time.sleep(_POLL)
        return tuple(MachineInfo.from_json(self._client.get(self._key(f"here/{i}"))) for i in range(count))

    def _not_all(self, missing: Sequence[int], count: int) -> WorldError:
        seen, doubt = count - len(missing), self._place.doubt()
        why = f"{_machines(missing)} did not come within {self._options.timeout:.0f} s"
        return WorldError(
            f"{self._facts} sees {seen} machine{'s' if seen != 1 else ''}, expected {expected(self._config)}: "
            f"{why}{f'; {doubt}' if doubt else ''}",
            f"They were to come to {self._place.name}, port {self._place.port}",
            "Start the same command there, each with its --machine_rank; rdzv_conf timeout=SECONDS waits longer",
        )

    def _preflight(self) -> None:
        """Hold all machines against the first, look at the clocks, and let them exchange a number."""
        tokens = frozenset(machine.token for machine in self._machines)
        if not self._config.preflight or tokens <= self._alike:
            return
        self._compare(self._machines)
        times = self._read_clocks()
        for line in clock_skews(self._machines, times):
            _LOG.warning("paceline: %s; which rank failed first may be told wrong", line)
        store = PrefixStore(self._key("preflight"), self._place.connect())
        why = connectivity_error(store, self._index, self._machines, self._watch_others)
        self._client.put(self._key(f"connected/{self._index}"), why)
        found = [text.decode() for text in self._from_all("connected")]
        _refuse([line for line in found if line], "A firewall, or another interface than the one that leads there")
        self._alike = tokens

    def _read_clocks(self) -> list[float]:
        self._client.put(self._key(f"clock/{self._index}"), str(time.time()))
        return [float(text) for text in self._from_all("clock")]

    def _from_all(self, name: str) -> list[bytes]:
        """Return what each machine wrote under a name, in their order."""
        clock = self._clock(_PATIENCE)
        keys = [(self._key(f"{name}/{index}"), machine.host) for index, machine in enumerate(self._machines)]
        return [self._wait_for(key, clock, host) for key, host in keys]

    def _compare(self, machines: Sequence[MachineInfo]) -> None:
        found = [f"{machine}: {problem}" for machine in machines for problem in machine.problems]
        _refuse(found + mismatches(machines), "All machines must run the same thing in the same way")

    def _wait_for(self, key: str, clock: WaitTimer, whom: str = "machine 0") -> bytes:
        while not self._client.has(key):
            clock.say(f"waiting for {whom}")
            if clock.is_over:
                raise WorldError(
                    f"{self._facts} waited {clock.seconds:.0f} s for {whom} ({key.rpartition('/')[0] or key})",
                    "It was there a moment ago",
                    "Look at what its launcher said",
                )
            self._watch_others()
            time.sleep(_POLL)
        return self._client.get(key)

    def _watch_others(self) -> None:
        """Raise when another machine gave up, or is lost before the ranks start."""
        if self._heartbeat.cut_off:
            raise CutOffError(self._heartbeat.cut_off)
        if self._client.has("over"):
            raise _Over(self._client.get("over").decode())
        for token, why in self._heartbeat.lost.items():
            raise WorldError(f"{self._name_of(token)} is lost before its ranks start: {why}")

    def _name_of(self, token: str) -> str:
        return next((str(machine) for machine in self._machines if machine.token == token), "a machine")

    def conclude(self, outcome: AttemptOutcome) -> Decision:
        """Tell how this machine's ranks ended, learn about the others', and return what follows for all."""
        own = MachineExit.of(outcome, self._facts.host, self._plan)
        try:
            return self._conclude(outcome, own)
        except CutOffError as error:
            saw, why = self._lost_host(error.saw)
            lost = MachineExit(self._host_name(), self._machines[0].processes, lost=f"{saw}; {why}")
            return decide([own, lost], may_restart=False)

    def _conclude(self, outcome: AttemptOutcome, own: MachineExit) -> Decision:
        if (outcome.failed and not outcome.preempted) or outcome.signal is not None:
            self._stop_all()
        self._client.put(self._key(f"end/{self._index}"), own.to_json())
        try:
            ends = self._collect()
        except WorkerError:  # a signal came when the ranks here had ended: those of the others end too
            self._stop_all()
            own = replace(own, signal=self._signals[0])
            self._client.put(self._key(f"end/{self._index}"), own.to_json())
            self._signals = ()
            ends = self._collect()
        lost = [end for end in ends if end.lost]
        left = len(ends) - len(lost)
        may_restart = self._used < self._config.max_restarts and self._members.can_go_on(left, len(ends))
        verdict = decide(ends, may_restart=may_restart, regroup=self._regroups())
        verdict = Decision.from_json(self._client.claim(self._key("verdict"), verdict.to_json()))
        if verdict.kind == "again" and self._client.add(self._key("counted"), 1) == 1:
            self._client.add("failures", 1)
        self._ended = verdict.kind in ("done", "end")
        if self._ended:
            self._say_goodbye(left)
        return verdict

    def _stop_all(self) -> None:
        self._client.claim(self._key("stop"), self._facts.host)

    def _regroups(self) -> bool:
        if self._heartbeat.regroup:
            self._client.claim(self._key("regroup"), self._facts.host)
        return self._client.has(self._key("regroup"))

    def _collect(self) -> list[MachineExit]:
        """Wait until each machine has told how its ranks ended, or is lost."""
        if self._heartbeat.regroup:
            self._client.claim(self._key("regroup"), self._facts.host)
        clock = WaitTimer(float("inf"), self._signals)
        found: dict[int, MachineExit] = {}
        while len(found) < len(self._machines):
            if self._heartbeat.cut_off:
                raise CutOffError(self._heartbeat.cut_off)
            lost = self._heartbeat.lost
            for index, machine in enumerate(self._machines):
                key = self._key(f"end/{index}")
                if index not in found and self._client.has(key):
                    found[index] = MachineExit.from_json(self._client.get(key))
                elif index not in found and machine.token in lost:
                    found[index] = MachineExit(machine.host, machine.processes, lost=lost[machine.token])
                    self._stop_all()
            missing = [str(m) for i, m in enumerate(self._machines) if i not in found]
            clock.say(f"the ranks here have ended; waiting for {', '.join(missing)}")
            time.sleep(_POLL)
        return [found[index] for index in range(len(self._machines))]

    def _say_goodbye(self, left: int) -> None:
        """Let machine 0 go last: with it goes the store that the others still read."""
        count = self._client.add(self._key("bye"), 1)
        clock = WaitTimer(_FAREWELL)
        while self._place.listens and count < left and not clock.is_over:
            time.sleep(_POLL)
            count = self._client.add(self._key("bye"), 0)

    def _give_up(self, said: str) -> None:
        """Tell the others that this machine does not go on, and stay until they can have read it."""
        try:
            first = self._client.claim("over", said).decode()
        except CutOffError:
            return
        if self._place.listens and (first == said or self._config.rdzv_backend == "static"):
            time.sleep(min(2.0, _FAREWELL))

    def _lost_host(self, why: str) -> tuple[str, str]:
        return f"{self._facts} lost touch with machine 0 ({self._host_name()})", why

    def _host_name(self) -> str:
        return self._place.name if not self._machines or self._place.listens else str(self._machines[0])

    def _key(self, name: str) -> str:
        return f"round/{self._number}/{name}"

    def close(self) -> None:
        """Give no more signs of life."""
        self._members.close(ended=self._ended)
        self._heartbeat.close()
        self._client.close()


class _Over(WorldError):
    """Another machine gave up; this is what it said."""


def _refuse(problems: Sequence[str], why: str) -> None:
    if problems:
        found = "".join(f"\n  {problem.strip()}" for problem in problems)
        raise WorldError(
            f"The machines do not fit together:{found}\n", why, "Nothing was started; --preflight false skips this"
        )


def _machines(numbers: Sequence[int]) -> str:
    shown = [str(number) for number in numbers]
    if len(shown) == 1:
        return f"machine {shown[0]}"
    return f"machines {', '.join(shown[:-1])} and {shown[-1]}"
