"""Construction of data loaders from data sets and training arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from paceline.errors import DataError, PrepareError, did_you_mean
from paceline.trainer.batches.collate import (
    KEEP,
    REMOVED,
    Columns,
    PaddingCollator,
    columns_of,
    default_collator,
    nothing_left,
)
from paceline.trainer.batches.packing import PackedSet, PackingCollator, pack_dataset, packs_flat
from paceline.trainer.batches.sampling import LengthGroupedSampler, lengths_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.utils.data import Sampler

    from paceline.accelerator.accelerator import Accelerator
    from paceline.data import PreparedDataLoader
    from paceline.trainer.arguments.arguments import BatchPlan, TrainingArguments

__all__ = ["choose_collator", "named_dataset", "packed_loader", "prepared_loader", "train_sampler"]


def choose_collator(given: Callable[[Any], Any] | None, processing_class: Any) -> Callable[[Any], Any]:
    """The given collator; else one that pads if there is a tokenizer; else one that stacks."""
    if given is not None:
        return given
    if hasattr(processing_class, "pad"):
        return PaddingCollator(processing_class)
    return default_collator


def _drop_columns(
    dataset: Any, collator: Callable[[Any], Any], model: nn.Module, label_names: list[str]
) -> tuple[Any, Callable[[Any], Any]]:
    """Drop columns that the model does not take, from the data set if it supports that, else before collating."""
    kept = columns_of(model, label_names)
    if kept is None:
        return dataset, collator
    names = getattr(dataset, "column_names", None)
    if isinstance(names, list) and hasattr(dataset, "remove_columns"):
        extra = [name for name in names if name not in kept]
        if names and extra == names:
            raise DataError(nothing_left(names, kept), REMOVED, KEEP)
        if extra:
            dataset = dataset.remove_columns(extra)
        return dataset, collator
    return dataset, Columns(collator, kept)


def named_dataset(datasets: Any, name: str) -> Any:
    """One of several evaluation sets.

    Raises:
        PrepareError: There is none of that name.
    """
    several = {}
    if isinstance(datasets, dict):
        several = datasets
    if name not in several:
        why = "eval_dataset is not a mapping of several"
        if several:
            why = f"The evaluation sets are {', '.join(several)}"
        raise PrepareError(f"Trainer.evaluate({name!r})", why, did_you_mean(name, several) or "Name one of them")
    return several[name]


def prepared_loader(
    accelerator: Accelerator,
    args: TrainingArguments,
    dataset: Any,
    collator: Callable[[Any], Any],
    model: nn.Module,
    label_names: list[str],
    *,
    sampler: Sampler[int] | None = None,
    batch_size: int | None = None,
) -> PreparedDataLoader:
    """A loader that is ready for a loop.

    Args:
        accelerator: Prepares it.
        args: How to load.
        dataset: The samples.
        collator: From a list of samples to a batch.
        model: Columns that it does not take are dropped.
        label_names: These columns are kept.
        sampler: The order of the samples; None keeps theirs.
        batch_size: Samples of a training micro-batch on each rank; None makes a loader for evaluation, which drops
            no samples and whose position is not saved in checkpoints.
    """
    if args.remove_unused_columns:
        dataset, collator = _drop_columns(dataset, collator, model, label_names)
    is_training = batch_size is not None
    size = args.per_device_eval_batch_size if batch_size is None else batch_size
    if accelerator.split_batches:
        # One batch is read for all ranks, of which each gets as many samples as the argument says.
        size *= accelerator.num_processes
    drop_last = args.dataloader_drop_last and is_training
    loader = _make_loader(
        args, dataset, collator, batch_size=size, sampler=sampler, drop_last=drop_last, device=accelerator.device
    )
    return accelerator.prepare_data_loader(loader, saved=is_training, ordered=not is_training)


def packed_loader(
    accelerator: Accelerator, args: TrainingArguments, dataset: Any, model: nn.Module, plan: BatchPlan
) -> PreparedDataLoader:
    """A loader of packed rows for training.

    Args:
        accelerator: Prepares it.
        args: How to load and pack.
        dataset: The samples.
        model: Decides which columns are packed, and whether rows are put one after the other.
        plan: How many rows a micro-batch has.
    """
    shuffle = args.train_sampling_strategy == "random"
    seed = args.seed if args.data_seed is None else args.data_seed
    packed, length = pack_dataset(
        dataset, args.packing_length, shuffle=shuffle, seed=seed, length_column=args.length_column_name
    )
    takes = columns_of(model, ["labels"]) if args.remove_unused_columns else None
    collator = PackingCollator(length, takes, packs_flat(model))
    sampler: Sampler[int] | None = None
    if isinstance(packed, PackedSet):
        sampler = RandomSampler(packed) if shuffle else SequentialSampler(packed)
        tokens, rows = packed.num_tokens, len(packed)
        accelerator.print(
            f"Packed {packed.num_samples:,} samples into {rows:,} rows of {length:,} tokens, "
            f"{100 * (1 - tokens / (rows * length)):.1f} % of which are left over",
            flush=True,
        )
    size = plan.micro_batch * (accelerator.num_processes if accelerator.split_batches else 1)
    loader = _make_loader(
        args,
        packed,
        collator,
        batch_size=size,
        sampler=sampler,
        drop_last=args.dataloader_drop_last,
        device=accelerator.device,
    )
    return accelerator.prepare_data_loader(loader)


def train_sampler(args: TrainingArguments, dataset: Any, *, total_batch: int, input_name: str) -> Sampler[int] | None:
    """The sampler of the training set; None for a stream.

    Raises:
        DataError: `group_by_length` for a stream, or for samples without length.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        if args.train_sampling_strategy == "group_by_length":
            raise DataError(
                "train_sampling_strategy='group_by_length'",
                f"A {type(dataset).__name__} is a stream: it has no length, and its order is fixed",
                "Leave it out, or group the samples in the stream",
            )
        return None
    if args.train_sampling_strategy == "group_by_length":
        lengths = lengths_of(dataset, args.length_column_name, input_name)
        return LengthGroupedSampler(lengths, total_batch)
    if args.train_sampling_strategy == "sequential":
        return SequentialSampler(dataset)
    return RandomSampler(dataset)


def _make_loader(
    args: TrainingArguments,
    dataset: Any,
    collator: Callable[[Any], Any],
    *,
    batch_size: int,
    sampler: Sampler[int] | None,
    drop_last: bool,
    device: torch.device,
) -> DataLoader[Any]:
    """A loader with the settings of the arguments, which the Accelerator prepares afterwards."""
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "drop_last": drop_last,
        "collate_fn": collator,
        "num_workers": args.dataloader_num_workers,
        # On a CPU nothing is copied, and torch would warn.
        "pin_memory": args.dataloader_pin_memory and device.type != "cpu",
        "persistent_workers": args.dataloader_persistent_workers,
        "in_order": args.dataloader_in_order,
    }
    if args.dataloader_prefetch_factor is not None:
        settings["prefetch_factor"] = args.dataloader_prefetch_factor
    if args.dataloader_multiprocessing_context is not None and args.dataloader_num_workers:
        settings["multiprocessing_context"] = args.dataloader_multiprocessing_context
    if not isinstance(dataset, IterableDataset):
        settings["sampler"] = sampler
    return DataLoader(dataset, **settings)
