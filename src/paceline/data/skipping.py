"""`skip_first_batches`, which starts an epoch some batches later."""

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
    """Return a loader whose first epoch begins `num_batches` batches later.

    After `load_state` this is not necessary, because the prepared loader continues by itself. It does no harm either:
    batches are counted from the start of the epoch, not from the loader's position.

    The result is a view of the loader: both count the same epochs and save the same position. Only its first epoch is
    shorter. (Accelerate's loader skips in every epoch, so scripts for it return to the original loader after one.)
    Skipped samples of a map-style data set are not read, and `gather_for_metrics` counts no sample twice; skipped
    batches of a stream are read and dropped.

    Args:
        dataloader: A prepared loader, or any other `DataLoader`.
        num_batches: How many of this rank's batches to skip, from 0.

    Returns:
        A `DataLoader` that shares everything else with `dataloader`; `dataloader` itself if `num_batches` is 0.

    Raises:
        DataError: `num_batches` is negative or not an integer.

    Example:
        >>> loader = DataLoader([0, 1, 2, 3, 4, 5], batch_size=2)
        >>> [batch.tolist() for batch in skip_first_batches(loader, 1)]
        [[2, 3], [4, 5]]
    """
    count: object = num_batches
    if not hasattr(count, "__index__") or num_batches < 0:
        raise DataError(
            f"skip_first_batches cannot skip {num_batches!r} batches",
            "An epoch can only begin whole batches later",
            "Pass an integer from 0",
        )
    return SkippedDataLoader(dataloader, num_batches) if num_batches else dataloader


class SkippedDataLoader(DataLoader[Any]):
    """A view of a loader whose first epoch begins later; see `skip_first_batches`.

    Args:
        loader: A prepared loader, or any other.
        num_batches: Batches to skip in the first epoch.
    """

    def __init__(self, loader: DataLoader[Any], num_batches: int) -> None:
        # `DataLoader.__init__` is not called: every attribute is taken from `loader`.
        self.base_dataloader = loader
        self._num_skipped = num_batches

    def __getattr__(self, name: str) -> Any:
        if name == "base_dataloader":
            raise AttributeError(name)
        return getattr(self.base_dataloader, name)

    def __len__(self) -> int:
        return max(0, len(self.base_dataloader) - self._num_skipped)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skipped, self._num_skipped = self._num_skipped, 0
        loader = self.base_dataloader
        if not skipped:
            return iter(loader)
        if isinstance(loader, PreparedDataLoader):
            return loader.rest_from_batch(skipped)
        return _rest_of(loader, skipped)


class _Rest(Sampler[Any]):
    """What a sampler yields after its first `skipped` items."""

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
    sampling: dict[str, Any] = {"batch_sampler": sampler} if batched else {"batch_size": None, "sampler": sampler}
    names = (
        "dataset", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
        "generator", "prefetch_factor",
    )  # fmt: skip
    return iter(DataLoader(**{name: getattr(loader, name) for name in names}, **sampling))
