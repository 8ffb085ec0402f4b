"""Accelerate's data loaders: the same samples, in the same order, drawing the same random numbers.

A prepared loader holds a loader of torch (or torchdata) made with this rank's share of the samples, and passes for one
in `isinstance`. It reads one batch ahead, so that it knows the last one while that is in use, and reports where it
stands to the `GradientState`.

Some results differ from Accelerate 1.15, where its own are wrong:

- `skip_first_batches` keeps all settings of the loader, counts batches of all ranks for a dispatcher too, and
  `gather_for_metrics` leaves out filler samples after it;
- `set_epoch` reaches the sampler through any number of wrappers, and the data set as well;
- a batch sampler with uneven batches in the middle loses none of them;
- a dispatcher gives every rank samples, however few there are, and no batch where `drop_last` leaves none;
- an error on rank 0 while it reads for the others is raised on all ranks.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from paceline.compat.accelerate.state import GradientState, PartialState
from paceline.compat.accelerate.utils.dataclasses import DistributedType, RNGType
from paceline.compat.accelerate.utils.operations import (
    broadcast,
    broadcast_object_list,
    concatenate,
    find_batch_size,
    get_data_structure,
    initialize_tensors,
    send_to_device,
    slice_tensors,
)
from paceline.compat.accelerate.utils.random import synchronize_rng_states
from paceline.compat.samplers import (
    BatchSamplerShard,
    IterableDatasetShard,
    SeedableRandomSampler,
    SkipBatchSampler,
    new_generator,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "BatchSamplerShard",
    "DataLoaderAdapter",
    "DataLoaderDispatcher",
    "DataLoaderShard",
    "DataLoaderStateMixin",
    "IterableDatasetShard",
    "SeedableRandomSampler",
    "SkipBatchSampler",
    "SkipDataLoader",
    "get_sampler",
    "prepare_data_loader",
    "skip_first_batches",
]

# Arguments of `DataLoader` that a loader made from another one takes over; the rest is about which samples it yields.
_KEPT_ARGUMENTS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)
# What a loader holds of the process, which is not pickled with it.
_OF_THE_PROCESS = ("gradient_state", "state")
_EXHAUSTED = object()
_LOG = logging.getLogger(__name__.removeprefix("paceline.compat."))  # programs filter "accelerate"


class DataLoaderStateMixin:
    """Where an iteration stands, for the `GradientState`.

    Attributes:
        end_of_dataloader: Whether the batch in use is the last one.
        remainder: Samples in the last batch of all ranks without fillers; 0 if it is full, -1 if unknown.
    """

    end_of_dataloader = False
    remainder = -1
    gradient_state: GradientState

    def reset(self) -> None:
        """Forget the iteration before."""
        self.end_of_dataloader = False
        self.remainder = -1

    def begin(self) -> None:
        """Become the active loader of the `GradientState`."""
        self.reset()
        self.remainder = self._expected_remainder()
        self.gradient_state._add_dataloader(self)

    def end(self) -> None:
        """Hand over to the loader that was active before."""
        self.gradient_state._remove_dataloader(self)

    def _expected_remainder(self) -> int:
        return -1


class DataLoaderAdapter(DataLoaderStateMixin):
    """Holds a loader of torch, or of torchdata, and passes for one.

    Args:
        dataset: The data set.
        use_stateful_dataloader: Whether it holds torchdata's `StatefulDataLoader`.
        batch_sampler: Yields the indices of each batch.
        kwargs: Arguments of the loader.

    Raises:
        ImportError: torchdata is asked for and not installed.
    """

    base_dataloader: DataLoader[Any]
    iteration = 0
    skip_batches = 0
    _drop_last = False

    def __init__(
        self, dataset: Any, use_stateful_dataloader: bool = False, batch_sampler: Any = None, **kwargs: Any
    ) -> None:
        self.use_stateful_dataloader = use_stateful_dataloader
        loader_class = _stateful_loader_class() if use_stateful_dataloader else DataLoader
        self.base_dataloader = loader_class(dataset, batch_sampler=batch_sampler, **kwargs)
        self.gradient_state = GradientState()
        if use_stateful_dataloader:
            self.dl_state_dict = self._base_state()

    # Not a loader of torch by inheritance, whose attributes would shadow those of the one that it holds.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the loader that it holds."""
        return type(self.base_dataloader)

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling ask for attributes before there are any.
        if name == "base_dataloader":
            raise AttributeError(name)
        return getattr(self.base_dataloader, name)

    def __reduce__(self) -> tuple[Any, ...]:
        values = {name: value for name, value in vars(self).items() if name not in _OF_THE_PROCESS}
        return _unpickled, (type(self), values)

    def _join_process(self) -> None:
        """Take up what is not pickled."""
        self.gradient_state = GradientState()

    def __len__(self) -> int:
        return len(self.base_dataloader) - self.skip_batches

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError(f"{type(self).__name__} does not say how it yields batches.")

    @property
    def total_batch_size(self) -> int:
        """Samples in a batch of all ranks together."""
        raise NotImplementedError

    @property
    def total_dataset_length(self) -> int:
        """Samples in the data set of all ranks together."""
        return int(getattr(self.dataset, "total_length", None) or len(self.dataset))

    def get_sampler(self) -> Any:
        """The sampler of single indices; None if there is none."""
        return get_sampler(self)

    def set_sampler(self, sampler: Any) -> None:
        """Let `sampler` choose the order."""
        for wrapper in _wrapped(_batch_sampler(self)):
            wrapper.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of `epoch`, for the samplers and the data set."""
        self.iteration = epoch
        for wrapper in _wrapped(_batch_sampler(self)):
            parts: tuple[Any, ...] = (wrapper, getattr(wrapper, "sampler", None))
            for part in parts:
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch in use.

        Raises:
            AttributeError: The loader is not a stateful one.
        """
        self._require_state("state_dict")
        return self.dl_state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a position.

        Raises:
            AttributeError: The loader is not a stateful one.
        """
        self._require_state("load_state_dict")
        self.base_dataloader.load_state_dict(state_dict)  # type: ignore[attr-defined]

    def _require_state(self, method: str) -> None:
        if not self.use_stateful_dataloader:
            raise AttributeError(
                f"{method} of a {type(self).__name__} over a DataLoader: torch's loader has no state to save or load. "
                "Prepare it with use_stateful_dataloader=True (in DataLoaderConfiguration)."
            )

    def _base_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.base_dataloader.state_dict()  # type: ignore[attr-defined]
        return state

    def _update_state_dict(self) -> None:
        """Note the position of the loader that it holds, which is one batch ahead once the next one is read."""
        if self.use_stateful_dataloader:
            self.dl_state_dict = {**self._base_state(), "_iterator_finished": self.end_of_dataloader}

    def _expected_remainder(self) -> int:
        if self._drop_last:
            return -1
        try:
            return len(self.dataset) % self.total_batch_size
        except (AttributeError, NotImplementedError, TypeError):
            # A stream, or batches of any size.
            return -1

    def _one_ahead(self, batches: Iterator[Any], placed: Callable[[Any], Any]) -> Iterator[Any]:
        """Yield each batch, `placed`, once the next one is read."""
        position = 0
        batch = next(batches, _EXHAUSTED)
        while batch is not _EXHAUSTED:
            batch = placed(batch)
            self._update_state_dict()
            following = next(batches, _EXHAUSTED)
            if following is _EXHAUSTED:
                self.end_of_dataloader = True
                self._update_state_dict()
            if position >= self.skip_batches:
                yield batch
            batch = following
            position += 1


def _unpickled(loader_class: type[DataLoaderAdapter], values: dict[str, Any]) -> DataLoaderAdapter:
    loader = object.__new__(loader_class)
    vars(loader).update(values)
    loader._join_process()
    return loader


def _stateful_loader_class() -> Any:
    try:
        return importlib.import_module("torchdata.stateful_dataloader").StatefulDataLoader
    except ModuleNotFoundError as error:
        raise ImportError(
            f"use_stateful_dataloader=True needs torchdata's StatefulDataLoader ({error}). "
            'Install it with: pip install "torchdata>=0.11"'
        ) from error


class DataLoaderShard(DataLoaderAdapter):
    """Yields this rank's batches, on its device.

    Args:
        dataset: The data set.
        device: Where batches are moved to; None leaves them where they are.
        rng_types: Generators that get rank 0's state at the start of each pass: "torch", "generator" and so on.
        synchronized_generator: The one that "generator" means.
        skip_batches: How many batches at the start are read and not yielded.
        use_stateful_dataloader: Whether it holds torchdata's `StatefulDataLoader`.
        _drop_last: Whether incomplete batches are dropped.
        _non_blocking: Whether copies to the device overlap with the computation.
        torch_device_mesh: Not used.
        iteration: The epoch of the first pass.
        kwargs: Arguments of the loader.
    """

    def __init__(
        self,
        dataset: Any,
        device: torch.device | None = None,
        rng_types: Sequence[str | RNGType] | None = None,
        synchronized_generator: torch.Generator | None = None,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        torch_device_mesh: DeviceMesh | None = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, use_stateful_dataloader=use_stateful_dataloader, **kwargs)
        self.device = device
        self.rng_types = rng_types
        self.synchronized_generator = synchronized_generator
        self.skip_batches = skip_batches
        self._drop_last = _drop_last
        self._non_blocking = _non_blocking
        self.iteration = iteration

    @property
    def total_batch_size(self) -> int:
        """Samples in a batch of all ranks together."""
        batch_sampler = _batch_sampler(self)
        ranks = 1 if getattr(batch_sampler, "split_batches", False) else getattr(batch_sampler, "num_processes", 1)
        return int(batch_sampler.batch_size * ranks)

    def __iter__(self) -> Iterator[Any]:
        if self.rng_types is not None:
            synchronize_rng_states(list(self.rng_types), self.synchronized_generator)
        self.begin()
        self.set_epoch(self.iteration)
        yield from self._one_ahead(iter(self.base_dataloader), self._on_device)
        # A pass that was broken off does not get here: the next one is the same epoch again, and this loader stays the
        # active one.
        self.iteration += 1
        self.end()

    def _on_device(self, batch: Any) -> Any:
        if self.device is None:
            return batch
        return send_to_device(batch, self.device, non_blocking=self._non_blocking)


class DataLoaderDispatcher(DataLoaderAdapter):
    """Rank 0 reads the batches of all ranks and sends them; each rank takes its part.

    Iterating is collective: every rank must do it.

    Args:
        dataset: The data set.
        split_batches: Whether each batch is divided among the ranks; otherwise each rank gets a whole one.
        skip_batches: How many batches at the start are read and not yielded.
        use_stateful_dataloader: Whether it holds torchdata's `StatefulDataLoader`.
        _drop_last: Whether an incomplete last batch is dropped, instead of filled with the first samples.
        _non_blocking: Whether copies to the device overlap with the computation.
        slice_fn: Called with a batch of all ranks, the slice, `process_index` and `num_processes`; returns the part.
        torch_device_mesh: With an axis "tp", all ranks get the same batch.
        iteration: The epoch of the first pass.
        kwargs: Arguments of the loader.

    Raises:
        ValueError: The mesh has an axis of data parallelism besides "tp".
    """

    def __init__(
        self,
        dataset: Any,
        split_batches: bool = False,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        slice_fn: Callable[..., Any] | None = None,
        torch_device_mesh: DeviceMesh | None = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        axes = set((torch_device_mesh.mesh_dim_names if torch_device_mesh is not None else None) or ())
        if "tp" in axes and axes & {"dp", "fsdp", "dp_replicate", "dp_shard"}:
            raise ValueError(
                f"Dispatching batches over a mesh with the axes {sorted(axes)}: rank 0 sends one batch to all ranks, "
                "and tensor parallelism needs one per data-parallel group. Use dispatch_batches=False."
            )
        super().__init__(dataset, use_stateful_dataloader=use_stateful_dataloader, **kwargs)
        self.split_batches = split_batches
        self.skip_batches = skip_batches
        self._drop_last = _drop_last
        self._non_blocking = _non_blocking
        self.slice_fn = slice_tensors if slice_fn is None else slice_fn
        self.torch_device_mesh = torch_device_mesh
        self.iteration = iteration
        self.state = PartialState()
        self._same_batch = "tp" in axes
        self._warned = False

    def _join_process(self) -> None:
        super()._join_process()
        self.state = PartialState()

    def __len__(self) -> int:
        batches = len(self.base_dataloader)
        if not self.split_batches:
            fillers = 0 if self._drop_last else self.state.num_processes - 1
            batches = (batches + fillers) // self.state.num_processes
        return batches - self.skip_batches

    @property
    def total_batch_size(self) -> int:
        """Samples in a batch of all ranks together."""
        size = int(_batch_sampler(self).batch_size)
        return size if self.split_batches else size * self.state.num_processes

    def _expected_remainder(self) -> int:
        # Known for certain once the last batch is there.
        return -1

    def __iter__(self) -> Iterator[Any]:
        self.begin()
        self.set_epoch(self.iteration)
        # torch draws random numbers for an iterator: on all ranks, though only rank 0 reads from it.
        source = iter(self.base_dataloader)
        fillers: Any = None
        position = 0
        fetched = self._fetch(source)
        while fetched is not None:
            batch = self._sent(*fetched)
            fetched = self._fetch(source)
            if fillers is None and not self._drop_last:
                fillers = self._part(batch, slice(0, self.state.num_processes))
            size = find_batch_size(batch)
            if fetched is not None:
                self._warn_of_lost_samples(size)
            else:
                batch = self._filled(batch, fillers, size)
                self.end_of_dataloader = True
                self.remainder = size
                self._update_state_dict()
            share = find_batch_size(batch) // self.state.num_processes
            part = self._part(batch, slice(self.state.process_index * share, (self.state.process_index + 1) * share))
            if position >= self.skip_batches:
                yield part
            position += 1
        self.iteration += 1
        self.end()

    def _fetch(self, source: Iterator[Any]) -> tuple[Any, Any] | None:
        """The next batch of all ranks (None but on rank 0) and its structure; None at the end. Collective."""
        batch: Any = None
        error: Exception | None = None
        answer: list[Any] = [None, None]
        if self.state.process_index == 0:
            try:
                batch = self._read(source)
                answer[0] = None if batch is None else get_data_structure(batch)
            except Exception as raised:
                # The others wait for an answer, and get this one.
                error = raised
                answer[1] = f"{type(raised).__name__}: {raised}"
        broadcast_object_list(answer)
        if error is not None:
            raise error
        structure, problem = answer
        if problem is not None:
            raise RuntimeError(f"Rank 0, which reads the batches of all ranks, failed with {problem}")
        return None if structure is None else (batch, structure)

    def _read(self, source: Iterator[Any]) -> Any:
        """The next batch of all ranks; None at the end."""
        self._update_state_dict()
        ranks = self.state.num_processes
        if self.split_batches:
            return next(source, None)
        if self._same_batch:
            batches = [batch for batch in itertools.islice(source, 1) for _ in range(ranks)]
        else:
            batches = list(itertools.islice(source, ranks))
        if not batches or (len(batches) < ranks and self._drop_last):
            return None
        try:
            return concatenate(batches, dim=0)
        except RuntimeError as error:
            sizes = [find_batch_size(batch) for batch in batches]
            raise RuntimeError(
                f"Batches of {sizes} samples cannot be put together ({error}): with dispatch_batches=True, and with "
                "an IterableDataset, rank 0 sends the batches of all ranks as one, whose tensors must have the same "
                "shape but for the first dimension. Pad them in the collate function, use dispatch_batches=False, or "
                "split_batches=True, where rank 0 reads one batch and divides it."
            ) from error

    def _sent(self, batch: Any, structure: Any) -> Any:
        """Rank 0's batch, on every rank's device."""
        if self.state.process_index != 0:
            batch = initialize_tensors(structure)
        batch = send_to_device(batch, self.state.device, non_blocking=self._non_blocking)
        return broadcast(batch, from_process=0)

    def _filled(self, batch: Any, fillers: Any, size: int) -> Any:
        """A last batch that all ranks can share evenly."""
        missing = -size % self.state.num_processes
        if self._drop_last or missing == 0:
            return batch
        copies = -(-missing // find_batch_size(fillers))
        return concatenate([batch, *[fillers] * copies], dim=0)

    def _warn_of_lost_samples(self, size: int) -> None:
        lost = size % self.state.num_processes
        if lost and not self._warned:
            self._warned = True
            _LOG.warning(
                "A batch of %d samples does not divide by %d ranks: the last %d of them are not used. With "
                "split_batches=True the loader must yield batches that the ranks can share evenly.",
                size, self.state.num_processes, lost,
            )  # fmt: skip

    def _part(self, batch: Any, rows: slice) -> Any:
        return self.slice_fn(
            batch, rows, process_index=self.state.process_index, num_processes=self.state.num_processes
        )


class SkipDataLoader(DataLoaderAdapter):
    """A loader without its first batches, which are read and not yielded.

    Args:
        dataset: The data set.
        skip_batches: How many.
        use_stateful_dataloader: Whether it holds torchdata's `StatefulDataLoader`.
        kwargs: Arguments of the loader.
    """

    def __init__(
        self, dataset: Any, skip_batches: int = 0, use_stateful_dataloader: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(dataset, use_stateful_dataloader=use_stateful_dataloader, **kwargs)
        self.skip_batches = skip_batches

    def __iter__(self) -> Iterator[Any]:
        self.begin()
        yield from self._one_ahead(iter(self.base_dataloader), lambda batch: batch)
        self.end()


def _batch_sampler(loader: Any) -> Any:
    """What yields the indices of batches; a loader may have it as its `sampler`."""
    return loader.sampler if isinstance(loader.sampler, BatchSampler) else loader.batch_sampler


def _wrapped(batch_sampler: Any) -> Iterator[Any]:
    """A batch sampler, the one that it wraps, and so on."""
    while batch_sampler is not None:
        yield batch_sampler
        batch_sampler = getattr(batch_sampler, "batch_sampler", None)


def get_sampler(dataloader: Any) -> Any:
    """The sampler of single indices of a loader; None if there is none."""
    batch_samplers = list(_wrapped(_batch_sampler(dataloader)))
    if not batch_samplers:
        # Without automatic batching.
        return dataloader.sampler
    return getattr(batch_samplers[-1], "sampler", None)


def _kept(dataloader: Any) -> dict[str, Any]:
    return {name: getattr(dataloader, name) for name in _KEPT_ARGUMENTS if hasattr(dataloader, name)}


def prepare_data_loader(
    dataloader: DataLoader[Any],
    device: torch.device | None = None,
    num_processes: int | None = None,
    process_index: int | None = None,
    split_batches: bool = False,
    put_on_device: bool = False,
    rng_types: list[str | RNGType] | None = None,
    dispatch_batches: bool | None = None,
    even_batches: bool = True,
    slice_fn_for_dispatch: Callable[..., Any] | None = None,
    use_seedable_sampler: bool = False,
    data_seed: int | None = None,
    non_blocking: bool = False,
    use_stateful_dataloader: bool = False,
    torch_device_mesh: DeviceMesh | None = None,
) -> DataLoaderAdapter:
    """Make a loader that yields this rank's batches.

    Args:
        dataloader: The loader with all samples.
        device: Where batches are moved to.
        num_processes: The number of ranks; by default of the `PartialState`.
        process_index: This rank; by default of the `PartialState`.
        split_batches: Whether each batch is divided among the ranks; otherwise each rank gets a whole one.
        put_on_device: Whether batches are moved to `device`.
        rng_types: Generators that get rank 0's state at the start of each pass; "generator" is that of the sampler.
        dispatch_batches: Whether rank 0 reads for all ranks; by default for streams that are put on a device.
        even_batches: Whether the last batch is filled with the first samples, so that all ranks get the same number.
        slice_fn_for_dispatch: Takes a rank's part of a batch that rank 0 sent.
        use_seedable_sampler: Whether a random order depends only on the seed and the epoch.
        data_seed: That seed; by default the one that torch was last seeded with.
        non_blocking: Whether copies to the device overlap with the computation.
        use_stateful_dataloader: Whether the loader is torchdata's `StatefulDataLoader`.
        torch_device_mesh: The ranks' mesh; those along "tp" and "cp" get the same batches.

    Raises:
        ValueError: `dispatch_batches` without `put_on_device`, or `split_batches` with a batch size that the ranks
            cannot share evenly, or with none.
    """
    dispatch_batches = _reads_for_all(dataloader, dispatch_batches, put_on_device)
    ranks, rank = _place_among_ranks(num_processes, process_index, torch_device_mesh)
    if split_batches:
        _check_divisible(dataloader, ranks)

    sampler = get_sampler(dataloader)
    reseeded = use_seedable_sampler and isinstance(sampler, RandomSampler)
    shared = _Share(dataloader)
    if reseeded:
        sampler = _seedable(sampler, data_seed)
        shared.replace_sampler(sampler)
    if ranks != 1 and not dispatch_batches:
        shared.divide(ranks, rank, split_batches, even_batches, None if use_seedable_sampler else sampler)
    settings: dict[str, Any] = {
        **_kept(dataloader),
        **shared.arguments,
        "use_stateful_dataloader": use_stateful_dataloader,
        "_drop_last": dataloader.drop_last,
        "_non_blocking": non_blocking,
    }
    prepared: DataLoaderAdapter
    if dispatch_batches:
        # Only rank 0 reads: a generator of the script's would leave the ranks apart.
        del settings["generator"]
        prepared = DataLoaderDispatcher(
            shared.dataset,
            split_batches=split_batches,
            slice_fn=slice_fn_for_dispatch,
            torch_device_mesh=torch_device_mesh,
            **settings,
        )
    else:
        prepared = DataLoaderShard(
            shared.dataset,
            device=device if put_on_device else None,
            rng_types=_with_what_there_is(rng_types, shared.generator),
            synchronized_generator=shared.generator,
            **settings,
        )
    if reseeded and _batch_sampler(prepared) is not None:
        prepared.set_sampler(sampler)
    return prepared


def _reads_for_all(dataloader: DataLoader[Any], dispatch_batches: bool | None, put_on_device: bool) -> bool:
    """Whether rank 0 reads for all ranks."""
    if dispatch_batches is None:
        return put_on_device and isinstance(dataloader.dataset, IterableDataset)
    if dispatch_batches and not put_on_device:
        raise ValueError(
            "dispatch_batches=True with put_on_device=False: the batches that rank 0 sends arrive on the device. "
            "Use put_on_device=True (device_placement=True), or dispatch_batches=False."
        )
    return dispatch_batches


def _place_among_ranks(
    num_processes: int | None, process_index: int | None, mesh: DeviceMesh | None
) -> tuple[int, int]:
    """The number of ranks that share the samples, and this one's index among them."""
    state = PartialState()
    ranks = state.num_processes if num_processes is None else num_processes
    rank = state.process_index if process_index is None else process_index
    return (ranks, rank) if mesh is None else _data_parallel_ranks(mesh, state, ranks, rank)


class _Share:
    """The data set and samplers of a loader, and what becomes of them when ranks divide them."""

    def __init__(self, dataloader: DataLoader[Any]) -> None:
        self.dataset: Any = dataloader.dataset
        # The one that all ranks must draw the same numbers from.
        self.generator: torch.Generator | None = None
        self._loader = dataloader
        self.arguments = _sampling(dataloader)

    def replace_sampler(self, sampler: Any) -> None:
        """Let `sampler` choose the order where there is no batch sampler that has it."""
        if "sampler" in self.arguments and not isinstance(self.arguments["sampler"], BatchSampler):
            self.arguments["sampler"] = sampler

    def divide(self, ranks: int, rank: int, split_batches: bool, even_batches: bool, sampler: Any) -> None:
        """Keep one rank's part. `sampler` is the one whose generator is shared, if any."""
        loader = self._loader
        stream: Any = self.dataset
        if not isinstance(self.dataset, IterableDataset):
            self.generator = _own_generator(sampler)
            name = "sampler" if "sampler" in self.arguments else "batch_sampler"
            inner = self.arguments[name]
            self.arguments[name] = BatchSamplerShard(inner, ranks, rank, split_batches, even_batches)
        elif not split_batches and _is_sharded_stream(self.dataset, ranks):
            self.dataset = stream.shard(num_shards=ranks, index=rank)
        else:
            self.generator = getattr(self.dataset, "generator", None)
            size = 1 if loader.batch_size is None else loader.batch_size
            self.dataset = IterableDatasetShard(self.dataset, size, loader.drop_last, ranks, rank, split_batches)
            if split_batches and loader.batch_size is not None:
                self.arguments["batch_size"] = loader.batch_size // ranks


def _sampling(dataloader: Any) -> dict[str, Any]:
    """The arguments by which a loader of the same data set yields the same batches."""
    if isinstance(dataloader.dataset, IterableDataset):
        return {"batch_size": dataloader.batch_size, "drop_last": dataloader.drop_last}
    if dataloader.batch_sampler is not None:
        return {"batch_sampler": dataloader.batch_sampler}
    # Without automatic batching: the sampler yields whatever the data set takes for an index.
    return {"sampler": dataloader.sampler, "batch_size": None}


def _own_generator(sampler: Any) -> torch.Generator | None:
    """The generator of a sampler; one that draws from torch's global one gets its own, seeded from there."""
    if not hasattr(sampler, "generator"):
        return None
    if sampler.generator is None:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        sampler.generator = new_generator()
        sampler.generator.manual_seed(seed)
    generator: torch.Generator = sampler.generator
    return generator


def _seedable(sampler: Any, data_seed: int | None) -> SeedableRandomSampler:
    return SeedableRandomSampler(
        sampler.data_source,
        replacement=sampler.replacement,
        num_samples=sampler._num_samples,
        generator=sampler.generator,
        data_seed=data_seed,
    )


def _is_sharded_stream(dataset: Any, ranks: int) -> bool:
    """Whether it is a stream of Hugging Face's `datasets` with a file, or more, for each rank."""
    return callable(getattr(dataset, "shard", None)) and getattr(dataset, "n_shards", 0) >= ranks


def _with_what_there_is(
    rng_types: list[str | RNGType] | None, generator: torch.Generator | None
) -> list[str | RNGType] | None:
    """The generators to synchronize, without "generator" where there is none."""
    if rng_types is None or generator is not None:
        return rng_types
    return [kind for kind in rng_types if kind != "generator"]


def _data_parallel_ranks(mesh: DeviceMesh, state: PartialState, ranks: int, rank: int) -> tuple[int, int]:
    """The number of ranks that get batches of their own, and which of them this one is like."""
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.mesh.shape, strict=False))
    tensor_parallel = sizes.get("tp", 1)
    if state.distributed_type == DistributedType.DEEPSPEED:
        return ranks // tensor_parallel, rank // tensor_parallel
    return sizes.get("dp_replicate", 1) * sizes.get("dp_shard", 1), rank // (tensor_parallel * sizes.get("cp", 1))


def _check_divisible(dataloader: DataLoader[Any], ranks: int) -> None:
    size: int | None = dataloader.batch_size
    if size is None:
        size = getattr(_batch_sampler(dataloader), "batch_size", None)
    if size is None:
        raise ValueError(
            f"split_batches=True with a {type(dataloader).__name__} that has no batch_size, nor has its batch sampler "
            f"({type(dataloader.batch_sampler).__name__}): each batch is divided among the processes in equal parts. "
            "Give the batch sampler an attribute batch_size, or use split_batches=False."
        )
    if size > 1 and size % ranks != 0:
        raise ValueError(
            f"split_batches=True with batches of {size} samples on {ranks} processes: each batch is divided among the "
            f"processes in equal parts. Choose a batch size that is a multiple of {ranks}, or split_batches=False."
        )


def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
    """Make a loader like another one that leaves out the first batches of each pass.

    Over a data set with indices nothing of them is read; a stream is read up to there. For a loader with a state
    (`use_stateful_dataloader`) use `load_state_dict`.
    """
    arguments = _sampling(dataloader)
    skip_batches = getattr(dataloader, "skip_batches", 0) if isinstance(dataloader, DataLoaderAdapter) else 0
    if "batch_sampler" in arguments or "sampler" in arguments:
        name = "sampler" if "sampler" in arguments else "batch_sampler"
        arguments[name] = SkipBatchSampler(arguments[name], num_batches * _reads_per_batch(dataloader))
    else:
        skip_batches += num_batches
    if isinstance(dataloader, DataLoaderAdapter):
        return _remade(dataloader, skip_batches, arguments)
    if skip_batches:
        return SkipDataLoader(dataloader.dataset, skip_batches=skip_batches, **_kept(dataloader), **arguments)
    return DataLoader(dataloader.dataset, **_kept(dataloader), **arguments)


def _reads_per_batch(dataloader: Any) -> int:
    """How many batches the loader it holds reads for one that it yields."""
    if isinstance(dataloader, DataLoaderDispatcher) and not dataloader.split_batches:
        return dataloader.state.num_processes
    return 1


def _remade(loader: DataLoaderAdapter, skip_batches: int, arguments: dict[str, Any]) -> DataLoaderAdapter:
    """The same loader over a new one of torch."""
    base_class = _stateful_loader_class() if loader.use_stateful_dataloader else DataLoader
    remade = copy.copy(loader)
    remade.skip_batches = skip_batches
    remade.base_dataloader = base_class(loader.dataset, **_kept(loader), **arguments)
    if loader.use_stateful_dataloader:
        remade.dl_state_dict = remade._base_state()
    remade.reset()
    return remade
