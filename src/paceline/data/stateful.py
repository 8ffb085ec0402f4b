"""Streams that know where they are: their state is saved and loaded, and nothing is read twice."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from paceline.data.worker_split import StreamShard
from paceline.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch.utils.data import DataLoader

__all__ = [
    "Stateful",
    "StatefulShard",
    "StreamKeeper",
    "check_not_restored",
    "is_torchdata_loader",
    "keeper_of",
    "shard_of",
    "torchdata_loader",
]


_NONE: Any = object()


@runtime_checkable
class Stateful(Protocol):
    """What can say where it is, and go on from there."""

    def state_dict(self) -> Any:
        """Return where it is."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Go on from there, the next time it is iterated."""
        ...


class StatefulShard(StreamShard):
    """One rank's part of a data set that has a state; see `StreamShard`.

    Its own state is that of the data set and where the next item falls among the readers. Each pass is opened
    anew: the state is loaded after `set_epoch`, so that neither undoes the other.
    """

    def __init__(
        self, dataset: Any, rank: int, size: int, num_workers: int, *, by_items: bool = False, block: int = 1
    ) -> None:
        super().__init__(dataset, rank, size, num_workers, by_items=by_items, block=block)
        self._waiting: dict[str, Any] | None = None
        self._loaded_state: Any = None
        self._is_open = False
        self._finished = False
        self._loaded = False
        self._counts_items = _loses_its_place(dataset)

    def state_dict(self) -> dict[str, Any]:
        """Return where the pass is: before the next item that would be handed out."""
        if self._waiting is not None:
            return self._waiting
        if not self._is_open:
            return {"dataset": None, "number": 0, "finished": False}
        place = {"number": self._next_number, "finished": self._finished}
        if self._counts_items and self._loaded_state is not None:
            return {"dataset": self._loaded_state, "items": self._items, **place}
        # Copied: what a data set returns may go on changing.
        return {"dataset": copy.deepcopy(self.dataset.state_dict()), **place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration begin there."""
        self._waiting = state_dict

    def __iter__(self) -> Iterator[Any]:
        # Before the first item is taken the state must be that of a new pass, not the end of the one before.
        self._is_open = self._finished = False
        waiting = self._waiting
        if waiting is None or not waiting["finished"]:
            return super().__iter__()
        # At once: a reader that knows that it had come to the end asks for no item.
        block, self._block = self._block, 1
        if next(super().__iter__(), _NONE) is not _NONE:
            # This data set had gone back to its start already; others stop there once more.
            self.dataset.load_state_dict(waiting["dataset"])
        self._block = block
        self._finished = True
        return iter(())

    def _blocks(self) -> Iterator[Iterable[Any]]:
        yield from super()._blocks()
        self._finished = True

    def _restore(self) -> tuple[int, int]:
        waiting, self._waiting = self._waiting, None
        self._is_open = True
        self._loaded_state = None if waiting is None else waiting["dataset"]
        self._items = 0 if waiting is None else int(waiting.get("items", 0))
        if self._loaded_state is not None:
            self.dataset.load_state_dict(copy.deepcopy(self._loaded_state))
            self._loaded = True
        elif self._loaded and hasattr(self.dataset, "_starting_state_dict"):
            # Data sets of `datasets` begin every pass over the epoch of a loaded state there.
            self.dataset.load_state_dict(None)
        return (0 if waiting is None else int(waiting["number"])), self._items


def _loses_its_place(dataset: Any) -> bool:
    """Say whether it is a data set of a release of `datasets` whose state is wrong once a state was loaded.

    In 5.0 it stays at the start of the epoch (datasets#8308), and before that it leaves out samples of tables that are
    cut anew. The place is then that of the state that was loaded, and how many items came since.
    """
    if not hasattr(dataset, "_ex_iterable"):
        return False
    release = str(getattr(sys.modules.get("datasets"), "__version__", ""))
    numbers = [int(part) for part in release.split(".")[:2] if part.isdigit()]
    return numbers < [5, 1]


class StreamKeeper:
    """Reads and loads the state of the stream behind a reader.

    Args:
        holder: Who has the state.
        kind: What kind of state it is; a state of another kind is not loaded.
        copies: Copy what is read, because it may go on changing.
    """

    def __init__(self, holder: Stateful, kind: str, *, copies: bool = False) -> None:
        self._holder = holder
        self._kind = kind
        self._copies = copies

    def read(self) -> dict[str, Any]:
        """Return the state after the batch that was read last."""
        state = self._holder.state_dict()
        return {"kind": self._kind, "state": copy.deepcopy(state) if self._copies else state}

    def load(self, saved: dict[str, Any] | None) -> bool:
        """Let the next iteration of the reader go on there; return whether that can be done."""
        if saved is None or saved.get("kind") != self._kind:
            return False
        self._holder.load_state_dict(saved["state"])
        return True


def keeper_of(reader: DataLoader[Any]) -> StreamKeeper | None:
    """Return what saves the stream of a reader, or None if only reading up to a position leads there.

    With workers the state lives in their processes; torchdata's loader fetches it from there, torch's does not.
    """
    dataset = reader.dataset
    if isinstance(dataset, StatefulShard):
        if is_torchdata_loader(reader):
            return StreamKeeper(reader, f"torchdata, {reader.num_workers} workers")  # type: ignore[arg-type]
        return StreamKeeper(dataset, "dataset") if not reader.num_workers else None
    if not isinstance(dataset, StreamShard) and isinstance(reader, Stateful) and not is_torchdata_loader(reader):
        return StreamKeeper(reader, type(reader).__name__, copies=True)
    return None


def shard_of(
    dataset: Any, rank: int, size: int, num_workers: int, *, by_items: bool = False, block: int = 1
) -> StreamShard:
    """Make one rank's part of a stream, with a state if the stream has one that loses nothing."""
    stateful = isinstance(dataset, Stateful) and not _has_shuffle_buffer(dataset)
    kind = StatefulShard if stateful else StreamShard
    return kind(dataset, rank, size, num_workers, by_items=by_items, block=block)


def _has_shuffle_buffer(dataset: Any) -> bool:
    """Say whether it is a data set of `datasets` whose state leaves out what waits in a buffer."""
    waiting = [getattr(dataset, "_ex_iterable", None)]
    while waiting:
        current = waiting.pop()
        if current is None:
            continue
        if type(current).__name__ == "BufferShuffledExamplesIterable":
            return True
        waiting += [getattr(current, "ex_iterable", None), *(getattr(current, "ex_iterables", None) or ())]
    return False


def is_torchdata_loader(loader: Any) -> bool:
    """Say whether a loader is torchdata's own `StatefulDataLoader`."""
    return any(
        kind.__name__ == "StatefulDataLoader" and kind.__module__.startswith("torchdata.")
        for kind in type(loader).__mro__
    )


def torchdata_loader() -> type[DataLoader[Any]]:
    """Return torchdata's loader.

    Raises:
        MissingExtraError: torchdata is not installed.
    """
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchdata":
            raise
        raise MissingExtraError("torchdata", "torchdata", "use_stateful_dataloader=True") from error
    kind: type[DataLoader[Any]] = StatefulDataLoader
    return kind


def check_not_restored(loader: Any) -> None:
    """Refuse a torchdata loader that holds a position of its own; raise `DataError`."""
    if is_torchdata_loader(loader) and getattr(loader, "next_iter_state", None) is not None:
        raise DataError(
            "A StatefulDataLoader was given a state before it was prepared",
            "The prepared loader keeps the position itself, counted over all ranks",
            "Prepare the loader first and call load_state_dict of what prepare returned, or accelerator.load_state",
        )
