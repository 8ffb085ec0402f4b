"""Saves and loads the state of streams, so that a resumed run reads nothing twice."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from paceline.data.randomness import read_global_rngs
from paceline.data.worker_split import StreamShard
from paceline.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch.utils.data import DataLoader

    from paceline.data.randomness import IsolatedRng

__all__ = [
    "Stateful",
    "StatefulShard",
    "StreamStateHandle",
    "check_not_restored",
    "is_torchdata_loader",
    "maybe_state_handle",
    "shard_of",
    "torchdata_loader",
]


_NONE: Any = object()


@runtime_checkable
class Stateful(Protocol):
    """An object whose position can be saved and loaded, such as a stream."""

    def state_dict(self) -> Any:
        """Return the position."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Continue from a position in the next iteration."""
        ...


class StatefulShard(StreamShard):
    """One rank's part of a data set with a state; see `StreamShard`.

    Its state is that of the data set, and which reader gets the next item. The state is loaded at the beginning of each
    iteration, after `set_epoch`, so that neither undoes the other.
    """

    def __init__(
        self, dataset: Any, rank: int, size: int, num_workers: int, *, by_items: bool = False, block: int = 1
    ) -> None:
        super().__init__(dataset, rank, size, num_workers, by_items=by_items, block=block)
        # The state from which the next iteration is to begin.
        self._pending_state: dict[str, Any] | None = None
        # The data set's state that this iteration has begun from.
        self._start_state: Any = None
        self._begun = False
        self._finished = False
        self._ever_loaded = False
        self._counts_items = _state_is_wrong_after_loading(dataset)

    def state_dict(self) -> dict[str, Any]:
        """Return the position before the next item."""
        if self._pending_state is not None:
            return self._pending_state
        if not self._begun:
            return {"dataset": None, "number": 0, "finished": False}
        shard_state = {"number": self._next_number, "finished": self._finished}
        if self._counts_items and self._start_state is not None:
            return {"dataset": self._start_state, "items": self._items, **shard_state}
        # Copied, because a data set may keep changing the state that it returned.
        return {"dataset": copy.deepcopy(self.dataset.state_dict()), **shard_state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration begin at a saved position."""
        self._pending_state = state_dict

    def __iter__(self) -> Iterator[Any]:
        # Until the first item is taken, the state is that of a new iteration, not of the end of the last one.
        self._begun = self._finished = False
        pending = self._pending_state
        if pending is None or not pending["finished"]:
            return super().__iter__()
        # Now, because a reader that knows it has reached the end takes no item.
        block, self._block = self._block, 1
        if next(super().__iter__(), _NONE) is not _NONE:
            # This data set had already returned to its start; others stop at the end once more.
            self.dataset.load_state_dict(pending["dataset"])
        self._block = block
        self._finished = True
        return iter(())

    def _blocks(self) -> Iterator[Iterable[Any]]:
        yield from super()._blocks()
        self._finished = True

    def _restore(self) -> tuple[int, int]:
        pending, self._pending_state = self._pending_state, None
        self._begun = True
        self._start_state = None if pending is None else pending["dataset"]
        self._items = 0 if pending is None else int(pending.get("items", 0))
        if self._start_state is not None:
            self.dataset.load_state_dict(copy.deepcopy(self._start_state))
            self._ever_loaded = True
        elif self._ever_loaded and hasattr(self.dataset, "_starting_state_dict"):
            # Data sets of `datasets` would begin every iteration over that epoch at the loaded state.
            self.dataset.load_state_dict(None)
        return (0 if pending is None else int(pending["number"])), self._items


def _state_is_wrong_after_loading(dataset: Any) -> bool:
    """Say whether this is a data set of a `datasets` release whose state is wrong after a state was loaded.

    In 5.0 the state stays at the start of the epoch (datasets#8308); earlier releases skip samples of tables that are
    rebatched. The position is then saved as the loaded state and the number of items read since.
    """
    if not hasattr(dataset, "_ex_iterable"):
        return False
    release = str(getattr(sys.modules.get("datasets"), "__version__", ""))
    numbers = [int(part) for part in release.split(".")[:2] if part.isdigit()]
    return numbers < [5, 1]


class StreamStateHandle:
    """Reads and loads the state of the stream behind a reader.

    Args:
        owner: The object that has the state.
        kind: The kind of state; a state of another kind is not loaded.
        copies: Copy the state that is read, because the owner may keep changing it.
        draws: Whether reading draws from this process's global generators: their state is a part of this one.
    """

    def __init__(self, owner: Stateful, kind: str, *, draws: bool, copies: bool = False) -> None:
        self._owner = owner
        self._kind = kind
        self._draws = draws
        self._copies = copies

    def read(self) -> dict[str, Any]:
        """Return the state after the batch that was read last."""
        state = self._owner.state_dict()
        saved = {"kind": self._kind, "state": copy.deepcopy(state) if self._copies else state}
        return {**saved, "rng": read_global_rngs()} if self._draws else saved

    def load(self, saved: dict[str, Any] | None, isolated_rng: IsolatedRng | None) -> bool:
        """Let the next iteration of the reader continue at a saved state; return whether that is possible.

        Args:
            saved: What `read` returned.
            isolated_rng: The random state while the stream is read; it continues at the saved one, too.
        """
        if saved is None or saved.get("kind") != self._kind:
            return False
        self._owner.load_state_dict(saved["state"])
        if isolated_rng is not None and "rng" in saved:
            isolated_rng.start_at(saved["rng"])
        return True


def maybe_state_handle(reader: DataLoader[Any]) -> StreamStateHandle | None:
    """Return what saves and loads the state of a reader's stream, or None if the stream has to be read again.

    With workers the state is in their processes; torchdata's loader fetches it from there, torch's does not.
    """
    dataset = reader.dataset
    draws = not reader.num_workers
    if isinstance(dataset, StatefulShard):
        if is_torchdata_loader(reader):
            kind = f"torchdata, {reader.num_workers} workers"
            return StreamStateHandle(reader, kind, draws=draws)  # type: ignore[arg-type]
        return StreamStateHandle(dataset, "dataset", draws=draws) if draws else None
    if not isinstance(dataset, StreamShard) and isinstance(reader, Stateful) and not is_torchdata_loader(reader):
        return StreamStateHandle(reader, type(reader).__name__, draws=draws, copies=True)
    return None


def shard_of(
    dataset: Any, rank: int, size: int, num_workers: int, *, by_items: bool = False, block: int = 1
) -> StreamShard:
    """Return one rank's part of a stream, with a state if the stream has a complete one."""
    stateful = isinstance(dataset, Stateful) and not _has_shuffle_buffer(dataset)
    kind = StatefulShard if stateful else StreamShard
    return kind(dataset, rank, size, num_workers, by_items=by_items, block=block)


def _has_shuffle_buffer(dataset: Any) -> bool:
    """Say whether this is a data set of `datasets` with a shuffle buffer, which its state does not include."""
    iterables = [getattr(dataset, "_ex_iterable", None)]
    while iterables:
        current = iterables.pop()
        if current is None:
            continue
        if type(current).__name__ == "BufferShuffledExamplesIterable":
            return True
        iterables += [getattr(current, "ex_iterable", None), *(getattr(current, "ex_iterables", None) or ())]
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
    """Raise `DataError` if a torchdata loader has a loaded position of its own."""
    if is_torchdata_loader(loader) and getattr(loader, "next_iter_state", None) is not None:
        raise DataError(
            "A StatefulDataLoader had a state loaded before it was prepared",
            "The prepared loader tracks the position itself, counted over all ranks",
            "Prepare the loader first, then call load_state_dict on what prepare returned, or accelerator.load_state",
        )
