"""A group of ranks and what they do together; one class per way of being connected."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from paceline.collectives.wire import Op, WireOp, as_bytes, plain, reduce_over_wire, seal, unseal
from paceline.errors import CollectiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch._C._distributed_c10d import Store

__all__ = ["Board", "Group", "Op", "Pending", "SoloGroup", "TorchGroup"]

T = TypeVar("T")

# torch 2.13 renamed it and warns about the old name; torch 2.9 to 2.12 only know the old one.
_all_gather_flat: Callable[..., Any] = (
    dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
)
_WIRE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Pending:
    """A collective that has been started and whose result is not there yet."""

    def __init__(self, finish: Callable[[], torch.Tensor]) -> None:
        self._finish = finish
        self._result: torch.Tensor | None = None

    def wait(self) -> torch.Tensor:
        """Wait for the result and return it; further calls return the same tensor.

        On an accelerator it is the current stream that waits, not the host.
        """
        if self._result is None:
            self._result = self._finish()
            self._finish = _finished
        return self._result


def _finished() -> torch.Tensor:
    raise AssertionError("a pending collective was finished twice")


class Board:
    """Notes that ranks leave for each other without meeting; any thread may read and write them.

    Args:
        notes: Where they are kept.
        name: Tells the notes of one purpose from all others.
    """

    def __init__(self, notes: Store, name: str) -> None:
        self._notes = notes
        self._name = name

    def post(self, key: str, text: str) -> None:
        """Leave a note, over one that is there."""
        self._notes.set(f"{self._name}/{key}", text)

    def count(self, key: str) -> int:
        """Add one to a number and return it; the first call, by any rank, gives 1."""
        return int(self._notes.add(f"{self._name}/{key}", 1))

    def read(self, key: str) -> str | None:
        """The note left under a key by any rank; None while there is none. Never waits for it."""
        full = f"{self._name}/{key}"
        return self._notes.get(full).decode() if self._notes.check([full]) else None


class Group(ABC):
    """Ranks that exchange tensors and objects.

    Tensors of every dtype and shape may be given, also without dimensions, empty or not contiguous. No
    gradient flows through an exchange. `source` is a rank of this group.

    Attributes:
        rank: Of this process within the group, from 0.
        size: How many ranks there are.
        device: Where tensors that this library makes for an exchange are put.
    """

    rank: int
    size: int
    device: torch.device

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every rank the tensors of all ranks, [size, *shape], in rank order.

        The shape and dtype must be the same on all ranks. Collective: every rank must call it.
        """

    @abstractmethod
    def start_all_gather(self, tensor: torch.Tensor) -> Pending:
        """Start an `all_gather` and return at once; leave `tensor` alone until `wait` has returned.

        Collective: every rank must call it, and call `wait`.
        """

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor, op: Op = "sum") -> torch.Tensor:
        """Reduce over the ranks, element by element, in place, and return the result.

        A sum of bool is int64 and a mean of bool or integers is float32: these come as a new tensor.
        Collective: every rank must call it.

        Raises:
            CollectiveError: `op` is not known.
        """

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Overwrite `tensor` on every rank with that of rank `source`, and return it.

        The shape and dtype must be the same on all ranks. Collective: every rank must call it.
        """

    @abstractmethod
    def all_gather_object(self, value: T) -> list[T]:
        """Give every rank the objects of all ranks, in rank order; they are pickled.

        Collective: every rank must call it.
        """

    @abstractmethod
    def broadcast_object(self, value: T, source: int = 0) -> T:
        """Give every rank the object of rank `source`; what the others hand in is not looked at.

        Collective: every rank must call it.
        """

    @abstractmethod
    def scatter_object(self, values: Sequence[T] | None, source: int = 0) -> T:
        """Give each rank its own entry of the `values` of rank `source`.

        There is one per rank; the other ranks hand in None. Collective: every rank must call it.

        Raises:
            CollectiveError: Rank `source` has not exactly one value per rank.
        """

    @abstractmethod
    def start_scatter(self, parts: Sequence[torch.Tensor] | None, into: torch.Tensor, source: int = 0) -> Pending:
        """Start to give each rank its own entry of the `parts` of rank `source`; `wait` returns `into` filled with it.

        All parts and every `into` are contiguous tensors of bytes in host memory, of one size. The other ranks hand
        in None for the parts. Leave the tensors alone until `wait` has returned.
        Collective: every rank must call it, and call `wait`.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has arrived; the host waits, on an accelerator too.

        Collective: every rank must call it.
        """

    @abstractmethod
    def open_board(self, name: str) -> Board:
        """Notes that the ranks of this group can leave for each other under the same `name`."""

    def open_second(self) -> Group:
        """The same ranks over host memory, for exchanges of another thread beside those of this group.

        Collective: every rank must call it.
        """
        return self

    def check_source(self, source: int) -> None:
        """Raise `CollectiveError` if there is no rank `source` here."""
        if not 0 <= source < self.size:
            raise CollectiveError(
                f"Rank {source} was named as the source",
                f"This group has the ranks 0 to {self.size - 1}",
                "Name one of them",
            )

    def check_scattered(self, values: Sequence[Any] | None) -> Sequence[Any]:
        """Return the `values` to scatter; raise `CollectiveError` unless there is one per rank."""
        if values is None or len(values) != self.size:
            count = "no values" if values is None else f"{len(values)} values"
            raise CollectiveError(
                f"The source rank has {count} to hand out to {self.size} ranks",
                "Each rank gets exactly one",
                "Give a sequence with one entry per rank",
            )
        return values


class SoloGroup(Group):
    """A group of one rank, where every exchange gives back what was handed in."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank = 0
        self.size = 1
        self.device = torch.device(device)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy with a first dimension of 1."""
        return tensor.detach().clone().unsqueeze(0)

    def start_all_gather(self, tensor: torch.Tensor) -> Pending:
        """Start nothing; `wait` returns what `all_gather` would."""
        return Pending(lambda: self.all_gather(tensor))

    def all_reduce(self, tensor: torch.Tensor, op: Op = "sum") -> torch.Tensor:
        """Return the tensor, in the dtype that `op` gives."""
        return reduce_over_wire(tensor, op, 1, lambda buffer, op: None)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Return the tensor as it is."""
        self.check_source(source)
        return tensor

    def all_gather_object(self, value: T) -> list[T]:
        """Return the object in a list."""
        return [value]

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """Return the object as it is."""
        self.check_source(source)
        return value

    def scatter_object(self, values: Sequence[T] | None, source: int = 0) -> T:
        """Return the only value."""
        self.check_source(source)
        value: T = self.check_scattered(values)[0]
        return value

    def start_scatter(self, parts: Sequence[torch.Tensor] | None, into: torch.Tensor, source: int = 0) -> Pending:
        """Copy the only part."""
        self.check_source(source)
        into.copy_(self.check_scattered(parts)[0])
        return Pending(lambda: into)

    def barrier(self) -> None:
        """Return at once."""

    def open_board(self, name: str) -> Board:
        """See `Group.open_board`."""
        return Board(HashStore(), name)


class TorchGroup(Group):
    """The ranks of a process group of `torch.distributed`.

    A tensor is exchanged by the backend of its own device: host tensors over gloo, device tensors over the
    device's backend. Where the process group has no backend for a tensor's device, the tensor makes the
    journey as a copy on a device that has one. Objects and barriers go through host memory where that is
    possible.

    Args:
        device: Where tensors that this library makes for an exchange are put.
        process_group: The default process group if None.

    Raises:
        CollectiveError: No process group is open, or this process is not in it.
    """

    def __init__(self, device: torch.device | str = "cpu", process_group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise CollectiveError(
                "No process group is open",
                "Ranks can only exchange through one",
                "Open it with paceline.environment.open_process_group, or use SoloGroup for one process",
            )
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)
        self.device = torch.device(device)
        if self.rank < 0:
            raise CollectiveError(
                f"Rank {dist.get_rank()} built a TorchGroup over a process group that it is not in",
                "Only members take part in its exchanges",
                "Build the TorchGroup on member ranks only",
            )
        self._reachable = _devices_served(process_group)
        self._host = self._carrier(torch.device("cpu"))

    def open_board(self, name: str) -> Board:
        """See `Group.open_board`."""
        return Board(dist.distributed_c10d._get_default_store(), name)

    def open_second(self) -> Group:
        """See `Group.open_second`. Collective: every rank must call it."""
        ranks = None if self.process_group is None else dist.get_process_group_ranks(self.process_group)
        return TorchGroup("cpu", dist.new_group(ranks, backend="gloo"))

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Group.all_gather`. Collective: every rank must call it."""
        return self._all_gather(tensor, later=False).wait()

    def start_all_gather(self, tensor: torch.Tensor) -> Pending:
        """See `Group.start_all_gather`. Collective: every rank must call it."""
        return self._all_gather(tensor, later=True)

    def all_reduce(self, tensor: torch.Tensor, op: Op = "sum") -> torch.Tensor:
        """See `Group.all_reduce`. Collective: every rank must call it."""
        return reduce_over_wire(tensor, op, self.size, self._reduce_flat)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """See `Group.broadcast`. Collective: every rank must call it."""
        self.check_source(source)
        carried = plain(tensor).to(self._carrier(tensor.device))
        if carried.numel():
            with self._translated("broadcast"):
                dist.broadcast(as_bytes(carried), group=self.process_group, group_src=source)
        if carried.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(carried)
        return tensor

    def all_gather_object(self, value: T) -> list[T]:
        """See `Group.all_gather_object`. Collective: every rank must call it."""
        sealed: list[Any] = [None] * self.size
        with self._translated("all_gather_object"):
            dist.all_gather_object(sealed, seal(value), group=self.process_group)
        return [unseal(s, rank) for rank, s in enumerate(sealed)]

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """See `Group.broadcast_object`. Collective: every rank must call it."""
        self.check_source(source)
        box: list[Any] = [seal(value) if self.rank == source else None]
        with self._translated("broadcast_object"):
            dist.broadcast_object_list(box, group=self.process_group, group_src=source, device=self._host)
        received: T = unseal(box[0], source)
        return received

    def scatter_object(self, values: Sequence[T] | None, source: int = 0) -> T:
        """See `Group.scatter_object`. Collective: every rank must call it."""
        self.check_source(source)
        # All ranks learn of a wrong list; the source alone raising would leave the others waiting.
        count = self.broadcast_object(None if values is None else len(values), source)
        given = self.check_scattered(None if count is None else [None] * count)
        if self.rank == source and values is not None:
            given = [seal(value) for value in values]
        box: list[Any] = [None]
        with self._translated("scatter_object"):
            dist.scatter_object_list(box, list(given), group=self.process_group, group_src=source)
        received: T = unseal(box[0], source)
        return received

    def start_scatter(self, parts: Sequence[torch.Tensor] | None, into: torch.Tensor, source: int = 0) -> Pending:
        """See `Group.start_scatter`. Collective: every rank must call it, and call `wait`."""
        self.check_source(source)
        given = list(self.check_scattered(parts)) if self.rank == source else None
        carried = into
        if self._host.type != "cpu":
            carried = into.to(self._host)
            given = None if given is None else [part.to(self._host) for part in given]
        with self._translated("scatter"):
            work = dist.scatter(carried, given, group=self.process_group, group_src=source, async_op=True)

        def finish() -> torch.Tensor:
            if work is not None:
                with self._translated("scatter"):
                    work.wait()
            return into if carried is into else into.copy_(carried)

        return Pending(finish)

    def barrier(self) -> None:
        """See `Group.barrier`. Collective: every rank must call it."""
        # Not dist.barrier: with NCCL that guesses a device and makes the stream wait, not the host.
        arrived = torch.ones(1, dtype=torch.int32, device=self._host)
        self._reduce_flat(arrived, "sum", operation="barrier")
        arrived.item()

    def _all_gather(self, tensor: torch.Tensor, *, later: bool) -> Pending:
        carried = plain(tensor).to(self._carrier(tensor.device))
        result = carried.new_empty((self.size, *carried.shape))
        if not carried.numel():
            return Pending(lambda: result.to(tensor.device))
        with self._translated("all_gather"):
            work = _all_gather_flat(as_bytes(result), as_bytes(carried), group=self.process_group, async_op=later)

        def finish() -> torch.Tensor:
            if work is not None:
                with self._translated("all_gather"):
                    work.wait()
            # `carried` is named here so that it outlives the exchange.
            return result if carried.device == tensor.device else result.to(tensor.device)

        return Pending(finish)

    def _reduce_flat(self, buffer: torch.Tensor, op: WireOp, operation: str = "all_reduce") -> None:
        carried = buffer.to(self._carrier(buffer.device))
        with self._translated(operation):
            dist.all_reduce(carried, op=_WIRE_OPS[op], group=self.process_group)
        if carried is not buffer:
            buffer.copy_(carried)

    def _carrier(self, device: torch.device) -> torch.device:
        """Return the device over which a tensor on `device` travels."""
        if device.type in self._reachable or not self._reachable:
            return device
        if self.device.type in self._reachable:
            return self.device
        return torch.device(min(self._reachable))

    @contextmanager
    def _translated(self, operation: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise CollectiveError(
                f"Rank {self.rank} of {self.size} failed in {operation}: {_plain(error)}",
                "Another rank ended, did not arrive in time, or brought another shape or dtype",
                "Look for the first error among the other ranks; every rank must make the same calls in the same order",
            ) from error


def _plain(error: BaseException) -> str:
    """What a native library says, without the place in its own source and its greetings."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", str(error))
    return text.partition(" This is typically caused by")[0].rstrip(".")


def _devices_served(process_group: dist.ProcessGroup | None) -> frozenset[str]:
    """Return the device types that the process group has a backend for; empty if torch does not say."""
    group = dist.group.WORLD if process_group is None else process_group
    return frozenset(device.type for device in getattr(group, "_device_types", ()))
