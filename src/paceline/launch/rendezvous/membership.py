"""Which machines take part in an attempt: those numbered from 0, or those in torch elastic's dynamic rendezvous."""

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
    from paceline.launch.rendezvous.store import WaitTimer
    from paceline.launch.rendezvous.store_client import StoreClient

__all__ = ["ElasticMembership", "StaticMembership"]

_POLL = 0.1
# Between the end of the rendezvous on one machine and on another, at most. Seconds.
_MAX_LAG = 10.0


class StaticMembership:
    """Every machine has its number, and all of them take part in every attempt."""

    def __init__(self, client: StoreClient, local: MachineInfo) -> None:
        self._client, self._local = client, local
        self._number = -1

    def gather(self, timer: WaitTimer, on_wait: Callable[[], None]) -> tuple[int, int, int]:
        """Return the number of the attempt, this machine's index, and the number of machines.

        Args:
            timer: Limits the wait.
            on_wait: Called repeatedly while waiting; what it raises ends the wait.
        """
        self._number += 1
        while not self._client.has("host"):
            timer.report("waiting for machine 0")
            on_wait()
            time.sleep(_POLL)
        host = MachineInfo.from_json(self._client.get("host"))
        index, count = self._local.machine_rank, int(host.num_machines.rpartition(":")[2])
        owner = MachineInfo.from_json(self._client.claim(f"seat/{index}", self._local.to_json()))
        if owner.token != self._local.token:
            raise WorldError(
                f"{owner} and {self._local} both have machine_rank {index}",
                f"Each of the {count} machines needs a number of its own, from 0",
                "Give each machine its own --machine_rank",
            )
        if index >= count:
            raise WorldError(
                f"{self._local} has machine_rank {index}, but machine 0 ({host}) expects {count} machines",
                "Their num_machines differ",
                "Give every machine the same --num_machines",
            )
        return self._number, index, count

    join_timeout = float("inf")
    """Seconds after which a machine that does not report is dropped, and the rendezvous repeated."""

    def can_restart(self, left: int, count: int) -> bool:
        """Whether another attempt is possible with the machines that are left."""
        return left == count

    def can_grow(self, count: int) -> bool:
        """Whether one more machine could join."""
        return False

    def waiting(self) -> int:
        """Return how many machines wait to join."""
        return 0

    def close(self, *, ended: bool) -> None:
        """Do nothing: there is nothing to close."""


class ElasticMembership:
    """Machines join and leave, between a minimum and a maximum number."""

    def __init__(
        self, client: StoreClient, config: RunConfig, options: RendezvousOptions, local: MachineInfo, store: Store
    ) -> None:
        self._client, self._local = client, local
        self._min, self._max = config.min_machines, config.max_machines
        self._limit = options.timeout
        self.join_timeout = options.lost_after + _MAX_LAG
        self._handler = DynamicRendezvousHandler.from_backend(
            run_id="paceline",
            store=store,
            backend=C10dRendezvousBackend(store, "paceline"),
            min_nodes=self._min,
            max_nodes=self._max,
            local_addr=local.address,
            timeout=RendezvousTimeout(
                join=timedelta(seconds=options.timeout), last_call=timedelta(seconds=options.last_call_timeout)
            ),
            keep_alive_interval=max(1, round(options.keep_alive_interval)),
            keep_alive_max_attempt=max(1, round(options.keep_alive_max_attempt)),
        )

    def gather(self, timer: WaitTimer, on_wait: Callable[[], None]) -> tuple[int, int, int]:
        """Return the number of the attempt, this machine's index, and the number of machines.

        Args:
            timer: Logs the wait; the rendezvous has its own limit.
            on_wait: Called repeatedly while waiting; what it raises ends the wait.
        """

        def wait() -> None:
            timer.report(f"waiting until at least {self._min} machines have joined")
            on_wait()

        try:
            return call_in_thread(self._join, wait, "paceline-rendezvous")
        except (RendezvousClosedError, RendezvousGracefulExitError) as error:
            raise WorldError(f"{self._local} cannot join: the run has ended") from error
        except RendezvousTimeoutError as error:
            raise WorldError(
                f"{socket.gethostname()} sees fewer than {self._min} machines: the others did not join within "
                f"{self._limit:.0f} s",
                f"The run needs at least {self._min} machines",
                "Start the same command on the others, or lower MIN in --num_machines MIN:MAX",
            ) from error
        except (RendezvousError, DistError) as error:
            raise CutOffError(first_line(error)) from error

    def _join(self) -> tuple[int, int, int]:
        info: RendezvousInfo = self._handler.next_rendezvous()
        if info.rank == 0:
            # The handler writes these only once; a machine that joins later waits for those of its own round.
            info.store.set(RendezvousStoreInfo.MASTER_ADDR_KEY, self._local.address)
            info.store.set(RendezvousStoreInfo.MASTER_PORT_KEY, "0")
            number = self._client.add("rounds", 1) - 1
            info.store.set("paceline/number", str(number))
        return int(info.store.get("paceline/number")), info.rank, info.world_size

    def can_restart(self, left: int, count: int) -> bool:
        """Whether another attempt is possible with the machines that are left."""
        return left >= self._min

    def can_grow(self, count: int) -> bool:
        """Whether one more machine could join."""
        return count < self._max

    def waiting(self) -> int:
        """Return how many machines wait to join."""
        return int(self._handler.num_nodes_waiting())

    def close(self, *, ended: bool) -> None:
        """Close the rendezvous to later machines if the run has ended for all; does not wait for a dead store."""
        if not ended:
            return
        closing = threading.Thread(target=self._handler.shutdown, name="paceline-closing", daemon=True)
        closing.start()
        closing.join(timeout=3.0)
