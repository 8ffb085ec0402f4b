"""From data sets to loaders, as the arguments ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from paceline.errors import DataError
from paceline.trainer.batches.collate import (
    KEEP,
    REMOVED,
    Columns,
    PaddingCollator,
    columns_of,
    default_collator,
    nothing_left,
)
from paceline.trainer.batches.sampling import LengthGroupedSampler, lengths_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.utils.data import Sampler

    from paceline.trainer.arguments.arguments import TrainingArguments

__all__ = ["choose_collator", "drop_columns", "make_loader", "train_sampler"]


def choose_collator(given: Callable[[Any], Any] | None, processing_class: Any) -> Callable[[Any], Any]:
    """The collator that was given, else one that pads if there is a tokenizer, else one that stacks."""
    if given is not None:
        return given
    return PaddingCollator(processing_class) if hasattr(processing_class, "pad") else default_collator


def drop_columns(
    dataset: Any, collator: Callable[[Any], Any], model: nn.Module, label_names: list[str]
) -> tuple[Any, Callable[[Any], Any]]:
    """Take away what the model does not take: from the data set if it can, else in front of the collator."""
    kept = columns_of(model, label_names)
    if kept is None:
        return dataset, collator
    names = getattr(dataset, "column_names", None)
    if isinstance(names, list) and hasattr(dataset, "remove_columns"):
        extra = [name for name in names if name not in kept]
        if names and extra == names:
            raise DataError(nothing_left(names, kept), REMOVED, KEEP)
        return (dataset.remove_columns(extra) if extra else dataset), collator
    return dataset, Columns(collator, kept)


def train_sampler(args: TrainingArguments, dataset: Any, *, total_batch: int, input_name: str) -> Sampler[int] | None:
    """The order of the training samples; None for data without a length or an order."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        if args.train_sampling_strategy == "group_by_length":
            raise DataError(
                "train_sampling_strategy='group_by_length' was asked for",
                f"A {type(dataset).__name__} has no length, and comes in its own order",
                "Leave it out, or sort the stream itself",
            )
        return None
    if args.train_sampling_strategy == "group_by_length":
        lengths = lengths_of(dataset, args.length_column_name, input_name)
        return LengthGroupedSampler(lengths, total_batch)
    if args.train_sampling_strategy == "sequential":
        return SequentialSampler(dataset)
    return RandomSampler(dataset)


def make_loader(
    args: TrainingArguments,
    dataset: Any,
    collator: Callable[[Any], Any],
    *,
    batch_size: int,
    sampler: Sampler[int] | None,
    drop_last: bool,
    device: torch.device,
) -> DataLoader[Any]:
    """A loader with the arguments' settings; it is prepared by the Accelerator afterwards."""
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "drop_last": drop_last,
        "collate_fn": collator,
        "num_workers": args.dataloader_num_workers,
        # Without a device there is nothing to copy to, and torch warns.
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
