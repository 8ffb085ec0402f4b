"""Telling a data set which epoch is read, also where workers that live on hold copies of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["WorkerCopies", "set_dataset_epoch", "takes_epoch", "tell_worker"]

# The epoch that this worker was told last.
_told: int | None = None


def set_dataset_epoch(dataset: Any, epoch: int) -> None:
    """Call the data set's `set_epoch`, or those of the data sets that it is made of."""
    for part in _parts(dataset):
        if _has_set_epoch(part):
            part.set_epoch(epoch)


def takes_epoch(dataset: Any) -> bool:
    """Whether a data set, or one that it is made of, wants to know the epoch."""
    return any(_has_set_epoch(part) for part in _parts(dataset))


def tell_worker(dataset: Any, epoch: int) -> None:
    """Tell the copy that this worker holds, once an epoch."""
    global _told
    if _told != epoch:
        _told = epoch
        set_dataset_epoch(dataset, epoch)


def _has_set_epoch(dataset: Any) -> bool:
    return callable(getattr(dataset, "set_epoch", None))


def _parts(dataset: Any) -> Iterator[Any]:
    """A data set and what it is made of (`Subset`, `ConcatDataset` and the like), each once.

    What is inside one with a `set_epoch` of its own is that one's business.
    """
    waiting, seen = [dataset], set()
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if not _has_set_epoch(part):
            waiting += _inside(part)


def _inside(dataset: Any) -> list[Any]:
    several = getattr(dataset, "datasets", None)
    if isinstance(several, dict):
        several = list(several.values())
    found = [*several] if isinstance(several, list | tuple) else []
    return [*found, getattr(dataset, "dataset", None)]


class WorkerCopies:
    """What persistent workers have copied of a data set, as far as that tells the epoch."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._copied: list[Any] | None = None

    def check(self) -> None:
        """Refuse a pass whose workers would not see an `epoch` that was set since they were started.

        Raises:
            DataError: They would not.
        """
        now = [_own_epoch(part) for part in _parts(self._dataset) if not _has_set_epoch(part)]
        if self._copied is None:
            self._copied = now
        changed = [(then, new) for then, new in zip(self._copied, now, strict=False) if then != new]
        if changed:
            raise DataError(
                f"epoch of the data set {type(self._dataset).__name__} is {changed[0][1]} now, and its persistent "
                f"workers hold copies made when it was {changed[0][0]}",
                "They would read the samples of that epoch again",
                "Give the data set a set_epoch(epoch), which is called in every worker, or write "
                "persistent_workers=False (dataloader_persistent_workers of the Trainer)",
            )


def _own_epoch(dataset: Any) -> int | None:
    epoch = getattr(dataset, "__dict__", {}).get("epoch")
    return epoch if isinstance(epoch, int) else None
