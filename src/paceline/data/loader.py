"""The loader that `prepare` returns."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, DistributedSampler

from paceline.data.encoding import decode, encode
from paceline.data.epochs import WorkerCopies
from paceline.data.randomness import mix_seed
from paceline.data.reading import Position
from paceline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.collectives import BatchCounts, Group
    from paceline.data.active import ActiveLoaders
    from paceline.data.plan import Layout
    from paceline.data.prefetch import DevicePrefetcher
    from paceline.data.progress import Progress
    from paceline.data.reading import Reading

__all__ = ["PreparedDataLoader"]

_LOG = logging.getLogger(__name__)

STATE_VERSION = 1


@dataclass(slots=True)
class Pass:
    """One iteration over a loader, begun at `start`."""

    start: Position
    progress: Progress
    running: bool = True


class PreparedDataLoader(DataLoader[Any]):
    """A `DataLoader` that yields this rank's batches, on its device, from a position that can be saved.

    The order of an epoch depends on the seed and the number of the epoch only. Passes number epochs: the
    first is epoch 0, each further pass the next, whether the one before went to its end or was broken off.

    What a resume repeats exactly is which samples come, and in which order and batches. Going there takes as
    long near the end of an epoch as at its start, except that a sampler that is not torch's own is run to know
    its order (no data is read), and that a stream without a state is read up to there. Random numbers drawn in
    `__getitem__` (of `torch`, `random` and `numpy`) are repeated, too: workers draw them from a seed of each batch's
    own; without workers they come from the generators of this process, which a checkpoint holds. Not repeated are
    those of a stream's workers, of a loader with workers and without batches, and, without workers, of the one batch
    that is read ahead where batches go to an accelerator or come from a stream.

    Build it with `prepare_loader`.

    Args:
        reading: The way of getting this rank's batches.
        seed: Of the order, the same on all ranks.
        group: The ranks.
        active: Where passes are noted.
        layout: How global batches are dealt out.
        prefetcher: Puts batches on the device; None leaves them where they are.
        batch_size: Rows of this rank's batches, where they are known.
        drop_last: Whether an incomplete global batch is left out.
        settings: Arguments of `DataLoader`.
    """

    def __init__(
        self,
        *,
        reading: Reading,
        seed: int,
        group: Group,
        active: ActiveLoaders,
        layout: Layout,
        prefetcher: DevicePrefetcher | None,
        batch_size: int | None,
        drop_last: bool,
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__(**settings, generator=reading.generator)
        # As in any loader, beside the batch sampler; torch refuses the assignment only to catch mistakes.
        self.__dict__.update(batch_size=batch_size, drop_last=drop_last)
        self._reading = reading
        self._seed = seed
        self._group = group
        self._active = active
        self._layout = layout
        self._copies = WorkerCopies(self.dataset) if self.persistent_workers else None
        self._prefetcher = prefetcher
        self._next = Position()
        self._between: Position | None = None
        self._pass: Pass | None = None
        self._followed: DistributedSampler[Any] | None = None
        self._followed_epoch = 0

    def follow(self, sampler: DistributedSampler[Any]) -> None:
        """Let calls of `sampler.set_epoch` set the epoch of this loader."""
        self._followed, self._followed_epoch = sampler, sampler.epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._obey_followed()
        outer = self._pass
        self._between = None
        current, batches = self._begin()
        with self._active.during(self) as in_use:
            self._pass = current
            progress = current.progress
            in_step = self._group.size == 1 or self._layout.padded or self._layout.drop_last
            try:
                for batch in batches:
                    if in_step:
                        self._active.before_batch()
                    progress.hand_out()
                    self._active.draw(in_use)
                    if self._active.watch is not None:
                        self._active.watch(self, batch)
                    yield batch
                if self._reading.keeps_state:
                    self._between = self._position_in(current)
                if self._pass is current:
                    self._pass = outer if outer is not None and outer.running else None
            finally:
                current.running = False

    def _begin(self) -> tuple[Pass, Iterator[Any]]:
        if self._copies is not None:
            self._copies.check()
        following = Position(self._next.epoch + 1)
        # The end of a stream with a state is reached once more: some go on from there in their next pass.
        done = self._next.ended and not self._reading.keeps_state
        for start in (following,) if done else (self._next, following):
            # What is read again from its beginning must be drawn as it was.
            read = 0 if self._reading.rereads else start.samples
            self._reading.generator.manual_seed(mix_seed(self._seed, start.epoch, self._group.rank, read))
            begun = self._reading.begin(super().__iter__, self._seed, start)
            if begun is not None:
                self._reading.check(start, begun=True)
                self._next = Position(start.epoch + 1)
                batches, progress = begun
                if self._prefetcher is not None:
                    batches = self._prefetcher.iterate(batches)
                return Pass(start, progress), batches
            if not start.batches and not start.samples:
                break
        raise DataError(
            f"Epoch {start.epoch} of the data set {type(self.dataset).__name__} gave no batch",
            "A loop over it would do nothing",
            "Check the data set; with drop_last=True it needs one whole global batch"
            + (f" of {self.total_batch_size} samples" if self.total_batch_size else ""),
        )

    def _obey_followed(self) -> None:
        if self._followed is not None and self._followed.epoch != self._followed_epoch:
            self._followed_epoch = self._followed.epoch
            self.set_epoch(self._followed_epoch)

    def __len__(self) -> int:
        return self._reading.num_batches()

    @property
    def even_batches(self) -> bool:
        """Whether the last global batch is completed, so that all ranks have as many; counts from the next pass."""
        return self._layout.even

    @even_batches.setter
    def even_batches(self, even: bool) -> None:
        self._layout.even = even

    @property
    def fill_batches(self) -> bool:
        """Whether a rank's own last batch is completed where it is short; counts from the next pass.

        Without it a short batch stays short, of the rank's own samples alone, and all ranks still have as many batches:
        one that has no sample left is given a batch to take part with, which `gather_for_metrics` drops whole.
        So nothing has to be cut out of what was collated, whatever its shape.
        """
        return self._layout.fill

    @fill_batches.setter
    def fill_batches(self, fill: bool) -> None:
        self._layout.fill = fill

    @contextmanager
    def dealing(self, *, even: bool, fill: bool) -> Iterator[None]:
        """Deal out the passes that begin inside with `even_batches` and `fill_batches` as given."""
        layout, before = self._layout, (self._layout.even, self._layout.fill)
        layout.even, layout.fill = even, fill
        try:
            yield
        finally:
            layout.even, layout.fill = before

    @property
    def total_batch_size(self) -> int | None:
        """Samples of one global batch; None where it varies."""
        return self._reading.total_batch_size

    @property
    def total_dataset_length(self) -> int | None:
        """Samples of an epoch over all ranks; None where that is not known."""
        return self._reading.size()

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the last batch of the pass is in use.

        For a stream this may wait until the other ranks have read their next batch.
        """
        return self._pass is not None and self._pass.progress.at_end

    @property
    def remaining(self) -> int | None:
        """Batches after the one in use in this pass; None if unknown or if there is no pass."""
        return None if self._pass is None else self._pass.progress.remaining

    @property
    def counts(self) -> BatchCounts:
        """Samples per rank in the batch in use.

        Where ranks end separately (a stream, `even_batches=False`) a rank that goes on puts 0 for the others.

        Raises:
            DataError: No batch is in use.
        """
        if self._pass is None:
            raise DataError(
                "The counts of a batch were asked for outside a pass",
                "They belong to the batch in use",
                "Ask for them inside the loop",
            )
        return self._pass.progress.counts

    @property
    def epoch(self) -> int:
        """The epoch of the last pass begun, if it has not come to its end; else that of the next one."""
        return self._next.epoch if self._pass is None else self._pass.start.epoch

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of `epoch`.

        From its start, unless the next pass goes on within that very epoch after `load_state_dict`.
        """
        if self._pass is not None and not self._pass.running:
            self._pass = None
            self._next = Position(epoch)
        elif epoch != self._next.epoch:
            self._next = Position(epoch)
        if self._between is not None and epoch != self._between.epoch + 1:
            self._between = None

    def begin_at_batch(self, number: int) -> None:
        """Let the next pass begin after `number` of this rank's batches, counted from the start of its epoch.

        Nothing is read for map-style data. Collective: every rank must call it.
        """
        epoch = self._next.epoch + self._next.ended
        self._pass = self._between = None
        self._next = Position(epoch, self._reading.samples_before(self._seed, epoch, number), number)

    def _position(self) -> Position:
        """Return what `state_dict` saves."""
        if self._pass is None:
            return self._between or self._next
        if not self._pass.running and self._active.current is not None:
            # The loop over this loader was left and another is going on: a new pass would begin next.
            return self._next
        return self._position_in(self._pass)

    def _position_in(self, current: Pass) -> Position:
        start, progress = current.start, current.progress
        if not progress.handed:
            return start
        return Position(
            start.epoch,
            progress.samples,
            start.batches + progress.handed,
            ended=progress.ended,
            stream=progress.stream,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position: where the next pass would go on after `load_state_dict`.

        Batches handed out count as used, whatever was read ahead. After a loop that was left with `break` this
        is still the position within that pass, until the next pass begins, or while a loop over another loader
        goes on: a validation loop that stops early begins anew after a resume, as it would have without.

        The values are JSON values and tensors. They are the same on all ranks, except for `stream`: the state
        of a stream that has one, of this rank's readers. Where the end of a stream is not known yet this waits
        until all ranks have read their next batch.

        Raises:
            DataError: The state of the stream holds something that cannot be saved.
        """
        at = self._position()
        state = {
            "version": STATE_VERSION,
            "epoch": at.epoch,
            "samples": at.samples,
            "batches": at.batches,
            "seed": self._seed,
            "ranks": self._group.size,
            "rows": self._reading.rows,
            "micro_batches": self._active.micro_batches(),
            "readers": self._reading.readers,
            "ended": at.ended,
            "size": self._reading.size(),
        }
        if at.stream is not None:
            state["stream"] = encode(at.stream, f"the stream {type(self.dataset).__name__} of a prepared loader")
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass go on at a saved position; a pass that is going on is left alone.

        On another number of ranks the rest of the epoch is seen once, in the same optimizer steps: the global batch
        may be split otherwise over ranks and micro-batches. At the end of an epoch anything may have changed.

        Raises:
            DataError: This is not a position that this release can read, or it lies within an epoch and was
                saved with other steps, or in a stream by other readers.
        """
        missing = [key for key in ("epoch", "samples", "batches", "seed") if key not in state]
        if missing or state.get("version") != STATE_VERSION:
            raise DataError(
                f"A loader's position has version {state.get('version')!r}"
                + (f" and lacks {', '.join(missing)}" if missing else ""),
                f"This release reads version {STATE_VERSION} with epoch, samples, batches and seed",
                "Load a position that state_dict() of a prepared loader returned",
            )
        position = Position(
            int(state["epoch"]),
            int(state["samples"]),
            int(state["batches"]),
            int(state.get("ranks", 0)),
            state.get("rows"),
            int(state.get("readers", 0)),
            bool(state.get("ended", False)),
            decode(state.get("stream")),
            int(state.get("micro_batches", 0)),
        )
        position = self._reading.recount(position, self._active.micro_batches())
        self._reading.check(position)
        then, now = state.get("size"), self._reading.size()
        if position.is_within and None not in (then, now) and then != now:
            _LOG.warning(
                "A loader's position lies within an epoch of %d samples, and the data set has %d now: they come in "
                "another order, so that some of the epoch are seen twice or not at all",
                then, now,
            )  # fmt: skip
        here = (self._group.size, self._reading.rows, self._reading.readers)
        if position.ended and (position.ranks, position.rows, position.readers) != here:
            # Counted in another way, the same place might lie before the end.
            position = Position(position.epoch + 1)
        self._pass = self._between = None
        self._seed = int(state["seed"])
        self._next = position

    def describe(self) -> str:
        """Say in one line how the data is dealt out."""
        return self._reading.describe(self._seed)
