"""The `DataLoader` that `Accelerator.prepare` returns."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, DistributedSampler

from paceline.data.batch_source import Position
from paceline.data.direct_reading import can_read_directly, read_directly
from paceline.data.encoding import decode, encode
from paceline.data.epochs import WorkerCopies
from paceline.data.randomness import mix_seed
from paceline.data.sample_order import maybe_length
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.collectives import BatchCounts, Group
    from paceline.data.active_loaders import ActiveLoaders
    from paceline.data.batch_source import BatchSource
    from paceline.data.epoch_plan import Layout
    from paceline.data.iteration_progress import IterationProgress
    from paceline.data.prefetch import DevicePrefetcher
    from paceline.data.reading_state import ReadingState

__all__ = ["PreparedDataLoader"]

_LOG = logging.getLogger(__name__)

STATE_VERSION = 1
_END: Any = object()


@dataclass(slots=True)
class LoaderIteration:
    """One iteration over a loader, begun at `start`."""

    start: Position
    progress: IterationProgress
    running: bool = True


class PreparedDataLoader(DataLoader[Any]):
    """A `DataLoader` that yields this rank's batches, on its device, from a position that can be saved.

    The order of an epoch depends only on the seed and the number of the epoch. Iterations number epochs: the first is
    epoch 0 and each further one the next, whether the one before reached its end or was broken off.

    A resumed run gets exactly the same samples in the same order and batches. Resuming takes the same time anywhere in
    an epoch, with two exceptions: a sampler that is not torch's own is run to know its order (no data is read), and a
    stream without a state is read up to the position. Random numbers drawn in `__getitem__` (of `torch`, `random` and
    `numpy`) are the same, too: workers are seeded for each batch; without workers they come from the generators of this
    process, which a checkpoint includes. Not the same are those of a stream's workers, of a loader with workers and
    `batch_size=None`, and, without workers, of the one batch that is read ahead for an accelerator or from a stream.

    Build it with `prepare_loader`.

    Args:
        batch_source: Where this rank's batches come from.
        name: The class of the user's loader, for messages.
        seed: The seed of the order, the same on all ranks.
        group: The ranks.
        active: Tracks the iterations.
        layout: How global batches are distributed.
        prefetcher: Copies batches to the device; None leaves them where they are.
        reading: The state of the script's objects that read the data.
        batch_size: Samples in this rank's batches, if known.
        drop_last: Whether an incomplete global batch is dropped.
        settings: Arguments of `DataLoader`.
    """

    def __init__(
        self,
        *,
        batch_source: BatchSource,
        name: str,
        seed: int,
        group: Group,
        active: ActiveLoaders,
        layout: Layout,
        prefetcher: DevicePrefetcher | None,
        reading: ReadingState,
        batch_size: int | None,
        drop_last: bool,
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__(**settings, generator=batch_source.generator)
        # As attributes beside the batch sampler; torch rejects the plain assignment.
        self.__dict__.update(batch_size=batch_size, drop_last=drop_last)
        self._batch_source = batch_source
        self._name = name
        self._seed = seed
        self._group = group
        self._active = active
        self._layout = layout
        self._worker_copies = WorkerCopies(self.dataset) if self.persistent_workers else None
        self._prefetcher = prefetcher
        self._reading = reading
        # Where the next iteration begins; after the end of a stream with a state, also the position of that end.
        self._next = Position()
        self._stream_end: Position | None = None
        self._iteration: LoaderIteration | None = None
        self._num_begun = 0
        self._distributed_sampler: DistributedSampler[Any] | None = None
        self._sampler_epoch = 0
        # Whether no whole epoch has shown yet how many batches there are.
        self._length_unverified = True

    def follow_epoch_of(self, sampler: DistributedSampler[Any]) -> None:
        """Let calls of `sampler.set_epoch` set the epoch of this loader."""
        self._distributed_sampler, self._sampler_epoch = sampler, sampler.epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._iterate()

    def rest_from_batch(self, number: int) -> Iterator[Any]:
        """Yield what comes after the first `number` of this rank's batches of the epoch; nothing if no batch is left.

        Nothing is read of what is skipped in map-style data. Collective: every rank must call it.

        Args:
            number: Batches to skip, counted from the start of the epoch.

        Raises:
            DataError: The batches vary in size, so that the position is unknown until they are read.
        """
        self._take_epoch_of_sampler()
        epoch = self._next.epoch + self._next.ended
        self._iteration = self._stream_end = None
        with self._reading.rehearsal(epoch):
            samples = self._batch_source.samples_before(self._seed, epoch, number)
        self._next = Position(epoch, samples, number)
        return self._iterate(only_rest=True)

    def _iterate(self, *, only_rest: bool = False) -> Iterator[Any]:
        self._take_epoch_of_sampler()
        outer = self._iteration
        self._stream_end = None
        begun = self._begin(only_rest=only_rest)
        if begun is None:
            return
        current, batches = begun
        self._num_begun = number = self._num_begun + 1
        with self._active.during(self) as active_iteration:
            self._iteration = current
            progress = current.progress
            if self._group.size == 1 or self._layout.padded or self._layout.drop_last:
                # All ranks get the same number of batches.
                batches = self._with_points(batches, progress)
            try:
                for batch in batches:
                    progress.advance()
                    self._active.draw(active_iteration)
                    if self._active.watch is not None:
                        self._active.watch(self, batch)
                    yield batch
                    if self._num_begun != number and self._has_lost_workers(progress):
                        break
                self._end(current, outer)
            finally:
                current.running = False

    def _end(self, current: LoaderIteration, outer: LoaderIteration | None) -> None:
        """Note the end of an iteration, which may run within another one."""
        if self._batch_source.has_stream_state:
            self._stream_end = self._position_in(current)
        if self._length_unverified:
            self._verify_length(current)
        if self._iteration is current:
            self._iteration = outer if outer is not None and outer.running else None

    def _has_lost_workers(self, progress: IterationProgress) -> bool:
        """Say whether an iteration has ended, and a later one has its workers.

        Raises:
            DataError: It has not ended: its other batches are lost.
        """
        if not (self.num_workers and self.persistent_workers):
            return False
        if progress.at_end:
            return True
        raise DataError(
            f"An iteration over the {self._name} of {type(self.dataset).__name__} goes on after a later one has begun",
            "There is one set of persistent workers, and the later iteration has taken it: the other batches of this "
            "one would be left out",
            "Set persistent_workers=False, or prepare a loader of its own for each loop that runs at the same time",
        )

    def _with_points(self, batches: Iterator[Any], progress: IterationProgress) -> Iterator[Any]:
        """Yield the batches, and pass a point at which a signal may stop the run before each of them.

        Before it is read, because what is read in this process draws from generators that are saved at that point. A
        stream draws from isolated ones, and may have to be read to know whether there is a batch.
        """
        if not self._batch_source.rereads:
            while not progress.at_end:
                if self._active.before_batch is not None:
                    self._active.before_batch(self)
                batch = next(batches, _END)
                if batch is _END:
                    return
                yield batch
                # Not kept while the next one is read.
                del batch
        for batch in batches:
            if self._active.before_batch is not None:
                self._active.before_batch(self)
            yield batch
            del batch

    def _begin(self, *, only_rest: bool) -> tuple[LoaderIteration, Iterator[Any]] | None:
        """Begin an iteration at the position, or the next epoch if nothing is left of this one.

        With `only_rest` return None in place of the next epoch.
        """
        if self._worker_copies is not None:
            self._worker_copies.check()
        following = Position(self._next.epoch + 1)
        # The end of a stream with a state is reached again: some streams continue from there in the next iteration.
        skips_ended = self._next.ended and not self._batch_source.has_stream_state
        for start in (following,) if skips_ended else (self._next, following):
            # What is read again from the beginning of the epoch must draw the same random numbers.
            samples = 0 if self._batch_source.rereads else start.samples
            self._batch_source.generator.manual_seed(mix_seed(self._seed, start.epoch, self._group.rank, samples))
            self._reading.begin(start.epoch)
            begun = self._batch_source.begin(self._read, self._seed, start)
            # Also where nothing is left: counted in other batches, something may be.
            self._batch_source.check(start, begun=True)
            if begun is not None:
                self._next = Position(start.epoch + 1)
                batches, progress = begun
                if self._prefetcher is not None:
                    batches = self._prefetcher.iterate(batches)
                return LoaderIteration(start, progress), batches
            if only_rest:
                self._next = Position(start.epoch + 1)
                return None
            if not start.batches and not start.samples:
                break
        raise self._no_batch_error(start.epoch)

    def _no_batch_error(self, epoch: int) -> DataError:
        return DataError(
            f"Epoch {epoch} of the data set {type(self.dataset).__name__} has no batch",
            "A loop over it would do nothing",
            "Check the data set; with drop_last=True it needs one whole global batch"
            + (f" of {self.total_batch_size} samples" if self.total_batch_size else ""),
        )

    def _read(self) -> Iterator[Any]:
        return read_directly(self) if can_read_directly(self) else super().__iter__()

    def _take_epoch_of_sampler(self) -> None:
        sampler = self._distributed_sampler
        if sampler is not None and sampler.epoch != self._sampler_epoch:
            self._sampler_epoch = sampler.epoch
            self.set_epoch(self._sampler_epoch)

    def _verify_length(self, iteration: LoaderIteration) -> None:
        """Warn once, after the first whole epoch, if it had another number of batches than `len` says."""
        start, progress = iteration.start, iteration.progress
        expected = maybe_length(self)
        if start.samples or start.batches:
            return
        self._length_unverified = False
        # Rank 0 has a part of every global batch.
        if expected is None or expected == progress.num_yielded or self._group.rank:
            return
        if self._batch_source.may_differ_from_length(progress.samples):
            return
        _LOG.warning(
            "len() of the prepared %s over %s is %d batches, but its first whole epoch had %d: the __len__ of its "
            "sampler, batch sampler or data set is wrong. Schedules and max_steps that are computed from len(loader) "
            "are wrong, too; correct __len__, or remove it and set the number of steps",
            self._name, type(self.dataset).__name__, expected, progress.num_yielded,
        )  # fmt: skip

    def __len__(self) -> int:
        return self._batch_source.num_batches()

    @property
    def even_batches(self) -> bool:
        """Whether the last global batch is padded, so that all ranks have the same number of batches.

        A new value takes effect in the next iteration.
        """
        return self._layout.even

    @even_batches.setter
    def even_batches(self, even: bool) -> None:
        self._layout.even = even

    @property
    def fill_batches(self) -> bool:
        """Whether a rank's last batch is padded if it is short. A new value takes effect in the next iteration.

        If False, a short batch contains only the rank's own samples, and all ranks still have the same number of
        batches: a rank without a sample gets a batch of padding, which `gather_for_metrics` drops as a whole. So
        nothing has to be cut out of collated batches, whatever their shape.
        """
        return self._layout.fill

    @fill_batches.setter
    def fill_batches(self, fill: bool) -> None:
        self._layout.fill = fill

    @contextmanager
    def dealing(self, *, even: bool, fill: bool) -> Iterator[None]:
        """Set `even_batches` and `fill_batches` for the iterations that begin in the body."""
        layout, before = self._layout, (self._layout.even, self._layout.fill)
        layout.even, layout.fill = even, fill
        try:
            yield
        finally:
            layout.even, layout.fill = before

    @property
    def total_batch_size(self) -> int | None:
        """Samples in one global batch; None if it varies."""
        return self._batch_source.total_batch_size

    @property
    def total_dataset_length(self) -> int | None:
        """Samples in an epoch over all ranks; None if unknown."""
        return self._batch_source.size()

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the current batch is the last one of the iteration.

        For a stream this may wait until the other ranks have read their next batch.
        """
        return self._iteration is not None and self._iteration.progress.at_end

    @property
    def remaining(self) -> int | None:
        """Batches after the current one; None if unknown, or outside of an iteration."""
        return None if self._iteration is None else self._iteration.progress.remaining

    @property
    def counts(self) -> BatchCounts:
        """Samples per rank in the current batch.

        If ranks end separately (a stream with `even_batches=False`), ranks that have ended count 0.

        Raises:
            DataError: There is no current batch.
        """
        if self._iteration is None:
            raise DataError(
                "`counts` was read outside of a loop over the loader",
                "It describes the current batch",
                "Read it inside the loop",
            )
        return self._iteration.progress.counts

    @property
    def epoch(self) -> int:
        """The epoch of the last iteration, if it has not reached its end; else that of the next one."""
        return self._next.epoch if self._iteration is None else self._iteration.start.epoch

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of `epoch`, from its start.

        After `load_state_dict` with a position within that very epoch, the iteration still begins at the position.

        Args:
            epoch: The number of the epoch, from 0.
        """
        if self._iteration is not None and not self._iteration.running:
            self._iteration = None
            self._next = Position(epoch)
        elif epoch != self._next.epoch:
            self._next = Position(epoch)
        if self._stream_end is not None and epoch != self._stream_end.epoch + 1:
            self._stream_end = None

    def _position(self) -> Position:
        """Return what `state_dict` saves."""
        if self._iteration is None:
            return self._stream_end or self._next
        if not self._iteration.running and self._active.current is not None:
            # The loop over this loader was left and another loop is running: a new iteration would begin next.
            return self._next
        if self._iteration.running and self._active.ends_with_another(self):
            # What is zipped with a shorter loader is left where that one ends.
            return self._next
        return self._position_in(self._iteration)

    def _position_in(self, current: LoaderIteration) -> Position:
        start, progress = current.start, current.progress
        if not progress.num_yielded:
            return start
        return Position(
            start.epoch,
            progress.samples,
            start.batches + progress.num_yielded,
            ended=progress.ended,
            stream=progress.stream,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position, where the next iteration would continue after `load_state_dict`.

        Batches that were yielded count as used, whatever was read ahead. After a loop that was left with `break` this
        is the position within that iteration, until the next one begins or while a loop over another loader runs: a
        validation loop that stops early starts again after a resume, as it would have without one.

        If the end of a stream is not known yet, this waits until all ranks have read their next batch.

        Returns:
            JSON values and tensors. They are the same on all ranks, except for `stream`, the state of this rank's
            readers of a stream, and `objects`, what has changed in the script's objects that read the data.

        Raises:
            DataError: The state of the stream contains something that cannot be saved.
        """
        position = self._position()
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "epoch": position.epoch,
            "samples": position.samples,
            "batches": position.batches,
            "seed": self._seed,
            "ranks": self._group.size,
            "rows": self._batch_source.batch_size,
            "micro_batches": self._active.micro_batches(),
            "readers": self._batch_source.readers,
            "ended": position.ended,
            "size": self._batch_source.size(),
        }
        begun = self._iteration is not None and not position.ended and position.epoch == self._iteration.start.epoch
        if objects := self._reading.state_dict(within=begun):
            state["objects"] = objects
        if position.stream is not None:
            state["stream"] = encode(position.stream, f"the stream {type(self.dataset).__name__} of a prepared loader")
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration continue at a saved position; a running iteration is not affected.

        With another number of ranks the rest of the epoch is read once, in the same optimizer steps: a global batch may
        be split differently over ranks and micro-batches. At the end of an epoch anything may change.

        Args:
            state: What `state_dict` returned.

        Raises:
            DataError: This release cannot read the position, or it lies within an epoch and was saved with other
                optimizer steps, or in a stream with other readers.
        """
        missing = [key for key in ("epoch", "samples", "batches", "seed") if key not in state]
        if missing or state.get("version") != STATE_VERSION:
            raise DataError(
                f"A loader's position has version {state.get('version')!r}"
                + (f" and lacks {', '.join(missing)}" if missing else ""),
                f"This release reads version {STATE_VERSION} with epoch, samples, batches and seed",
                "Load what state_dict() of a prepared loader returned",
            )
        position = Position(
            epoch=int(state["epoch"]),
            samples=int(state["samples"]),
            batches=int(state["batches"]),
            ranks=int(state.get("ranks", 0)),
            batch_size=state.get("rows"),
            readers=int(state.get("readers", 0)),
            ended=bool(state.get("ended", False)),
            stream=decode(state.get("stream")),
            micro_batches=int(state.get("micro_batches", 0)),
        )
        position = self._batch_source.recount(position, self._active.micro_batches())
        self._batch_source.check(position)
        saved_size, size = state.get("size"), self._batch_source.size()
        if position.is_within and None not in (saved_size, size) and saved_size != size:
            _LOG.warning(
                "A loader's position lies within an epoch of %d samples, but the data set has %d now: the order "
                "changes, and some samples of the epoch are read twice or not at all",
                saved_size, size,
            )  # fmt: skip
        layout = (self._group.size, self._batch_source.batch_size, self._batch_source.readers)
        if position.ended and (position.ranks, position.batch_size, position.readers) != layout:
            # With another layout the same position might not be the end.
            position = Position(position.epoch + 1)
        self._iteration = self._stream_end = None
        self._reading.load_state_dict(state.get("objects") or {}, f"the loader over {type(self.dataset).__name__}")
        self._seed = int(state["seed"])
        self._next = position

    def describe(self) -> str:
        """Describe in one line how the data is distributed, and how it reaches the device."""
        text = self._batch_source.describe(self._seed)
        return text if self._prefetcher is None else f"{text}; {self._prefetcher.describe()}"
