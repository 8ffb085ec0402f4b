"""Who this process is among the others, and what they exchange."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from paceline.collectives import main_process_first, operations
from paceline.errors import CollectiveError, named_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from paceline.collectives import BatchCounts, Reduction
    from paceline.data import ActiveLoaders
    from paceline.strategies import RunContext

F = TypeVar("F", bound="Callable[..., Any]")


class Ranks:
    """The part of the facade that needs no model.

    Args:
        context: The run.
        loaders: Which of them is in use decides what `gather_for_metrics` drops.
    """

    def __init__(self, context: RunContext, loaders: ActiveLoaders) -> None:
        self._world = context.world
        self._group = context.group
        self._loaders = loaders
        self._debug = context.config.debug
        self._trigger = False
        self._device = context.device

    # Who and where

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._device

    @property
    def num_processes(self) -> int:
        """How many ranks train together."""
        return self._world.size

    @property
    def process_index(self) -> int:
        """This process's rank among all."""
        return self._world.rank

    @property
    def local_process_index(self) -> int:
        """This process's rank on its machine."""
        return self._world.local_rank

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self._world.is_main

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first rank of its machine."""
        return self._world.is_local_main

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last rank."""
        return self._world.is_last

    @property
    def use_distributed(self) -> bool:
        """Whether there is more than one rank."""
        return self.num_processes > 1

    # Between ranks

    def gather(self, tensor: Any) -> Any:
        """Concatenate tensors of all ranks along dim 0, in a nested structure. Collective: every rank must call it."""
        return operations.gather(self._group, tensor, debug=self._debug)

    def gather_for_metrics(
        self, input_data: Any, use_gather_object: bool = False, *, pad_index: float | None = None
    ) -> Any:
        """Gather so that every sample counts once: what fills up the last batches is dropped.

        A rank whose batch is not filled up brings all it has, and one whose batch is all filling brings nothing. Where
        a batch is filled up in part, tensors and lists with one row or entry a sample are cut, and anything else there
        is an error that names it; `fill_batches = False` on the prepared loader leaves that batch short instead. Ranks
        may differ in dimension 0. A value of a rank is kept, unless its batch is all filling: a tensor of shape []
        gives one number a rank, any other value a list of one entry a rank. A list of dictionaries, or of as many
        tensors as there are samples, is one entry a sample; dictionaries and other tuples and lists of tensors stay
        what they are.
        Collective: every rank must call it.

        Args:
            input_data: Tensors and objects, nested.
            use_gather_object: Pickle tensors too, for shapes that differ: they come as a list of one entry a rank, and
                every list as one list.
            pad_index: Pad tensors that differ in dimension 1 with this to the longest.

        Raises:
            CollectiveError: Some ranks have no batch now, so they will not come here; or something can neither be cut
                nor joined.
        """
        loader = self._loaders.current
        counts = None if loader is None else loader.counts
        if counts is not None and 0 in counts.rows:
            raise _without_a_batch(counts)
        return operations.gather_samples(
            self._group,
            input_data,
            counts,
            use_gather_object=use_gather_object,
            pad_index=pad_index,
            debug=self._debug,
        )

    def gather_object(self, value: Any) -> list[Any]:
        """Concatenate lists of any Python objects over ranks. Collective: every rank must call it."""
        return operations.gather_object(self._group, value)

    def reduce(self, tensor: Any, reduction: Reduction = "sum", scale: float = 1.0) -> Any:
        """Sum or average tensors over ranks into new ones. Collective: every rank must call it."""
        return operations.reduce(self._group, tensor, reduction, scale, debug=self._debug)

    def broadcast(self, tensor: Any, from_process: int = 0) -> Any:
        """Send tensors from one rank to all, in place. Collective: every rank must call it."""
        return operations.broadcast(self._group, tensor, from_process, debug=self._debug)

    def broadcast_object_list(self, object_list: list[Any], from_process: int = 0) -> list[Any]:
        """Send a list of Python objects from one rank to all, in place. Collective: every rank must call it."""
        return operations.broadcast_object_list(self._group, object_list, from_process)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Pad tensors along `dim` to the longest over all ranks. Collective: every rank must call it."""
        return operations.pad_across_processes(self._group, tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)

    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> AbstractContextManager[Any]:
        """Share out a list, tuple, tensor or dictionary of them: each rank gets its part inside the context."""
        return operations.split_between_processes(self._group, inputs, apply_padding)

    def wait_for_everyone(self) -> None:
        """Wait until every rank is here. Collective: every rank must call it."""
        self._group.barrier()

    def main_process_first(self) -> AbstractContextManager[None]:
        """Let rank 0 run the body before the others do, however long that takes.

        The others wait without a limit, and say so each minute. What rank 0 raises reaches them as an error. The body
        must exchange nothing with the other ranks, which are not in it yet. Collective: every rank must call it.
        """
        return main_process_first(self._group, self.is_main_process)

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """Let the first rank of each machine run the body before that machine's others do; else as for all machines.

        Collective: every rank must call it.
        """
        return main_process_first(self._group, self.is_local_main_process, f"machine {self._world.node_rank}")

    def set_trigger(self) -> None:
        """Raise a flag on this rank that `check_trigger` shows to all."""
        self._trigger = True

    def check_trigger(self) -> bool:
        """Whether any rank has raised its flag; lowers it if so. Collective: every rank must call it."""
        flag = torch.tensor(int(self._trigger))
        raised = bool(self._group.all_reduce(flag, "max").item())
        self._trigger = False
        return raised

    # Only here, only there

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first rank of each machine."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    def on_main_process(self, function: F) -> F:
        """Decorate a function to run on rank 0 only; it returns None elsewhere."""
        return _only_if(self.is_main_process, function)

    def on_local_main_process(self, function: F) -> F:
        """Decorate a function to run on the first rank of each machine only."""
        return _only_if(self.is_local_main_process, function)

    def on_last_process(self, function: F) -> F:
        """Decorate a function to run on the last rank only."""
        return _only_if(self.is_last_process, function)

    def on_process(self, function: F | None = None, process_index: int = 0) -> Any:
        """Decorate a function to run on one rank only."""
        if function is None:
            return functools.partial(self.on_process, process_index=process_index)
        return _only_if(self.process_index == process_index, function)

    def on_local_process(self, function: F | None = None, local_process_index: int = 0) -> Any:
        """Decorate a function to run on one rank of each machine only."""
        if function is None:
            return functools.partial(self.on_local_process, local_process_index=local_process_index)
        return _only_if(self.local_process_index == local_process_index, function)


def _without_a_batch(counts: BatchCounts) -> CollectiveError:
    missing = named_ranks((rank for rank, rows in enumerate(counts.rows) if not rows), "has", "have")
    return CollectiveError(
        f"gather_for_metrics was called while {missing} no batch left",
        "Their loops are over, so the others would wait for them for ever",
        "Leave even_batches=True: the last batches are filled up, and what was added is dropped here",
    )


def _only_if(here: bool, function: F) -> F:
    @functools.wraps(function)
    def maybe(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if here else None

    return maybe  # type: ignore[return-value]
