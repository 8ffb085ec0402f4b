"""What ranks exchange, and which of them run a function."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from paceline import collectives
from paceline.collectives.agreement import check_agreement
from paceline.errors import CollectiveError, named_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from paceline.collectives import BatchCounts, Reduction
    from paceline.data import LoaderFamily
    from paceline.strategies import RunContext

__all__ = ["Communicator"]

F = TypeVar("F", bound="Callable[..., Any]")


class Communicator:
    """Operations on values of all ranks; see the methods of the same names of `Accelerator`.

    Args:
        context: The run.
        loaders: The loader being iterated determines what `gather_for_metrics` drops.
    """

    def __init__(self, context: RunContext, loaders: LoaderFamily) -> None:
        self._world = context.world
        self._group = context.group
        self._loaders = loaders
        self._debug = context.config.debug
        self._trigger = False

    def gather(self, tensor: Any) -> Any:
        """See `Accelerator.gather`."""
        return collectives.gather(self._group, tensor, debug=self._debug)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool, pad_index: float | None) -> Any:
        """See `Accelerator.gather_for_metrics`."""
        loader = self._loaders.current
        counts = None if loader is None else loader.counts
        if counts is not None and 0 in counts.rows:
            raise _out_of_batches(counts)
        return collectives.gather_samples(
            self._group,
            input_data,
            counts,
            use_gather_object=use_gather_object,
            pad_index=pad_index,
            debug=self._debug,
        )

    def gather_object(self, value: Any) -> list[Any]:
        """See `Accelerator.gather_object`."""
        return collectives.gather_object(self._group, value, debug=self._debug)

    def reduce(self, tensor: Any, reduction: Reduction, scale: float) -> Any:
        """See `Accelerator.reduce`."""
        return collectives.reduce(self._group, tensor, reduction, scale, debug=self._debug)

    def broadcast(self, tensor: Any, from_process: int) -> Any:
        """See `Accelerator.broadcast`."""
        return collectives.broadcast(self._group, tensor, from_process, debug=self._debug)

    def broadcast_object_list(self, object_list: list[Any], from_process: int) -> list[Any]:
        """See `Accelerator.broadcast_object_list`."""
        return collectives.broadcast_object_list(self._group, object_list, from_process, debug=self._debug)

    def pad_across_processes(self, tensor: Any, dim: int, pad_index: int, pad_first: bool) -> Any:
        """See `Accelerator.pad_across_processes`."""
        return collectives.pad_across_processes(
            self._group, tensor, dim=dim, pad_index=pad_index, pad_first=pad_first, debug=self._debug
        )

    def split_between_processes(self, inputs: Any, apply_padding: bool) -> AbstractContextManager[Any]:
        """See `Accelerator.split_between_processes`."""
        return collectives.split_between_processes(self._group, inputs, apply_padding)

    def wait_for_everyone(self) -> None:
        """See `Accelerator.wait_for_everyone`."""
        if self._debug:
            check_agreement(self._group, "wait_for_everyone", None)
        self._group.barrier()

    def main_process_first(self) -> AbstractContextManager[None]:
        """See `Accelerator.main_process_first`."""
        return collectives.main_process_first(self._group, self._world.is_main)

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """See `Accelerator.local_main_process_first`."""
        return collectives.main_process_first(
            self._group, self._world.is_local_main, f"machine {self._world.node_rank}"
        )

    def set_trigger(self) -> None:
        """See `Accelerator.set_trigger`."""
        self._trigger = True

    def check_trigger(self) -> bool:
        """See `Accelerator.check_trigger`."""
        if self._debug:
            check_agreement(self._group, "check_trigger", None)
        flag = torch.tensor(int(self._trigger))
        is_set = bool(self._group.all_reduce(flag, "max").item())
        self._trigger = False
        return is_set

    def print(self, *args: Any, **kwargs: Any) -> None:
        """See `Accelerator.print`."""
        if self._world.is_local_main:
            print(*args, **kwargs)

    def on_main_process(self, function: F) -> F:
        """See `Accelerator.on_main_process`."""
        return _only_if(self._world.is_main, function)

    def on_local_main_process(self, function: F) -> F:
        """See `Accelerator.on_local_main_process`."""
        return _only_if(self._world.is_local_main, function)

    def on_last_process(self, function: F) -> F:
        """See `Accelerator.on_last_process`."""
        return _only_if(self._world.is_last, function)

    def on_process(self, function: F | None, process_index: int) -> Any:
        """See `Accelerator.on_process`."""
        is_chosen = self._world.rank == process_index
        return functools.partial(_only_if, is_chosen) if function is None else _only_if(is_chosen, function)

    def on_local_process(self, function: F | None, local_process_index: int) -> Any:
        """See `Accelerator.on_local_process`."""
        is_chosen = self._world.local_rank == local_process_index
        return functools.partial(_only_if, is_chosen) if function is None else _only_if(is_chosen, function)


def _out_of_batches(counts: BatchCounts) -> CollectiveError:
    finished = named_ranks((rank for rank, rows in enumerate(counts.rows) if not rows), "has", "have")
    return CollectiveError(
        f"gather_for_metrics was called while {finished} no batch left",
        "Their loops are over, so the other ranks would wait for them forever",
        "Leave even_batches=True: the last batches are filled up, and what was added is dropped here",
    )


def _only_if(is_chosen: bool, function: F) -> F:
    @functools.wraps(function)
    def maybe_call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if is_chosen else None

    return maybe_call  # type: ignore[return-value]
