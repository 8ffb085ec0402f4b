"""Builds a prepared loader from the user's own: decides how its data is read and dealt out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, TensorDataset

from paceline.collectives import Group, SoloGroup
from paceline.data.counting import CountingCollate
from paceline.data.dispatch import DispatchReading, Feed, PlannedFeed, ReadFeed, SplitBatches
from paceline.data.epochs import takes_epoch
from paceline.data.loader import PreparedDataLoader
from paceline.data.merged_ranks import MergedRanksSharding
from paceline.data.order import order_source, own_generators, size_of
from paceline.data.plan import Layout
from paceline.data.prefetch import DevicePrefetcher
from paceline.data.reading import MapReading, Reading
from paceline.data.ready_batches import ReadyBatches, as_loader
from paceline.data.sharding import (
    BatchSharding,
    PlannedSharding,
    SampleSharding,
    ShardedBatchSampler,
    Sharding,
    UnsizedSharding,
    split_rows,
)
from paceline.data.skipping import SkippedDataLoader
from paceline.data.stateful import check_not_restored, is_torchdata_loader, shard_of, torchdata_loader
from paceline.data.stream import StreamReading, StreamSource
from paceline.environment.logging import get_logger
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.config import DataLoaderConfiguration
    from paceline.data.active import ActiveLoaders

__all__ = ["prepare_loader"]

logger = get_logger(__name__)


def prepare_loader(
    loader: Any,
    *,
    group: Group,
    device: torch.device | None,
    config: DataLoaderConfiguration,
    active: ActiveLoaders,
    plays: int = 1,
) -> PreparedDataLoader:
    """Make a loader that yields this rank's part of what `loader` yields.

    A map-style data set is dealt out by its indices. An iterable one is split among the workers of all ranks
    and read once; rank 0 reads for all only with `dispatch_batches=True` (Accelerate's default for iterable
    data sets). A loader that is prepared already is returned as it is.
    Collective: every rank must call it.

    Args:
        loader: The user's own. A subclass with an `__iter__` of its own, and any other iterable of batches, is
            iterated as it is: by one rank, by rank 0 with `dispatch_batches=True`, or by each rank for itself with
            `streams_are_sharded=True`.
        group: The ranks that share the data.
        device: Where batches go; None leaves them where the loader puts them.
        config: The settings.
        active: Where passes are noted.
        plays: How many ranks' batches this process gets as one; only where it is alone.

    Raises:
        DataError: The loader cannot be shared out, or it yields nothing.
    """
    if isinstance(loader, PreparedDataLoader):
        return loader
    if isinstance(loader, SkippedDataLoader):
        raise DataError(
            "A loader made by skip_first_batches was handed to prepare",
            "Which batches a rank gets is decided by prepare, so that there was nothing to skip yet",
            "Prepare the loader first, then skip its first batches",
        )
    return _Preparation(as_loader(loader), group, device, config, plays).build(active)


class _Preparation:
    """What is known about a loader while it is prepared."""

    def __init__(
        self,
        loader: DataLoader[Any],
        group: Group,
        device: torch.device | None,
        config: DataLoaderConfiguration,
        plays: int,
    ) -> None:
        self.loader = loader
        self.plays = plays
        # Among how many ranks a global batch is dealt out.
        self.ranks = group.size * plays
        self.group = group
        self.device = device
        self.config = config
        self.split = config.split_batches
        self.foreign = _iterates_its_own_way(loader)
        self.iterable = isinstance(loader.dataset, IterableDataset)
        self.rows: int | None = None
        self.layout: Layout

    def build(self, active: ActiveLoaders) -> PreparedDataLoader:
        check_not_restored(self.loader)
        if self.config.use_stateful_dataloader:
            torchdata_loader()
        seed = self._seed()
        settings = self._settings()
        reading, own = self._reading(settings)
        prepared = PreparedDataLoader(
            reading=reading,
            seed=seed,
            group=self.group,
            active=active,
            layout=self.layout,
            prefetcher=self._prefetcher(),
            batch_size=self.rows,
            drop_last=bool(self.loader.drop_last),
            settings={**settings, **own},
        )
        sampler = self.loader.sampler
        if isinstance(sampler, DistributedSampler):
            prepared.follow(sampler)
        return prepared

    def _seed(self) -> int:
        """Choose the seed of the order; rank 0's choice counts."""
        generators = [g for g in (self.loader.generator, *own_generators(self._batches())) if g is not None]
        if self.config.data_seed is not None:
            seed = self.config.data_seed
        elif isinstance(self.loader.sampler, DistributedSampler):
            seed = self.loader.sampler.seed
        elif self.config.use_seedable_sampler:
            seed = generators[0].initial_seed() if generators else torch.initial_seed()
        else:
            drawn = torch.empty((), dtype=torch.int64)
            seed = int(drawn.random_(generator=generators[0] if generators else None))
        return self.group.broadcast_object(int(seed))

    def _settings(self) -> dict[str, Any]:
        """Return the loader's settings that do not depend on the way of reading."""
        loader = self.loader
        pin = loader.pin_memory
        if self.device is not None and self.device.type not in ("cpu", "mps") and loader.num_workers:
            # torch pins what workers send in a thread beside this one; without workers the prefetcher pins what
            # is worth it. What is on a device cannot be pinned.
            pin = pin or not _is_on_device(loader.dataset)
        settings = {
            "dataset": loader.dataset,
            "num_workers": loader.num_workers,
            "collate_fn": loader.collate_fn,
            "pin_memory": pin,
            "timeout": loader.timeout,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "persistent_workers": self._may_keep_workers(),
            "in_order": getattr(loader, "in_order", True),
        }
        if loader.num_workers:
            settings["prefetch_factor"] = loader.prefetch_factor
        return settings

    def _may_keep_workers(self) -> bool:
        """Whether workers live on between passes: not where nothing would tell their copies which epoch it is."""
        loader = self.loader
        if not loader.persistent_workers or not takes_epoch(loader.dataset):
            return bool(loader.persistent_workers)
        name = type(loader.dataset).__name__
        if self.foreign:
            raise DataError(
                f"The loader {self._kind} has an __iter__ of its own and persistent workers, and the data "
                f"set {name} takes set_epoch",
                "The copies that its workers hold cannot be told which epoch it is",
                "Write persistent_workers=False",
            )
        if self._is_single() and not self.iterable:
            logger.warning(
                "The workers that read the data set %s one sample at a time are started anew for each pass: it takes "
                "set_epoch, and their copies would not be told. persistent_workers=False says the same", name,
            )  # fmt: skip
            return False
        return True

    def _prefetcher(self) -> DevicePrefetcher | None:
        if self.device is None or self.device.type == "cpu":
            return None
        return DevicePrefetcher(self.device, non_blocking=self.config.non_blocking is not False)

    def _reading(self, settings: dict[str, Any]) -> tuple[Reading, dict[str, Any]]:
        """Choose the way of reading; also return the remaining arguments of the prepared `DataLoader`."""
        if self.plays > 1:
            self._check_joinable()
        own: dict[str, Any] = {"batch_size": None}
        if not self.iterable and self.loader.batch_sampler is None:
            own["sampler"] = self.loader.sampler
        elif not self.iterable:
            own = {"batch_sampler": self.loader.batch_sampler}
        if self.config.dispatch_batches and self.group.size > 1:
            return self._dispatched(settings), own
        if self.foreign:
            return self._foreign(), own
        if self.iterable:
            return self._stream(settings), own
        sharding = self._sharding(self.group)
        if self.plays > 1 and isinstance(sharding, PlannedSharding) and not self._is_single():
            sharding = MergedRanksSharding(sharding, self.layout, self.group)
        sampler = ShardedBatchSampler(sharding, self._batches(), single=self._is_single())
        _check_not_empty(sampler.sharding.num_rounds(), self.loader, sampler.sharding.total_batch_size)
        _remark_large_batch(sampler.sharding, self.layout)
        reading = MapReading(
            sampler,
            self.loader.dataset,
            self.group,
            workers=settings["num_workers"],
            persistent=settings["persistent_workers"],
        )
        unbatched = self.loader.batch_sampler is None
        return reading, {"sampler": sampler, "batch_size": None} if unbatched else {"batch_sampler": sampler}

    def _check_joinable(self) -> None:
        """Raise where one process cannot get what several ranks would, as one: it would train on other samples."""
        what, hint = "", "Check the script with a plain DataLoader"
        if self.iterable and self.loader.num_workers > 1:
            what = f"A stream is read by {self.loader.num_workers} workers"
            hint = "Set num_workers to 0 or 1 for this check: it compares samples and losses, not the speed"
        elif self.iterable and self.loader.batch_size is None:
            what = f"The stream {type(self.loader.dataset).__name__} makes its batches itself (batch_size=None)"
            hint = "Give the loader a batch_size for this check"
        elif self.foreign:
            what = f"The loader {self._kind} has an __iter__ of its own"
        elif not self.iterable and size_of(self._batches()) is None:
            what, hint = f"{type(self._batches()).__name__} has no length", "Give it a __len__ for this check"
        if what:
            why = f"One process cannot take as one batch what {self.plays} ranks would get in turns from it"
            raise DataError(what, why, hint)

    def _batches(self) -> Any:
        """Return what makes the batches of keys: the batch sampler, else the sampler."""
        return self.loader.sampler if self.loader.batch_sampler is None else self.loader.batch_sampler

    def _is_single(self) -> bool:
        """Say whether the data set is asked for one key at a time."""
        return self.loader.batch_sampler is None and not isinstance(self.loader.sampler, BatchSampler)

    def _layout(self, rows: int | None, *, drop_last: bool) -> Layout:
        if rows and self.split:
            rows = split_rows(rows, self.ranks)
        self.rows = rows * self.plays if rows else None
        self.layout = Layout(rows=rows or 0, size=self.ranks, even=self.config.even_batches, drop_last=drop_last)
        return self.layout

    def _sharding(self, group: Group) -> Sharding:
        """Deal out keys; `group` is who runs samplers together."""
        batches = self._batches()
        if self._is_single():
            self.split = False
            layout = self._layout(1, drop_last=False)
            self.rows = None
            if size_of(batches) is not None:
                return SampleSharding(order_source(batches, group), layout, group)
            return UnsizedSharding(BatchSampler(batches, 1, False), layout, group, split=False)
        drop_last = bool(getattr(batches, "drop_last", False))
        rows = getattr(batches, "batch_size", None)
        layout = self._layout(rows if isinstance(rows, int) else None, drop_last=drop_last)
        plain = isinstance(batches, BatchSampler) and type(batches).__iter__ is BatchSampler.__iter__
        if plain and size_of(batches.sampler) is not None:
            return SampleSharding(order_source(batches.sampler, group), layout, group)
        if size_of(batches) is not None:
            return BatchSharding(batches, layout, group, split=self.split)
        return UnsizedSharding(batches, layout, group, split=self.split)

    def _stream(self, settings: dict[str, Any]) -> Reading:
        layout = self._layout(self.loader.batch_size, drop_last=self.loader.drop_last)
        if self.plays > 1:
            # What several readers would take in turns, one takes in a row.
            layout = self.layout = replace(layout, rows=self.rows or 0, size=1)
        dataset, note = self._split_stream(layout.rows)
        reader = self._reader(settings, dataset, layout.rows)
        return self._with_generator(StreamReading(StreamSource(reader, layout.rows), layout, self.group, note), reader)

    def _reader(self, settings: dict[str, Any], dataset: Any, rows: int) -> DataLoader[Any]:
        """Build what reads a stream; it counts the samples of its batches unless the data set makes them itself."""
        own = {"dataset": dataset, "batch_size": rows or None, "generator": torch.Generator()}
        if rows:
            own["drop_last"] = self.loader.drop_last
            own["collate_fn"] = self._counting(rows)
        if is_torchdata_loader(self.loader) or self.config.use_stateful_dataloader:
            kind = torchdata_loader()
            own["snapshot_every_n_steps"] = getattr(self.loader, "snapshot_every_n_steps", 1)
            return kind(**{**settings, **own})
        return DataLoader(**{**settings, **own})

    def _counting(self, rows: int) -> CountingCollate:
        return CountingCollate(self.loader.collate_fn, rows, shared=self.loader.num_workers > 0)

    def _with_generator(self, reading: Reading, reader: DataLoader[Any]) -> Reading:
        """Let the loader seed the workers of an inner reader."""
        if reader is not self.loader:
            reading.generator = reader.generator
        return reading

    def _split_stream(self, rows: int) -> tuple[Any, str]:
        """Decide how ranks share a stream."""
        dataset, workers, block = self.loader.dataset, self.loader.num_workers, max(1, rows)
        rank, size = self.group.rank, self.group.size
        if size == 1 and workers <= 1:
            return shard_of(dataset, 0, 1, workers, block=block), "stream read by one reader"
        readers = f"{size} {'rank' if size == 1 else 'ranks'} x {max(1, workers)} readers"
        if self.config.streams_are_sharded or getattr(dataset, "_distributed", None) is not None:
            return shard_of(dataset, 0, 1, workers, block=block), f"stream already split over {size} ranks"
        shards = next((n for a in ("num_shards", "n_shards") if isinstance(n := getattr(dataset, a, None), int)), 0)
        shard = getattr(dataset, "shard", None)
        if callable(shard) and shards:
            if shards >= size:
                part = shard(num_shards=size, index=rank) if size > 1 else dataset
                split = shard_of(part, 0, 1, workers, block=block)
                return split, f"stream of {shards} shards split over {readers}, read once"
            note = f"stream of {shards} shards, too few for {size} ranks, split item by item"
            return shard_of(dataset, rank, size, workers, by_items=True, block=block), note
        return shard_of(dataset, rank, size, workers, block=block), (
            f"stream split over {readers}, by the data set itself if it asks for num_workers, else by items"
        )

    def _foreign(self) -> Reading:
        kind, size = self._kind, self.group.size
        if size > 1 and not self.config.streams_are_sharded:
            raise DataError(
                f"The loader {kind} has an __iter__ of its own",
                f"What it yields cannot be shared out among {size} ranks without reading it",
                "Say dispatch_batches=True, so that rank 0 reads for all, or streams_are_sharded=True, if it yields "
                "only this rank's own samples (DataLoaderConfiguration, accelerator_config of the Trainer); or "
                "prepare a plain DataLoader",
            )
        layout = self._uncounted(drop_last=False)
        note = f"read as {kind} yields it" + (f", by each of {size} ranks its own" if size > 1 else "")
        return StreamReading(StreamSource(self.loader, 0), layout, self.group, note, length=self._length())

    @property
    def _kind(self) -> str:
        """What the user calls the loader."""
        own = self.loader
        return type(own.batches if isinstance(own, ReadyBatches) else own).__name__

    def _length(self) -> Callable[[], int]:
        """Tells this rank's batches; all ranks go on until the longest ends, if it is filled up."""
        loader = self.loader
        if self.group.size == 1 or not self.config.even_batches:
            return lambda: len(loader)
        lengths = self.group.all_gather_object(_length_of(loader))

        def longest() -> int:
            if None in lengths:
                raise TypeError("this loader does not tell how many batches it yields")
            return max(length for length in lengths if length is not None)

        return longest

    def _uncounted(self, *, drop_last: bool) -> Layout:
        """Lay out batches that a loader makes itself: nobody knows how many samples are in one."""
        rows = self.loader.batch_size
        layout = self._layout(None, drop_last=drop_last)
        # What the user said is still what the loader says.
        self.rows = rows
        return layout

    def _dispatched(self, settings: dict[str, Any]) -> Reading:
        layout = self._dispatched_layout()
        feed, failure = None, None
        if self.group.rank == 0:
            try:
                feed = self._feed(settings, layout)
            except Exception as error:
                failure = error
        told = self.group.broadcast_object(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if told is not None:
            raise DataError(f"Rank 0 cannot read the data: {told}", "", "See the traceback of rank 0")
        reading = DispatchReading(feed, layout, self.group, split=self.split)
        _check_not_empty(reading.num_rounds(), self.loader, reading.total_batch_size)
        return reading

    def _dispatched_layout(self) -> Layout:
        drop_last = bool(self.loader.drop_last or getattr(self._batches(), "drop_last", False))
        if self.foreign or (self.iterable and self.loader.batch_size is None):
            if self.split:
                raise DataError(
                    f"split_batches=True and {self._maker()}, which makes its batches itself",
                    "Which part of a batch belongs to which sample is known only before the batch is made",
                    "Use split_batches=False: each rank then gets whole batches in turn, so make them smaller",
                )
            return self._uncounted(drop_last=drop_last)
        rows = self.loader.batch_size or getattr(self._batches(), "batch_size", None)
        if self._is_single() and not self.iterable:
            self.split, rows = False, 1
        return self._layout(rows if isinstance(rows, int) else None, drop_last=drop_last)

    def _maker(self) -> str:
        if self.foreign:
            return f"a loader {self._kind} with an __iter__ of its own"
        return f"a stream {type(self.loader.dataset).__name__} with batch_size=None"

    def _feed(self, settings: dict[str, Any], layout: Layout) -> Feed:
        """Build what rank 0 reads from."""
        if self.foreign:
            return ReadFeed(StreamSource(self.loader, 0), layout, length=_length_of(self.loader))
        if self.iterable:
            shard = shard_of(self.loader.dataset, 0, 1, self.loader.num_workers, block=max(1, layout.rows))
            return ReadFeed(StreamSource(self._reader(settings, shard, layout.rows), layout.rows), layout)
        sharding = self._sharding(SoloGroup())
        if not isinstance(sharding, PlannedSharding):
            return ReadFeed(self._unsized(settings), layout)
        sampler = ShardedBatchSampler(sharding, self._batches(), single=self._is_single())
        own = (
            {"sampler": sampler, "batch_size": None}
            if self.loader.batch_sampler is None
            else {"batch_sampler": sampler}
        )
        reader = DataLoader(**settings, **own, generator=torch.Generator())
        return PlannedFeed(reader, sampler, sharding, self.group.size)

    def _unsized(self, settings: dict[str, Any]) -> StreamSource:
        """Read the batches of a sampler without a length, as it makes them."""
        batches = self._batches()
        if self._is_single():
            return StreamSource(self.loader, 0)
        if self.split:
            batches = SplitBatches(batches, self.group.size)
        own: dict[str, Any] = {"batch_sampler": batches, "collate_fn": self._counting(0)}
        if self.loader.batch_sampler is None:
            # The data set is asked for a whole batch, and returns what nobody can count.
            own = {"sampler": batches, "batch_size": None}
        return StreamSource(DataLoader(**{**settings, **own}, generator=torch.Generator()), 0)


def _iterates_its_own_way(loader: DataLoader[Any]) -> bool:
    # torchdata's loader adds only saving and loading of its position, which the prepared loader does itself.
    own = next(kind for kind in type(loader).__mro__ if "__iter__" in vars(kind))
    return own is not DataLoader and not own.__module__.startswith("torchdata.")


def _length_of(loader: DataLoader[Any]) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _is_on_device(dataset: Any) -> bool:
    return isinstance(dataset, TensorDataset) and any(t.device.type != "cpu" for t in dataset.tensors)


def _remark_large_batch(sharding: Sharding, layout: Layout) -> None:
    """Say once that one global batch takes the whole data set, and more, on several ranks."""
    total, size = sharding.total_batch_size, sharding.size()
    if layout.size == 1 or total is None or size is None or size >= total:
        return
    outcome = "filled up with repeated samples" if layout.padded else "and some ranks get no sample"
    logger.warning(
        "A global batch of %d samples (%d ranks x %d) is larger than the data set of %d: each epoch is one batch, %s",
        total, layout.size, total // layout.size, size, outcome,
    )  # fmt: skip


def _check_not_empty(rounds: int | None, loader: DataLoader[Any], total: int | None) -> None:
    if rounds != 0:
        return
    size = size_of(loader.dataset)
    needed = f"; drop_last=True needs one whole global batch of {total}" if loader.drop_last and size else ""
    raise DataError(
        f"The data set {type(loader.dataset).__name__} with {size} samples makes no batch{needed}",
        "A loop over it would do nothing",
        "Check the data set and the sampler, or make the batch smaller" if size else "Check the data set",
    )
