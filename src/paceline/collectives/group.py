"""The group of ranks that collectives run over: a single process, or a process group of `torch.distributed`."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from paceline.collectives.transport import (
    Op,
    TransportOp,
    as_bytes,
    as_contiguous,
    as_sendable,
    is_common,
    pickle_or_reason,
    reduce_with,
    unpickle_from,
)
from paceline.errors import CollectiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch._C._distributed_c10d import Store

__all__ = ["Board", "Group", "Op", "Pending", "SoloGroup", "TorchGroup"]

T = TypeVar("T")

# torch 2.13 renamed it and warns about the old name; torch 2.9 to 2.12 only know the old one.
_all_gather_flat: Callable[..., Any] = (
    dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
)
# Those of gloo and NCCL, which send several tensors in one launch; not every backend does.
_COALESCING_DEVICES = ("cpu", "cuda")
_TORCH_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Pending:
    """A collective that has been started and may not have finished.

    Args:
        finish: Waits for the collective and returns its result.
    """

    def __init__(self, finish: Callable[[], torch.Tensor]) -> None:
        self._finish = finish
        self._result: torch.Tensor | None = None

    def wait(self) -> torch.Tensor:
        """Wait for the result and return it; further calls return the same tensor.

        On an accelerator the current stream waits, not the host.
        """
        if self._result is None:
            self._result = self._finish()
            self._finish = _finished
        return self._result


def _finished() -> torch.Tensor:
    raise AssertionError("a pending collective was finished twice")


class Board:
    """Notes that ranks leave for each other in a key-value store, without a collective. Thread-safe.

    Args:
        store: Keeps the store.
        name: Prefix of the keys, one for each purpose.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name

    def post(self, key: str, text: str) -> None:
        """Write a note, replacing an earlier one."""
        self._store.set(f"{self._name}/{key}", text)

    def count(self, key: str) -> int:
        """Add one to a counter and return it; the first call, by any rank, returns 1."""
        return int(self._store.add(f"{self._name}/{key}", 1))

    def read(self, key: str) -> str | None:
        """Return the note that any rank wrote under a key, or None if there is none yet. Never waits."""
        full = f"{self._name}/{key}"
        if self._store.check([full]):
            return self._store.get(full).decode()
        return None


class Group(ABC):
    """Ranks that exchange tensors and objects.

    Tensors may have any dtype and shape, no dimension, no element, or be non-contiguous. No gradient flows through an
    exchange. `source` is always a rank within this group.

    Attributes:
        rank: The rank of this process within the group, from 0.
        size: The number of ranks.
        device: Where tensors that this library creates for an exchange are put.
    """

    rank: int
    size: int
    device: torch.device

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every rank the tensors of all ranks, [size, *shape], in rank order.

        The shape and dtype must be the same on all ranks. Collective: every rank must call it.
        """

    def concatenate(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every rank the tensors of all ranks, [size * n, ...] for [n, ...], in rank order; [size] for a scalar.

        The shape and dtype must be the same on all ranks. Collective: every rank must call it.
        """
        gathered = self.all_gather(tensor)
        if gathered.dim() == 1:
            return gathered
        return gathered.flatten(0, 1)

    def concatenate_all(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Do what `concatenate` does for each of some tensors. Collective: every rank must call it."""
        return [self.concatenate(tensor) for tensor in tensors]

    @abstractmethod
    def start_all_gather(self, tensor: torch.Tensor) -> Pending:
        """Start an `all_gather` and return at once; do not modify `tensor` until `wait` has returned.

        Collective: every rank must call it, and call `wait`.
        """

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor, op: Op = "sum") -> torch.Tensor:
        """Reduce over the ranks, element by element, in place, and return the result.

        A sum of bool is int64 and a mean of bool or integers is float32: these are new tensors.
        Collective: every rank must call it.

        Raises:
            CollectiveError: `op` is unknown.
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
        """Give every rank the object of rank `source`; what the others pass is ignored.

        Collective: every rank must call it.
        """

    @abstractmethod
    def start_scatter(self, parts: Sequence[torch.Tensor] | None, into: torch.Tensor, source: int = 0) -> Pending:
        """Start to give each rank its own entry of the `parts` of rank `source`; `wait` returns it in `into`.

        All parts and every `into` are contiguous tensors of bytes in host memory, of one size. The other ranks pass
        None for the parts. Do not modify the tensors until `wait` has returned.
        Collective: every rank must call it, and call `wait`.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has arrived. The host waits, also with an accelerator.

        Collective: every rank must call it.
        """

    @abstractmethod
    def open_board(self, name: str) -> Board:
        """Return the notes that all ranks of this group share under `name`."""

    def open_second(self) -> Group:
        """Return a group of the same ranks in host memory, for another thread to use beside this one.

        Collective: every rank must call it.
        """
        return self

    def translating_errors(self, operation: str) -> AbstractContextManager[None]:
        """Turn the backend's errors inside the `with` block into `CollectiveError`.

        Args:
            operation: What the ranks do together, for the message.
        """
        return nullcontext()

    def check_source(self, source: int) -> None:
        """Raise `CollectiveError` if there is no rank `source` here."""
        if not 0 <= source < self.size:
            raise CollectiveError(
                f"A collective got rank {source} as its source",
                f"This group has the ranks 0 to {self.size - 1}",
                "Use one of these",
            )

    def check_scattered(self, values: Sequence[Any] | None) -> Sequence[Any]:
        """Return the `values` to scatter; raise `CollectiveError` unless there is one per rank."""
        if values is None or len(values) != self.size:
            count = "no values"
            if values is not None:
                count = f"{len(values)} values"
            raise CollectiveError(
                f"The source rank has {count} to scatter to {self.size} ranks",
                "Each rank gets exactly one",
                "Pass a sequence with one entry per rank",
            )
        return values


class SoloGroup(Group):
    """A group of one rank: every collective returns what it was passed.

    Args:
        device: Where tensors that this library creates are put.
    """

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
        return reduce_with(tensor, op, 1, lambda buffer, op: None)

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

    A tensor is exchanged by the backend of its own device: host tensors over gloo, device tensors over the device's
    backend. If the process group has no backend for a tensor's device, a copy on a device that has one is exchanged.
    Objects and barriers go through host memory if possible.

    Args:
        device: Where tensors that this library creates for an exchange are put.
        process_group: The default process group if None.

    Raises:
        CollectiveError: No process group is initialized, or this process is not a member.
    """

    def __init__(self, device: torch.device | str = "cpu", process_group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise CollectiveError(
                "No process group is initialized",
                "Ranks can only communicate through one",
                "Open it with paceline.environment.open_process_group, or use SoloGroup for one process",
            )
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)
        self.device = torch.device(device)
        if self.rank < 0:
            raise CollectiveError(
                f"Rank {dist.get_rank()} created a TorchGroup for a process group that it does not belong to",
                "Only members take part in its collectives",
                "Create the TorchGroup on member ranks only",
            )
        self._backend_devices = _devices_with_backend(process_group)
        self._host_device = self._exchange_device(torch.device("cpu"))

    def open_board(self, name: str) -> Board:
        """See `Group.open_board`."""
        return Board(dist.distributed_c10d._get_default_store(), name)

    def open_second(self) -> Group:
        """See `Group.open_second`. Collective: every rank must call it."""
        ranks = None
        if self.process_group is not None:
            ranks = dist.get_process_group_ranks(self.process_group)
        return TorchGroup("cpu", dist.new_group(ranks, backend="gloo"))

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Group.all_gather`. Collective: every rank must call it."""
        staged, result = self._staged(tensor)
        if staged.numel():
            with self.translating_errors("all_gather"):
                _all_gather_flat(as_sendable(result), as_sendable(staged), group=self.process_group)
        return result.to(tensor.device)

    def _staged(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensor as it is sent, and memory for those of all ranks, on the device that exchanges them."""
        staged = as_contiguous(tensor).to(self._exchange_device(tensor.device))
        return staged, staged.new_empty((self.size, *staged.shape))

    def concatenate(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Group.concatenate`. Collective: every rank must call it."""
        if not (tensor.dim() and tensor.numel() and self._is_sent_directly(tensor)):
            return super().concatenate(tensor)
        result = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        with self.translating_errors("all_gather"):
            _all_gather_flat(result, tensor.detach(), group=self.process_group)
        return result

    def concatenate_all(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Group.concatenate_all`: one launch for all tensors. Collective: every rank must call it."""
        device = tensors[0].device if tensors else None
        # What is launched depends on what is the same on all ranks. How a tensor lies in memory is not: one that was
        # padded on some ranks is a copy there.
        if len(tensors) < 2 or not all(
            tensor.device == device and self._is_sent_with_others(tensor) for tensor in tensors
        ):
            return super().concatenate_all(tensors)
        # One launch takes tensors of one dtype.
        sent = [_bytes_of_rows(tensor) for tensor in tensors]
        received = [part.new_empty((self.size * part.shape[0], *part.shape[1:])) for part in sent]
        with self.translating_errors("all_gather"):
            group = self.process_group or dist.distributed_c10d._get_default_group()
            group.allgather_into_tensor_coalesced(received, sent).wait()
        return [one.view(tensor.dtype) for one, tensor in zip(received, tensors, strict=True)]

    def _is_sent_with_others(self, tensor: torch.Tensor) -> bool:
        """Whether a backend sends the tensor from where it is, several in one launch."""
        known_device = tensor.device.type in self._backend_devices or not self._backend_devices
        return known_device and tensor.device.type in _COALESCING_DEVICES and tensor.numel() > 0

    def _is_sent_directly(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's own backend can send it, as it lies in memory."""
        known_device = tensor.device.type in self._backend_devices or not self._backend_devices
        return known_device and is_common(tensor) and tensor.is_contiguous()

    def start_all_gather(self, tensor: torch.Tensor) -> Pending:
        """See `Group.start_all_gather`. Collective: every rank must call it."""
        staged, result = self._staged(tensor)
        if not staged.numel():
            return Pending(lambda: result.to(tensor.device))
        with self.translating_errors("all_gather"):
            work = _all_gather_flat(as_sendable(result), as_sendable(staged), group=self.process_group, async_op=True)

        def finish() -> torch.Tensor:
            if work is not None:
                with self.translating_errors("all_gather"):
                    work.wait()
            # `staged` is used here so that it outlives the exchange.
            if staged.device == tensor.device:
                return result
            return result.to(tensor.device)

        return Pending(finish)

    def all_reduce(self, tensor: torch.Tensor, op: Op = "sum") -> torch.Tensor:
        """See `Group.all_reduce`. Collective: every rank must call it."""
        return reduce_with(tensor, op, self.size, self._reduce_flat)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """See `Group.broadcast`. Collective: every rank must call it."""
        self.check_source(source)
        staged = as_contiguous(tensor).to(self._exchange_device(tensor.device))
        if staged.numel():
            with self.translating_errors("broadcast"):
                dist.broadcast(as_bytes(staged), group=self.process_group, group_src=source)
        if staged.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(staged)
        return tensor

    def all_gather_object(self, value: T) -> list[T]:
        """See `Group.all_gather_object`. Collective: every rank must call it."""
        pickled: list[Any] = [None] * self.size
        with self.translating_errors("all_gather_object"):
            dist.all_gather_object(pickled, pickle_or_reason(value), group=self.process_group)
        return [unpickle_from(s, rank) for rank, s in enumerate(pickled)]

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """See `Group.broadcast_object`. Collective: every rank must call it."""
        self.check_source(source)
        slot: list[Any] = [pickle_or_reason(value) if self.rank == source else None]
        with self.translating_errors("broadcast_object"):
            dist.broadcast_object_list(slot, group=self.process_group, group_src=source, device=self._host_device)
        received: T = unpickle_from(slot[0], source)
        return received

    def start_scatter(self, parts: Sequence[torch.Tensor] | None, into: torch.Tensor, source: int = 0) -> Pending:
        """See `Group.start_scatter`. Collective: every rank must call it, and call `wait`."""
        self.check_source(source)
        values_to_send = None
        if self.rank == source:
            values_to_send = list(self.check_scattered(parts))
        staged = into
        if self._host_device.type != "cpu":
            staged = into.to(self._host_device)
            values_to_send = None if values_to_send is None else [part.to(self._host_device) for part in values_to_send]
        with self.translating_errors("scatter"):
            work = dist.scatter(staged, values_to_send, group=self.process_group, group_src=source, async_op=True)

        def finish() -> torch.Tensor:
            if work is not None:
                with self.translating_errors("scatter"):
                    work.wait()
            if staged is into:
                return into
            return into.copy_(staged)

        return Pending(finish)

    def barrier(self) -> None:
        """See `Group.barrier`. Collective: every rank must call it."""
        # Not dist.barrier: with NCCL it guesses a device and makes the stream wait, not the host.
        arrived = torch.ones(1, dtype=torch.int32, device=self._host_device)
        self._reduce_flat(arrived, "sum", operation="barrier")
        arrived.item()

    def _reduce_flat(self, buffer: torch.Tensor, op: TransportOp, operation: str = "all_reduce") -> None:
        staged = buffer.to(self._exchange_device(buffer.device))
        with self.translating_errors(operation):
            dist.all_reduce(staged, op=_TORCH_OPS[op], group=self.process_group)
        if staged is not buffer:
            buffer.copy_(staged)

    def _exchange_device(self, device: torch.device) -> torch.device:
        """Return the device on which a tensor of `device` is exchanged."""
        if device.type in self._backend_devices or not self._backend_devices:
            return device
        if self.device.type in self._backend_devices:
            return self.device
        return torch.device(min(self._backend_devices))

    def translating_errors(self, operation: str) -> AbstractContextManager[None]:
        """See `Group.translating_errors`."""
        return _TranslatedErrors(self.rank, self.size, operation)


class _TranslatedErrors:
    """Turns errors of the backend inside the `with` block into `CollectiveError`.

    A class and no generator: it is entered in every collective, and costs a third.
    """

    __slots__ = ("_operation", "_rank", "_size")

    def __init__(self, rank: int, size: int, operation: str) -> None:
        self._rank = rank
        self._size = size
        self._operation = operation

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise CollectiveError(
                f"Rank {self._rank} of {self._size} failed in {self._operation}: {_cleaned_message(error)}",
                "Another rank exited, did not arrive in time, or passed another shape or dtype",
                "Look for the first error on the other ranks; every rank must make the same calls in the same order",
            ) from error


def _cleaned_message(error: BaseException) -> str:
    """The message of a native library, without its source location and general advice."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", str(error))
    return text.partition(" This is typically caused by")[0].rstrip(".")


def _bytes_of_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with dimensions, or a scalar, as bytes of the same rows; copied only if it does not lie in order."""
    strides = tensor.stride()
    # One element may have any strides.
    if strides and strides[-1] == 1 and is_common(tensor) and tensor.is_contiguous():
        return tensor.detach().view(torch.uint8)
    flat = as_bytes(as_contiguous(tensor))
    return flat.view(*tensor.shape[:-1], -1) if strides else flat


def _devices_with_backend(process_group: dist.ProcessGroup | None) -> frozenset[str]:
    """Return the device types that the process group has a backend for; empty if unknown."""
    group = dist.group.WORLD if process_group is None else process_group
    return frozenset(device.type for device in getattr(group, "_device_types", ()))
