"""Sets the epoch of data sets, including the copies in persistent workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["WorkerCopies", "has_set_epoch", "set_dataset_epoch", "set_worker_epoch"]

# The epoch that was last set in this worker.
_worker_epoch: int | None = None


def set_dataset_epoch(dataset: Any, epoch: int) -> None:
    """Call the `set_epoch` of a data set, or of the data sets it consists of."""
    for part in _parts(dataset):
        if _has_set_epoch(part):
            part.set_epoch(epoch)


def has_set_epoch(dataset: Any) -> bool:
    """Whether a data set, or one that it consists of, has a `set_epoch`."""
    return any(_has_set_epoch(part) for part in _parts(dataset))


def set_worker_epoch(dataset: Any, epoch: int) -> None:
    """Set the epoch of this worker's copy of a data set, once per epoch."""
    global _worker_epoch
    if _worker_epoch != epoch:
        _worker_epoch = epoch
        set_dataset_epoch(dataset, epoch)


def _has_set_epoch(dataset: Any) -> bool:
    return callable(getattr(dataset, "set_epoch", None))


def _parts(dataset: Any) -> Iterator[Any]:
    """Yield a data set and the data sets it consists of (`Subset`, `ConcatDataset` and the like), each once.

    A data set with a `set_epoch` is responsible for the data sets inside it.
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
    parts = getattr(dataset, "datasets", None)
    if isinstance(parts, dict):
        parts = list(parts.values())
    inner = [*parts] if isinstance(parts, list | tuple) else []
    return [*inner, getattr(dataset, "dataset", None)]


class WorkerCopies:
    """Detects an `epoch` attribute that changed after persistent workers copied the data set.

    Args:
        dataset: The data set of the loader.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._copied: list[Any] | None = None

    def check(self) -> None:
        """Record the epochs that the workers copy when they start; compare them in later iterations.

        Raises:
            DataError: An `epoch` was set since the workers were started, and they would not see it.
        """
        current = [_own_epoch(part) for part in _parts(self._dataset) if not _has_set_epoch(part)]
        if self._copied is None:
            self._copied = current
        changed = [(old, new) for old, new in zip(self._copied, current, strict=False) if old != new]
        if changed:
            raise DataError(
                f"The data set {type(self._dataset).__name__} has epoch={changed[0][1]}, but its persistent workers "
                f"have copies with epoch={changed[0][0]}",
                "They would read the samples of that epoch again",
                "Give the data set a method set_epoch(epoch), which is called in every worker, or set "
                "persistent_workers=False (dataloader_persistent_workers of the Trainer)",
            )


def _own_epoch(dataset: Any) -> int | None:
    epoch = getattr(dataset, "__dict__", {}).get("epoch")
    return epoch if isinstance(epoch, int) else None
