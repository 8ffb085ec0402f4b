"""A make-believe group whose ranks are threads of this process.

Different values on different ranks, ranks that disagree and ranks that never arrive can be tried out in one
process, without a process group.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._C._distributed_c10d import HashStore

from paceline.collectives.group import Board, Group, Pending
from paceline.collectives.wire import Op, WireOp, plain, reduce_over_wire, seal, unseal
from paceline.errors import CollectiveError, named_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["FakeGroup", "run_fake_ranks"]

T = TypeVar("T")


@dataclass(slots=True)
class Exchange:
    """One exchange: which ranks have come, in which operation, with what."""

    operations: dict[int, str] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)


class Room:
    """Where the ranks of one make-believe group meet; their n-th exchanges belong together.

    Args:
        size: How many ranks there are.
        timeout: Seconds that a rank waits for the others.
    """

    def __init__(self, size: int, timeout: float = 30.0) -> None:
        self.size = size
        self.timeout = timeout
        self._changed = threading.Condition()
        self._exchanges: dict[int, Exchange] = {}
        self._made = [0] * size
        self._ended: dict[int, str] = {}
        self.notes = HashStore()

    def arrive(self, rank: int, operation: str, value: Any) -> Exchange:
        """Bring `value` to this rank's next exchange and return that."""
        with self._changed:
            number = self._made[rank]
            self._made[rank] += 1
            exchange = self._exchanges.setdefault(number, Exchange())
            exchange.operations[rank] = operation
            exchange.values[rank] = value
            if len(exchange.values) == self.size:
                del self._exchanges[number]
            self._changed.notify_all()
        return exchange

    def collect(self, exchange: Exchange) -> list[Any]:
        """Wait until every rank has come; return their values in rank order.

        Raises:
            CollectiveError: A rank has ended, is in another operation, or did not come in time.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._settled(exchange), self.timeout)
            if len(set(exchange.operations.values())) > 1:
                raise _disagreement(exchange)
            missing = self._missing(exchange)
            if missing:
                # While one has ended, the others may merely be on their way.
                ended = [rank for rank in missing if rank in self._ended]
                raise self._absence(exchange, ended or missing)
            return [exchange.values[rank] for rank in range(self.size)]

    def end(self, rank: int, how: str) -> None:
        """Note that a rank will come to no further exchange."""
        with self._changed:
            self._ended[rank] = how
            self._changed.notify_all()

    def _settled(self, exchange: Exchange) -> bool:
        missing = self._missing(exchange)
        disagree = len(set(exchange.operations.values())) > 1
        return not missing or disagree or any(rank in self._ended for rank in missing)

    def _missing(self, exchange: Exchange) -> list[int]:
        return [rank for rank in range(self.size) if rank not in exchange.values]

    def _absence(self, exchange: Exchange, missing: list[int]) -> CollectiveError:
        operation = next(iter(exchange.operations.values()))
        where = "; ".join(f"rank {rank} {self._whereabouts(rank)}" for rank in missing)
        return CollectiveError(
            f"{named_ranks(missing).capitalize()} did not come to the {operation} that "
            f"{named_ranks(exchange.values, 'is', 'are')} in: {where}",
            "A collective returns only when every rank has called it",
            "Make the call on every rank, outside of any branch on the rank",
        )

    def _whereabouts(self, rank: int) -> str:
        if rank in self._ended:
            return f"has ended ({self._ended[rank]})"
        return f"made {self._made[rank]} exchanges and no further one in {self.timeout:g} s"


def _disagreement(exchange: Exchange) -> CollectiveError:
    by_operation: dict[str, list[int]] = {}
    for rank, operation in sorted(exchange.operations.items()):
        by_operation.setdefault(operation, []).append(rank)
    seen = [f"{named_ranks(ranks, 'is', 'are')} in {operation}" for operation, ranks in by_operation.items()]
    return CollectiveError(
        f"The ranks are in different operations: {', '.join(seen)}",
        "The n-th collective of one rank meets the n-th of every other",
        "Make the same calls in the same order on every rank",
    )


class FakeGroup(Group):
    """One rank of a make-believe group; `run_fake_ranks` builds one for each of its threads.

    It behaves as `TorchGroup` does, except that it checks shapes and dtypes, and that a rank which does not
    come, or comes to something else, is named at once.
    """

    def __init__(self, rank: int, room: Room) -> None:
        self.rank = rank
        self.size = room.size
        self.device = torch.device("cpu")
        self.room = room

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Group.all_gather`. Collective: every rank must call it."""
        return self.start_all_gather(tensor).wait()

    def start_all_gather(self, tensor: torch.Tensor) -> Pending:
        """See `Group.start_all_gather`. Collective: every rank must call it."""
        exchange = self.room.arrive(self.rank, "all_gather", plain(tensor).clone())
        return Pending(lambda: torch.stack(_alike(self.room.collect(exchange), "all_gather")))

    def all_reduce(self, tensor: torch.Tensor, op: Op = "sum") -> torch.Tensor:
        """See `Group.all_reduce`. Collective: every rank must call it."""

        def exchange(buffer: torch.Tensor, wire_op: WireOp) -> None:
            label = f"all_reduce({op})"
            values = torch.stack(_alike(self._swap(label, buffer.clone()), label))
            match wire_op:
                case "sum":
                    torch.sum(values, 0, dtype=values.dtype, out=buffer)
                case "max":
                    buffer.copy_(values.amax(0))
                case "min":
                    buffer.copy_(values.amin(0))

        return reduce_over_wire(tensor, op, self.size, exchange)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """See `Group.broadcast`. Collective: every rank must call it."""
        self.check_source(source)
        label = f"broadcast(source={source})"
        values = _alike(self._swap(label, plain(tensor).clone()), label)
        if self.rank != source:
            tensor.detach().copy_(values[source])
        return tensor

    def all_gather_object(self, value: T) -> list[T]:
        """See `Group.all_gather_object`. Collective: every rank must call it."""
        return [unseal(s, rank) for rank, s in enumerate(self._swap("all_gather_object", seal(value)))]

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """See `Group.broadcast_object`. Collective: every rank must call it."""
        self.check_source(source)
        sealed = seal(value) if self.rank == source else b""
        received: T = unseal(self._swap(f"broadcast_object(source={source})", sealed)[source], source)
        return received

    def scatter_object(self, values: Sequence[T] | None, source: int = 0) -> T:
        """See `Group.scatter_object`. Collective: every rank must call it."""
        self.check_source(source)
        given = [seal(v) for v in values] if self.rank == source and values is not None else None
        sealed = self.check_scattered(self._swap(f"scatter_object(source={source})", given)[source])
        received: T = unseal(sealed[self.rank], source)
        return received

    def start_scatter(self, parts: Sequence[torch.Tensor] | None, into: torch.Tensor, source: int = 0) -> Pending:
        """See `Group.start_scatter`. Collective: every rank must call it, and call `wait`."""
        self.check_source(source)
        given = [part.clone() for part in self.check_scattered(parts)] if self.rank == source else None
        label = f"scatter(source={source})"
        exchange = self.room.arrive(self.rank, label, (given, into.clone()))

        def finish() -> torch.Tensor:
            brought = self.room.collect(exchange)
            _alike([*brought[source][0], *(place for _, place in brought)], label)
            return into.copy_(brought[source][0][self.rank])

        return Pending(finish)

    def barrier(self) -> None:
        """See `Group.barrier`. Collective: every rank must call it."""
        self._swap("barrier", None)

    def open_board(self, name: str) -> Board:
        """See `Group.open_board`."""
        return Board(self.room.notes, name)

    def _swap(self, operation: str, value: Any) -> list[Any]:
        return self.room.collect(self.room.arrive(self.rank, operation, value))


def _alike(tensors: list[torch.Tensor], operation: str) -> list[torch.Tensor]:
    seen: dict[str, list[int]] = {}
    for rank, tensor in enumerate(tensors):
        seen.setdefault(f"{tuple(tensor.shape)} {tensor.dtype}", []).append(rank)
    if len(seen) > 1:
        brought = ", ".join(f"{named_ranks(ranks)}: {what}" for what, ranks in seen.items())
        raise CollectiveError(
            f"The ranks brought different tensors to {operation} ({brought})",
            "It needs the same shape and dtype on every rank",
            "Pad with pad_across_processes first, or exchange with gather_object",
        )
    return tensors


def run_fake_ranks(size: int, function: Callable[[FakeGroup], T], *, timeout: float = 30.0) -> list[T]:
    """Run `function(group)` on `size` threads, one per rank; return what each returned, in rank order.

    Args:
        size: How many ranks.
        function: Called once per rank with that rank's `FakeGroup`.
        timeout: Seconds that a rank waits for the others in one exchange, and that the last ranks get to
            end after another has failed.

    Raises:
        CollectiveError: A rank did not come to an exchange, or came to another one.
        BaseException: Whatever the first failing rank raised.
    """
    room = Room(size, timeout)
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    def serve(rank: int) -> None:
        try:
            results[rank] = function(FakeGroup(rank, room))
        except BaseException as error:
            failures.append(error)
            room.end(rank, f"{type(error).__name__}: {error}")
        else:
            room.end(rank, "it returned")

    threads = [
        threading.Thread(target=serve, args=(rank,), name=f"fake rank {rank}", daemon=True) for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not failures:
            thread.join(0.05)
    # After a failure the others find out at their next exchange; one that is stuck elsewhere is left behind.
    for thread in threads:
        thread.join(1.0 if failures else None)
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(size)]
