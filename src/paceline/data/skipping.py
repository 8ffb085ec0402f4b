"""Begins a pass some batches later, for those who count batches themselves."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, IterableDataset, Sampler

from paceline.data.loader import PreparedDataLoader
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SkippedDataLoader", "skip_first_batches"]


def skip_first_batches(dataloader: DataLoader[Any], num_batches: int = 0) -> DataLoader[Any]:
    """Return a loader whose first pass begins `num_batches` batches after the start of the epoch.

    Nobody needs this after `load_state`, which lets the prepared loader go on by itself; it does no harm there
    either, since batches are counted from the start of the epoch and not from where the loader is.

    What is returned is a view of the loader: both number the same epochs and save the same position. Only its
    first pass is shorter; Accelerate's loader skips in every pass, which is why scripts go back to the original
    after one. Map-style data that is skipped is not read, and batches are not counted twice in
    `gather_for_metrics`; a stream is read and dropped.

    Args:
        dataloader: A prepared loader, or any other.
        num_batches: This rank's batches to leave out.

    Raises:
        DataError: `num_batches` is negative.
    """
    count: object = num_batches
    if not hasattr(count, "__index__") or num_batches < 0:
        raise DataError(
            f"skip_first_batches was asked to skip {num_batches!r} batches",
            "A pass can only begin whole batches later, not earlier",
            "Give a whole number from 0 on",
        )
    return SkippedDataLoader(dataloader, num_batches) if num_batches else dataloader


class SkippedDataLoader(DataLoader[Any]):
    """A view of a loader whose first pass begins later; see `skip_first_batches`."""

    def __init__(self, loader: DataLoader[Any], num_batches: int) -> None:
        # A DataLoader by name only: everything else is asked of `loader`.
        self.base_dataloader = loader
        self._left = num_batches

    def __getattr__(self, name: str) -> Any:
        if name == "base_dataloader":
            raise AttributeError(name)
        return getattr(self.base_dataloader, name)

    def __len__(self) -> int:
        return max(0, len(self.base_dataloader) - self._left)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skipped, self._left = self._left, 0
        loader = self.base_dataloader
        if not skipped:
            return iter(loader)
        if isinstance(loader, PreparedDataLoader):
            loader.begin_at_batch(skipped)
            # Where nothing of an epoch is left, a loader would begin the next.
            return iter(()) if skipped >= _length(loader, skipped) else iter(loader)
        return _rest_of(loader, skipped)


def _length(loader: PreparedDataLoader, skipped: int) -> int:
    try:
        return len(loader)
    except TypeError:
        return skipped + 1


class _Rest(Sampler[Any]):
    """What a sampler yields after its first `skipped`."""

    def __init__(self, sampler: Any, skipped: int) -> None:
        self._sampler = sampler
        self._skipped = skipped

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._sampler), self._skipped, None)


def _rest_of(loader: DataLoader[Any], skipped: int) -> Iterator[Any]:
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or type(loader).__iter__ is not DataLoader.__iter__
    ):
        return islice(iter(loader), skipped, None)
    batched = loader.batch_sampler is not None
    sampler = _Rest(loader.batch_sampler if batched else loader.sampler, skipped)
    own: dict[str, Any] = {"batch_sampler": sampler} if batched else {"batch_size": None, "sampler": sampler}
    names = (
        "dataset", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
        "generator", "prefetch_factor",
    )  # fmt: skip
    return iter(DataLoader(**{name: getattr(loader, name) for name in names}, **own))
