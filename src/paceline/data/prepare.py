"""Builds a prepared loader from the user's own: decides how its data is read and distributed over the ranks."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, TensorDataset

from paceline.collectives import Group, SoloGroup
from paceline.data.batch_source import BatchSource, MapBatchSource
from paceline.data.counting import CountingCollate
from paceline.data.dispatch import (
    DispatchBatchSource,
    GlobalBatches,
    MapGlobalBatches,
    NonEmptyBatches,
    SplitBatches,
    StreamGlobalBatches,
)
from paceline.data.epoch_plan import Layout
from paceline.data.epochs import has_set_epoch
from paceline.data.iterable_loader import IterableLoader, as_loader
from paceline.data.loader import PreparedDataLoader
from paceline.data.prefetch import DevicePrefetcher
from paceline.data.reading_state import ReadingState, SeededCollate
from paceline.data.sample_order import maybe_length, order_source, sampler_generators
from paceline.data.sharding import (
    BatchSharding,
    MergedRanksSharding,
    PlannedSharding,
    SampleSharding,
    ShardedBatchSampler,
    Sharding,
    UnsizedSharding,
    split_batch_size,
)
from paceline.data.skipping import SkippedDataLoader
from paceline.data.stateful import Stateful, check_not_restored, is_torchdata_loader, shard_of, torchdata_loader
from paceline.data.stream import StreamBatchSource, StreamReader
from paceline.environment.object_state import OwnGenerators
from paceline.errors import DataError, counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.config import DataLoaderConfiguration
    from paceline.data.active_loaders import ActiveLoaders

__all__ = ["prepare_loader"]

logger = logging.getLogger(__name__)


def prepare_loader(
    loader: Any,
    *,
    group: Group,
    device: torch.device | None,
    config: DataLoaderConfiguration,
    active: ActiveLoaders,
    num_merged_ranks: int = 1,
) -> PreparedDataLoader:
    """Return a loader that yields this rank's part of what `loader` yields.

    A map-style data set is distributed by its indices. An iterable one is split between the workers of all ranks and
    read once; rank 0 reads for all ranks only with `dispatch_batches=True` (Accelerate's default for iterable data
    sets). A prepared loader is returned as it is. Collective: every rank must call it.

    Args:
        loader: The user's loader. A subclass of `DataLoader` with its own `__iter__`, and any other iterable of
            batches, is iterated as it is: by a single rank, by rank 0 with `dispatch_batches=True`, or by each rank for
            itself with `streams_are_sharded=True`.
        group: The ranks that share the data.
        device: Where batches are copied to; None leaves them where the loader puts them.
        config: The data loader settings.
        active: Tracks the iterations over the loader.
        num_merged_ranks: The number of ranks whose batches this process gets as one; more than 1 only in a group of one
            rank.

    Returns:
        A `DataLoader` with a position that can be saved.

    Raises:
        DataError: The loader cannot be shared between the ranks, or it yields nothing.
    """
    if isinstance(loader, PreparedDataLoader):
        return loader
    if isinstance(loader, SkippedDataLoader):
        raise DataError(
            "A loader returned by skip_first_batches was passed to prepare",
            "prepare decides which batches a rank gets, so there was nothing to skip yet",
            "Prepare the loader first, then skip its first batches",
        )
    return _LoaderBuilder(as_loader(loader), group, device, config, num_merged_ranks).build(active)


class _LoaderBuilder:
    """Builds the prepared loader for one loader of the user; see `prepare_loader`."""

    def __init__(
        self,
        loader: DataLoader[Any],
        group: Group,
        device: torch.device | None,
        config: DataLoaderConfiguration,
        num_merged_ranks: int,
    ) -> None:
        self.loader = loader
        self.num_merged_ranks = num_merged_ranks
        # The number of ranks that share a global batch.
        self.num_ranks = group.size * num_merged_ranks
        self.group = group
        self.device = device
        self.config = config
        self.split = config.split_batches
        self.has_custom_iter = _has_custom_iter(loader)
        self.iterable = isinstance(loader.dataset, IterableDataset)
        self.batch_size: int | None = None
        self.layout: Layout

    def build(self, active: ActiveLoaders) -> PreparedDataLoader:
        check_not_restored(self.loader)
        if self.config.use_stateful_dataloader:
            torchdata_loader()
        seed = self._seed()
        settings = self._settings()
        batch_source, sampling = self._batch_source(settings)
        prepared = PreparedDataLoader(
            batch_source=batch_source,
            name=self._name,
            seed=seed,
            group=self.group,
            active=active,
            layout=self.layout,
            prefetcher=self._prefetcher(),
            reading=self._reading_state(),
            batch_size=self.batch_size,
            drop_last=bool(self.loader.drop_last),
            settings={**settings, **sampling},
        )
        sampler = self.loader.sampler
        if isinstance(sampler, DistributedSampler):
            prepared.follow_epoch_of(sampler)
        return prepared

    def _seed(self) -> int:
        """Return the seed of the order, chosen by rank 0."""
        generators = [g for g in (self.loader.generator, *sampler_generators(self._batches())) if g is not None]
        if self.config.data_seed is not None:
            seed = self.config.data_seed
        elif isinstance(self.loader.sampler, DistributedSampler):
            seed = self.loader.sampler.seed
        elif self.config.use_seedable_sampler:
            seed = generators[0].initial_seed() if generators else torch.initial_seed()
        else:
            generator = generators[0] if generators else None
            seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
        return self.group.broadcast_object(int(seed))

    def _settings(self) -> dict[str, Any]:
        """Return the `DataLoader` arguments that do not depend on how the data is read."""
        loader = self.loader
        pin = loader.pin_memory
        if self.device is not None and self.device.type not in ("cpu", "mps") and loader.num_workers:
            # torch pins what workers send in a separate thread; without workers the prefetcher pins large batches.
            # Tensors on a device cannot be pinned.
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
        """Whether workers persist between iterations; not if nothing could set the epoch of their copies."""
        loader = self.loader
        if not loader.persistent_workers or not has_set_epoch(loader.dataset):
            return bool(loader.persistent_workers)
        name = type(loader.dataset).__name__
        if self.has_custom_iter:
            raise DataError(
                f"The loader {self._name} has its own __iter__ and persistent workers, and its data set {name} has a "
                "method set_epoch",
                "The copies of the data set in the workers do not learn which epoch it is",
                "Set persistent_workers=False",
            )
        if self._reads_single_samples() and not self.iterable:
            self._warn(
                "The workers that read single samples of the data set %s are restarted in each epoch: it has a method "
                "set_epoch, which cannot be called in persistent workers. persistent_workers=False does the same", name,
            )  # fmt: skip
            return False
        return True

    def _reading_state(self) -> ReadingState:
        """Return what saves the state of the script's own objects that read the data."""
        loader, batches = self.loader, self._batches()
        if isinstance(loader, IterableLoader):
            return ReadingState({"loader": loader.batches}, {}, without=_with_state(loader.batches))
        if self.has_custom_iter:
            return ReadingState({"loader": loader}, {}, without=_with_state(loader))
        readers = {"dataset": loader.dataset, "collate_fn": loader.collate_fn}
        if self.iterable:
            return ReadingState(readers, {}, without=_with_state(loader.dataset))
        # The `generator` attributes of samplers are set by what runs them.
        without = sampler_generators(batches)
        if loader.num_workers:
            return ReadingState({"sampler": batches}, {}, [*without, loader.dataset])
        if self.config.dispatch_batches and self.group.size > 1:
            return ReadingState({"sampler": batches}, {}, [*without, loader.dataset], ahead=readers)
        return ReadingState({"sampler": batches}, readers, without)

    def _warn_if_batch_exceeds_dataset(self, sharding: Sharding) -> None:
        total, size, num_ranks = sharding.total_batch_size, sharding.size(), self.layout.num_ranks
        if num_ranks == 1 or total is None or size is None or size >= total:
            return
        outcome = "padded with repeated samples" if self.layout.padded else "and some ranks get no sample"
        self._warn(
            "A global batch of %d samples (%d ranks x %d) is larger than the data set of %d: each epoch is one batch, "
            "%s", total, num_ranks, total // num_ranks, size, outcome,
        )  # fmt: skip

    def _warn(self, message: str, *values: object) -> None:
        """Log a warning, once for the ranks that share the data."""
        if self.group.rank == 0:
            logger.warning(message, *values)

    def _prefetcher(self) -> DevicePrefetcher | None:
        if self.device is None or self.device.type == "cpu":
            return None
        return DevicePrefetcher(self.device, non_blocking=self.config.non_blocking is not False)

    def _batch_source(self, settings: dict[str, Any]) -> tuple[BatchSource, dict[str, Any]]:
        """Choose how batches are read; also return the remaining arguments of the prepared `DataLoader`."""
        if self.num_merged_ranks > 1:
            self._check_mergeable()
        if self.config.dispatch_batches and self.group.size > 1:
            return self._dispatch_source(settings), self._users_sampling()
        if self.has_custom_iter:
            return self._custom_source(), self._users_sampling()
        if self.iterable:
            return self._stream_source(settings), self._users_sampling()
        return self._map_source(settings)

    def _users_sampling(self) -> dict[str, Any]:
        """Return the user's samplers as `DataLoader` arguments, for a loader that does not use them itself."""
        if self.iterable:
            return {"batch_size": None}
        if self.loader.batch_sampler is None:
            return {"batch_size": None, "sampler": self.loader.sampler}
        return {"batch_sampler": self.loader.batch_sampler}

    def _map_source(self, settings: dict[str, Any]) -> tuple[BatchSource, dict[str, Any]]:
        if settings["num_workers"] and OwnGenerators({"collate_fn": self.loader.collate_fn}):
            settings["collate_fn"] = SeededCollate(self.loader.collate_fn)
        sharding = self._sharding(self.group)
        if self.num_merged_ranks > 1 and isinstance(sharding, PlannedSharding) and not self._reads_single_samples():
            sharding = MergedRanksSharding(sharding, self.layout, self.group)
        sampler = ShardedBatchSampler(sharding, self._batches(), single=self._reads_single_samples())
        _check_not_empty(sharding.num_global_batches(), self.loader, sharding.total_batch_size)
        self._warn_if_batch_exceeds_dataset(sharding)
        batch_source = MapBatchSource(
            sampler,
            self.loader.dataset,
            self.group,
            workers=settings["num_workers"],
            persistent=settings["persistent_workers"],
        )
        return batch_source, self._sampling_with(sampler)

    def _sampling_with(self, sampler: Any) -> dict[str, Any]:
        """Return `sampler` as `DataLoader` arguments, in the role that the user's sampler has."""
        if self.loader.batch_sampler is None:
            return {"batch_size": None, "sampler": sampler}
        return {"batch_sampler": sampler}

    def _check_mergeable(self) -> None:
        """Raise if one process cannot get the batches of several ranks as one: it would train on other samples."""
        seen, hint = "", "Check the script with a plain DataLoader"
        if self.iterable and self.loader.num_workers > 1:
            seen = f"A stream is read by {self.loader.num_workers} workers"
            hint = "Set num_workers to 0 or 1 for this check: it compares samples and losses, not the speed"
        elif self.iterable and self.loader.batch_size is None:
            seen = f"The stream {type(self.loader.dataset).__name__} makes its batches itself (batch_size=None)"
            hint = "Give the loader a batch_size for this check"
        elif self.has_custom_iter:
            seen = f"The loader {self._name} has its own __iter__"
        elif not self.iterable and maybe_length(self._batches()) is None:
            seen, hint = f"{type(self._batches()).__name__} has no length", "Give it a __len__ for this check"
        if seen:
            why = f"One process cannot get as one batch what {self.num_merged_ranks} ranks get from it in turns"
            raise DataError(seen, why, hint)

    def _batches(self) -> Any:
        """Return what yields the keys: the batch sampler, or the sampler if there is none."""
        return self.loader.sampler if self.loader.batch_sampler is None else self.loader.batch_sampler

    def _reads_single_samples(self) -> bool:
        """Say whether the data set is read one key at a time."""
        return self.loader.batch_sampler is None and not isinstance(self.loader.sampler, BatchSampler)

    def _set_layout(self, batch_size: int | None, *, drop_last: bool) -> Layout:
        if batch_size and self.split:
            batch_size = split_batch_size(batch_size, self.num_ranks)
        self.batch_size = batch_size * self.num_merged_ranks if batch_size else None
        self.layout = Layout(
            batch_size=batch_size or 0, num_ranks=self.num_ranks, even=self.config.even_batches, drop_last=drop_last
        )
        return self.layout

    def _sharding(self, group: Group) -> Sharding:
        """Return how keys are distributed.

        Args:
            group: The ranks that run samplers together: this rank only, if rank 0 reads for all.
        """
        batches = self._batches()
        if self._reads_single_samples():
            self.split = False
            layout = self._set_layout(1, drop_last=False)
            self.batch_size = None
            if maybe_length(batches) is not None:
                return SampleSharding(order_source(batches, group), layout, group)
            return UnsizedSharding(BatchSampler(batches, 1, False), layout, group, split=False)
        drop_last = bool(getattr(batches, "drop_last", False))
        batch_size = getattr(batches, "batch_size", None)
        layout = self._set_layout(batch_size if isinstance(batch_size, int) else None, drop_last=drop_last)
        is_torchs_own = isinstance(batches, BatchSampler) and type(batches).__iter__ is BatchSampler.__iter__
        if is_torchs_own and maybe_length(batches.sampler) is not None:
            return SampleSharding(order_source(batches.sampler, group), layout, group)
        if maybe_length(batches) is not None:
            return BatchSharding(batches, layout, group, split=self.split)
        return UnsizedSharding(batches, layout, group, split=self.split)

    def _stream_source(self, settings: dict[str, Any]) -> BatchSource:
        layout = self._set_layout(self.loader.batch_size, drop_last=self.loader.drop_last)
        if self.num_merged_ranks > 1:
            # What several readers would take in turns, one takes in a row.
            layout = self.layout = replace(layout, batch_size=self.batch_size or 0, num_ranks=1)
        dataset, note = self._split_stream(layout.batch_size)
        reader = self._reader(settings, dataset, layout.batch_size)
        batch_source = StreamBatchSource(StreamReader(reader, layout.batch_size), layout, self.group, note)
        if reader is not self.loader:
            # The prepared loader seeds the workers of this reader.
            batch_source.generator = reader.generator
        return batch_source

    def _reader(self, settings: dict[str, Any], dataset: Any, batch_size: int) -> DataLoader[Any]:
        """Build what reads a stream; it counts the samples of its batches unless the data set makes them itself."""
        arguments = {
            **settings, "dataset": dataset, "batch_size": batch_size or None, "generator": torch.Generator()
        }  # fmt: skip
        if batch_size:
            arguments["drop_last"] = self.loader.drop_last
            arguments["collate_fn"] = self._counting_collate(batch_size)
        if is_torchdata_loader(self.loader) or self.config.use_stateful_dataloader:
            arguments["snapshot_every_n_steps"] = getattr(self.loader, "snapshot_every_n_steps", 1)
            return torchdata_loader()(**arguments)
        return DataLoader(**arguments)

    def _counting_collate(self, batch_size: int) -> CountingCollate:
        return CountingCollate(self.loader.collate_fn, batch_size, shared=self.loader.num_workers > 0)

    def _split_stream(self, batch_size: int) -> tuple[Any, str]:
        """Decide how ranks share a stream; return this rank's part and a description."""
        dataset, workers, block = self.loader.dataset, self.loader.num_workers, max(1, batch_size)
        rank, size = self.group.rank, self.group.size
        if size == 1 and workers <= 1:
            return shard_of(dataset, 0, 1, workers, block=block), "stream read by one reader"
        readers = f"{counted(size, 'rank')} x {max(1, workers)} readers"
        if self.config.streams_are_sharded or getattr(dataset, "_distributed", None) is not None:
            return shard_of(dataset, 0, 1, workers, block=block), f"stream already split over {size} ranks"
        shard, num_shards = getattr(dataset, "shard", None), _num_shards(dataset)
        if callable(shard) and num_shards >= size:
            part = shard(num_shards=size, index=rank) if size > 1 else dataset
            note = f"stream of {num_shards} shards split over {readers}, read once"
            return shard_of(part, 0, 1, workers, block=block), note
        if callable(shard) and num_shards:
            note = f"stream of {num_shards} shards, too few for {size} ranks, split item by item"
            return shard_of(dataset, rank, size, workers, by_items=True, block=block), note
        return shard_of(dataset, rank, size, workers, block=block), (
            f"stream split over {readers}, by the data set itself if it reads num_workers, else by items"
        )

    def _custom_source(self) -> BatchSource:
        """Iterate over a loader with its own `__iter__` as it is."""
        name, size = self._name, self.group.size
        if size > 1 and not self.config.streams_are_sharded:
            raise DataError(
                f"The loader {name} has its own __iter__",
                f"What it yields cannot be shared between {size} ranks without reading it",
                "Set dispatch_batches=True, so that rank 0 reads for all ranks, or streams_are_sharded=True, if it "
                "yields only this rank's samples (DataLoaderConfiguration, accelerator_config of the Trainer); or "
                "prepare a plain DataLoader",
            )
        layout = self._uncounted_layout(drop_last=False)
        note = f"read as {name} yields it" + (f", by each of {size} ranks its own part" if size > 1 else "")
        return StreamBatchSource(StreamReader(self.loader, 0), layout, self.group, note, length=self._length())

    @property
    def _name(self) -> str:
        """The class of what the user passed as a loader."""
        loader = self.loader
        return type(loader.batches if isinstance(loader, IterableLoader) else loader).__name__

    def _length(self) -> Callable[[], int]:
        """Return a function for the number of this rank's batches; with padding it is that of the longest rank."""
        loader = self.loader
        if self.group.size == 1 or not self.config.even_batches:
            return lambda: len(loader)
        lengths = self.group.all_gather_object(maybe_length(loader))

        def longest() -> int:
            known = [length for length in lengths if length is not None]
            if len(known) < len(lengths):
                raise TypeError("this loader has no length: the number of its batches is unknown")
            return max(known)

        return longest

    def _uncounted_layout(self, *, drop_last: bool) -> Layout:
        """Set the layout of batches that a loader makes itself, whose samples cannot be counted."""
        layout = self._set_layout(None, drop_last=drop_last)
        # The prepared loader still has the user's `batch_size`.
        self.batch_size = self.loader.batch_size
        return layout

    def _dispatch_source(self, settings: dict[str, Any]) -> BatchSource:
        layout = self._dispatched_layout()
        global_batches, failure = None, None
        if self.group.rank == 0:
            try:
                global_batches = self._global_batches(settings, layout)
            except Exception as error:
                failure = error
        reason = self.group.broadcast_object(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if reason is not None:
            raise DataError(f"Rank 0 cannot read the data: {reason}", "", "See the traceback of rank 0")
        batch_source = DispatchBatchSource(global_batches, layout, self.group, split=self.split)
        _check_not_empty(batch_source.num_global_batches(), self.loader, batch_source.total_batch_size)
        return batch_source

    def _dispatched_layout(self) -> Layout:
        drop_last = bool(self.loader.drop_last or getattr(self._batches(), "drop_last", False))
        if self.has_custom_iter or (self.iterable and self.loader.batch_size is None):
            if self.split:
                what = f"the stream {type(self.loader.dataset).__name__} with batch_size=None"
                if self.has_custom_iter:
                    what = f"the loader {self._name} with its own __iter__"
                raise DataError(
                    f"split_batches=True was set for {what}, which makes its batches itself",
                    "Which part of a batch belongs to which sample is known only before the batch is made",
                    "Use split_batches=False, which gives each rank whole batches in turn, with smaller batches",
                )
            return self._uncounted_layout(drop_last=drop_last)
        batch_size = self.loader.batch_size or getattr(self._batches(), "batch_size", None)
        if self._reads_single_samples() and not self.iterable:
            self.split, batch_size = False, 1
        return self._set_layout(batch_size if isinstance(batch_size, int) else None, drop_last=drop_last)

    def _global_batches(self, settings: dict[str, Any], layout: Layout) -> GlobalBatches:
        """Build what rank 0 reads for all ranks."""
        if self.has_custom_iter:
            return StreamGlobalBatches(StreamReader(self.loader, 0), layout, length=maybe_length(self.loader))
        if self.iterable:
            batch_size = layout.batch_size
            shard = shard_of(self.loader.dataset, 0, 1, self.loader.num_workers, block=max(1, batch_size))
            stream = StreamReader(self._reader(settings, shard, batch_size), batch_size)
            size = maybe_length(self.loader.dataset)
            if size is None or not batch_size:
                # The length of what yields whole batches may count either those or samples.
                return StreamGlobalBatches(stream, layout)
            length = size // batch_size if layout.drop_last else -(-size // batch_size)
            return StreamGlobalBatches(stream, layout, length=length, size=size)
        sharding = self._sharding(SoloGroup())
        if not isinstance(sharding, PlannedSharding):
            return StreamGlobalBatches(self._unsized_reader(settings), layout, sampler=self._batches())
        sampler = ShardedBatchSampler(sharding, self._batches(), single=self._reads_single_samples())
        reader = DataLoader(**settings, **self._sampling_with(sampler), generator=torch.Generator())
        return MapGlobalBatches(reader, sampler, sharding, self.group.size)

    def _unsized_reader(self, settings: dict[str, Any]) -> StreamReader:
        """Read the batches of a sampler without a length, as the sampler makes them."""
        batches = self._batches()
        if self._reads_single_samples():
            return StreamReader(self.loader, 0)
        if self.loader.batch_sampler is not None:
            batches = NonEmptyBatches(batches)
        if self.split:
            batches = SplitBatches(batches, self.group.size)
        arguments = {**settings, **self._sampling_with(batches)}
        if self.loader.batch_sampler is not None:
            # Without a batch sampler the data set itself returns whole batches, whose samples cannot be counted.
            arguments["collate_fn"] = self._counting_collate(0)
        return StreamReader(DataLoader(**arguments, generator=torch.Generator()), 0)


def _has_custom_iter(loader: DataLoader[Any]) -> bool:
    # torchdata's loader only adds saving and loading of its position, which the prepared loader does itself.
    definer = next(kind for kind in type(loader).__mro__ if "__iter__" in vars(kind))
    return definer is not DataLoader and not definer.__module__.startswith("torchdata.")


def _with_state(stream: Any) -> list[Any]:
    """Return the stream, if it has a state, which is saved for each batch."""
    return [stream] if isinstance(stream, Stateful) else []


def _num_shards(dataset: Any) -> int:
    """Return the number of shards of a stream, 0 if it has none."""
    numbers = (getattr(dataset, name, None) for name in ("num_shards", "n_shards"))
    return next((number for number in numbers if isinstance(number, int)), 0)


def _is_on_device(dataset: Any) -> bool:
    return isinstance(dataset, TensorDataset) and any(t.device.type != "cpu" for t in dataset.tensors)


def _check_not_empty(num_global_batches: int | None, loader: DataLoader[Any], total: int | None) -> None:
    if num_global_batches != 0:
        return
    size = maybe_length(loader.dataset)
    needed = f"; drop_last=True needs one whole global batch of {total}" if loader.drop_last and size else ""
    raise DataError(
        f"The data set {type(loader.dataset).__name__} with {size} samples makes no batch{needed}",
        "A loop over it would do nothing",
        "Check the data set and the sampler, or make the batch smaller" if size else "Check the data set",
    )
