"""A fake group whose ranks are threads of this process.

Tests use it for different values on different ranks, ranks that disagree and ranks that never arrive, without a process
group.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._C._distributed_c10d import HashStore

from paceline.collectives.group import Board, Group, Pending
from paceline.collectives.transport import Op, TransportOp, as_contiguous, pickle_or_reason, reduce_with, unpickle_from
from paceline.errors import CollectiveError, named_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["FakeGroup", "run_fake_ranks"]

T = TypeVar("T")


@dataclass(slots=True)
class Exchange:
    """One exchange: the operation and the value of each rank that has arrived."""

    operations: dict[int, str] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)


class FakeTransport:
    """Passes values between the ranks of one fake group; the n-th exchange of one rank meets the n-th of the others.

    Args:
        size: The number of ranks.
        timeout: Seconds that a rank waits for the others.
    """

    def __init__(self, size: int, timeout: float = 30.0) -> None:
        self.size = size
        self.timeout = timeout
        self._changed = threading.Condition()
        self._exchanges: dict[int, Exchange] = {}
        self._made = [0] * size
        self._ended: dict[int, str] = {}
        self.store = HashStore()

    def arrive(self, rank: int, operation: str, value: Any) -> Exchange:
        """Add `value` to this rank's next exchange and return that exchange."""
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
        """Wait until every rank has arrived; return their values in rank order.

        Raises:
            CollectiveError: A rank has ended, is in another operation, or did not arrive in time.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_decided(exchange), self.timeout)
            if len(set(exchange.operations.values())) > 1:
                raise _different_operations_error(exchange)
            missing = self._missing(exchange)
            if missing:
                # If a rank has ended, others may only be late.
                ended = [rank for rank in missing if rank in self._ended]
                raise self._missing_ranks_error(exchange, ended or missing)
            return [exchange.values[rank] for rank in range(self.size)]

    def end(self, rank: int, how: str) -> None:
        """Note that a rank will take part in no further exchange."""
        with self._changed:
            self._ended[rank] = how
            self._changed.notify_all()

    def _is_decided(self, exchange: Exchange) -> bool:
        missing = self._missing(exchange)
        disagree = len(set(exchange.operations.values())) > 1
        return not missing or disagree or any(rank in self._ended for rank in missing)

    def _missing(self, exchange: Exchange) -> list[int]:
        return [rank for rank in range(self.size) if rank not in exchange.values]

    def _missing_ranks_error(self, exchange: Exchange, missing: list[int]) -> CollectiveError:
        operation = next(iter(exchange.operations.values()))
        where = "; ".join(f"rank {rank} {self._last_seen(rank)}" for rank in missing)
        return CollectiveError(
            f"{named_ranks(missing).capitalize()} did not reach the {operation} that "
            f"{named_ranks(exchange.values, 'is', 'are')} in: {where}",
            "A collective returns only when every rank has called it",
            "Make the call on every rank, outside of any branch on the rank",
        )

    def _last_seen(self, rank: int) -> str:
        if rank in self._ended:
            return f"has ended ({self._ended[rank]})"
        return f"made {self._made[rank]} exchanges and no further one in {self.timeout:g} s"


def _different_operations_error(exchange: Exchange) -> CollectiveError:
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
    """One rank of a fake group; `run_fake_ranks` creates one for each of its threads.

    It behaves like `TorchGroup`, but also checks shapes and dtypes, and names ranks that are missing or in another
    operation.

    Args:
        rank: The rank of this thread.
        transport: Connects it with the other ranks.
    """

    def __init__(self, rank: int, transport: FakeTransport) -> None:
        self.rank = rank
        self.size = transport.size
        self.device = torch.device("cpu")
        self.transport = transport

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Group.all_gather`. Collective: every rank must call it."""
        return self.start_all_gather(tensor).wait()

    def start_all_gather(self, tensor: torch.Tensor) -> Pending:
        """See `Group.start_all_gather`. Collective: every rank must call it."""
        exchange = self.transport.arrive(self.rank, "all_gather", as_contiguous(tensor).clone())
        return Pending(lambda: torch.stack(_same_shapes(self.transport.collect(exchange), "all_gather")))

    def all_reduce(self, tensor: torch.Tensor, op: Op = "sum") -> torch.Tensor:
        """See `Group.all_reduce`. Collective: every rank must call it."""

        def exchange(buffer: torch.Tensor, transport_op: TransportOp) -> None:
            label = f"all_reduce({op})"
            values = torch.stack(_same_shapes(self._exchange_values(label, buffer.clone()), label))
            match transport_op:
                case "sum":
                    torch.sum(values, 0, dtype=values.dtype, out=buffer)
                case "max":
                    buffer.copy_(values.amax(0))
                case "min":
                    buffer.copy_(values.amin(0))

        return reduce_with(tensor, op, self.size, exchange)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """See `Group.broadcast`. Collective: every rank must call it."""
        self.check_source(source)
        label = f"broadcast(source={source})"
        values = _same_shapes(self._exchange_values(label, as_contiguous(tensor).clone()), label)
        if self.rank != source:
            tensor.detach().copy_(values[source])
        return tensor

    def all_gather_object(self, value: T) -> list[T]:
        """See `Group.all_gather_object`. Collective: every rank must call it."""
        pickled = self._exchange_values("all_gather_object", pickle_or_reason(value))
        return [unpickle_from(data, rank) for rank, data in enumerate(pickled)]

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """See `Group.broadcast_object`. Collective: every rank must call it."""
        self.check_source(source)
        pickled: bytes | str = b""
        if self.rank == source:
            pickled = pickle_or_reason(value)
        by_rank = self._exchange_values(f"broadcast_object(source={source})", pickled)
        received: T = unpickle_from(by_rank[source], source)
        return received

    def start_scatter(self, parts: Sequence[torch.Tensor] | None, into: torch.Tensor, source: int = 0) -> Pending:
        """See `Group.start_scatter`. Collective: every rank must call it, and call `wait`."""
        self.check_source(source)
        values_to_send = None
        if self.rank == source:
            values_to_send = [part.clone() for part in self.check_scattered(parts)]
        label = f"scatter(source={source})"
        exchange = self.transport.arrive(self.rank, label, (values_to_send, into.clone()))

        def finish() -> torch.Tensor:
            by_rank = self.transport.collect(exchange)
            sent = by_rank[source][0]
            _same_shapes([*sent, *(receiver for _, receiver in by_rank)], label)
            return into.copy_(sent[self.rank])

        return Pending(finish)

    def barrier(self) -> None:
        """See `Group.barrier`. Collective: every rank must call it."""
        self._exchange_values("barrier", None)

    def open_board(self, name: str) -> Board:
        """See `Group.open_board`."""
        return Board(self.transport.store, name)

    def _exchange_values(self, operation: str, value: Any) -> list[Any]:
        return self.transport.collect(self.transport.arrive(self.rank, operation, value))


def _same_shapes(tensors: list[torch.Tensor], operation: str) -> list[torch.Tensor]:
    seen: dict[str, list[int]] = {}
    for rank, tensor in enumerate(tensors):
        seen.setdefault(f"{tuple(tensor.shape)} {tensor.dtype}", []).append(rank)
    if len(seen) > 1:
        description = ", ".join(f"{named_ranks(ranks)}: {what}" for what, ranks in seen.items())
        raise CollectiveError(
            f"The ranks passed different tensors to {operation} ({description})",
            "It needs the same shape and dtype on every rank",
            "Pad with pad_across_processes first, or use gather_object",
        )
    return tensors


def run_fake_ranks(size: int, function: Callable[[FakeGroup], T], *, timeout: float = 30.0) -> list[T]:
    """Run `function(group)` on `size` threads, one per rank.

    Args:
        size: The number of ranks.
        function: Called once per rank with that rank's `FakeGroup`.
        timeout: Seconds that a rank waits for the others in one exchange.

    Returns:
        What each rank returned, in rank order.

    Raises:
        CollectiveError: A rank was missing in an exchange, or was in another one.
        BaseException: Whatever the first failing rank raised.
    """
    transport = FakeTransport(size, timeout)
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    def run_rank(rank: int) -> None:
        try:
            results[rank] = function(FakeGroup(rank, transport))
        except BaseException as error:
            failures.append(error)
            transport.end(rank, f"{type(error).__name__}: {error}")
        else:
            transport.end(rank, "it returned")

    threads = [
        threading.Thread(target=run_rank, args=(rank,), name=f"fake rank {rank}", daemon=True) for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not failures:
            thread.join(0.05)
    # After a failure the others fail at their next exchange; a thread that hangs outside of one is abandoned.
    for thread in threads:
        thread.join(1.0 if failures else None)
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(size)]
