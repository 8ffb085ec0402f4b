"""Which machines a round has: those that were numbered, or those that torch elastic's rendezvous brings together."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed import DistError
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from paceline.errors import WorldError, first_line
from paceline.launch.rendezvous.machine_info import MachineInfo
from paceline.launch.rendezvous.store_client import CutOffError, call_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._C._distributed_c10d import Store
    from torch.distributed.elastic.rendezvous import RendezvousInfo

    from paceline.config import RunConfig
    from paceline.config.schema.rendezvous import RendezvousOptions
    from paceline.launch.rendezvous.store import RendezvousStore, WaitTimer
    from paceline.launch.rendezvous.store_client import StoreClient

__all__ = ["ElasticMembership", "StaticMembership"]

_POLL = 0.1
# From the end of the rendezvous on one machine to the same on another. Seconds.
_LATEST = 10.0


class StaticMembership:
    """Every machine has its number, and all of them take part in every round."""

    def __init__(self, client: StoreClient, facts: MachineInfo, place: RendezvousStore) -> None:
        self._client, self._facts, self._place = client, facts, place
        self._number = -1

    def gather(self, clock: WaitTimer, meanwhile: Callable[[], None]) -> tuple[int, int, int]:
        """Return the number of the round, this machine's index, and how many machines take part."""
        self._number += 1
        while not self._client.has("host"):
            clock.say("waiting for machine 0")
            meanwhile()
            time.sleep(_POLL)
        host = MachineInfo.from_json(self._client.get("host"))
        mine, count = self._facts.machine_rank, int(host.num_machines.rpartition(":")[2])
        seat = MachineInfo.from_json(self._client.claim(f"seat/{mine}", self._facts.to_json()))
        if seat.token != self._facts.token:
            raise WorldError(
                f"{seat} and {self._facts} both say that they are machine {mine}",
                f"Each of the {count} machines has a number of its own, from 0",
                "Give each its own --machine_rank",
            )
        if mine >= count:
            raise WorldError(
                f"{self._facts} says that it is machine {mine}, and machine 0 ({host}) expects {count}",
                "They were told different numbers of machines",
                "Give every machine the same --num_machines",
            )
        return self._number, mine, count

    patience = float("inf")
    """Seconds after which a machine that was to take part is given up, and the round made anew."""

    def can_go_on(self, left: int, count: int) -> bool:
        """Whether a new round is possible with the machines that are left."""
        return left == count

    def can_grow(self, count: int) -> bool:
        """Whether one more machine could take part."""
        return False

    def waiting(self) -> int:
        """How many machines wait to take part."""
        return 0

    def close(self, *, ended: bool) -> None:
        """There is nothing to close."""


class ElasticMembership:
    """Machines come and go between a least and a greatest number."""

    def __init__(
        self, client: StoreClient, config: RunConfig, options: RendezvousOptions, facts: MachineInfo, store: Store
    ) -> None:
        self._client, self._facts = client, facts
        self._least, self._most = config.min_machines, config.max_machines
        self._limit = options.timeout
        self.patience = options.lost_after + _LATEST
        self._handler = DynamicRendezvousHandler.from_backend(
            run_id="paceline",
            store=store,
            backend=C10dRendezvousBackend(store, "paceline"),
            min_nodes=self._least,
            max_nodes=self._most,
            local_addr=facts.address,
            timeout=RendezvousTimeout(
                join=timedelta(seconds=options.timeout), last_call=timedelta(seconds=options.last_call_timeout)
            ),
            keep_alive_interval=max(1, round(options.keep_alive_interval)),
            keep_alive_max_attempt=max(1, round(options.keep_alive_max_attempt)),
        )

    def gather(self, clock: WaitTimer, meanwhile: Callable[[], None]) -> tuple[int, int, int]:
        """Return the number of the round, this machine's index, and how many machines take part."""

        def wait() -> None:
            clock.say(f"waiting until at least {self._least} machines are here")
            meanwhile()

        try:
            return call_in_thread(self._join, wait, "paceline-rendezvous")
        except (RendezvousClosedError, RendezvousGracefulExitError) as error:
            raise WorldError(f"{self._facts} does not take part: the run has ended") from error
        except RendezvousTimeoutError as error:
            raise WorldError(
                f"{socket.gethostname()} sees fewer machines than {self._least}, expected at least so many: the "
                f"others did not come within {self._limit:.0f} s",
                "Fewer cannot start",
                "Start the same command on the others, or lower MIN in --num_machines MIN:MAX",
            ) from error
        except (RendezvousError, DistError) as error:
            raise CutOffError(first_line(error)) from error

    def _join(self) -> tuple[int, int, int]:
        found: RendezvousInfo = self._handler.next_rendezvous()
        if found.rank == 0:
            # The handler writes these once in its life; one that comes late waits for those of its own round.
            found.store.set(RendezvousStoreInfo.MASTER_ADDR_KEY, self._facts.address)
            found.store.set(RendezvousStoreInfo.MASTER_PORT_KEY, "0")
            number = self._client.add("rounds", 1) - 1
            found.store.set("paceline/number", str(number))
        return int(found.store.get("paceline/number")), found.rank, found.world_size

    def can_go_on(self, left: int, count: int) -> bool:
        """Whether a new round is possible with the machines that are left."""
        return left >= self._least

    def can_grow(self, count: int) -> bool:
        """Whether one more machine could take part."""
        return count < self._most

    def waiting(self) -> int:
        """How many machines wait to take part."""
        return int(self._handler.num_nodes_waiting())

    def close(self, *, ended: bool) -> None:
        """Close the rendezvous for machines that come later, if the run has ended, and not only for this one.

        A dead line does not hold this up.
        """
        if not ended:
            return
        closing = threading.Thread(target=self._handler.shutdown, name="paceline-closing", daemon=True)
        closing.start()
        closing.join(timeout=3.0)
