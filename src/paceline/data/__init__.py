"""Prepared data loaders: they distribute data over the ranks, and their position can be saved and resumed."""

from __future__ import annotations

from paceline.data.active_loaders import ActiveLoaders, LoaderStatus
from paceline.data.family import LoaderFamily, LoopPosition, OwnLoaders
from paceline.data.iterable_loader import looks_like_batches
from paceline.data.loader import PreparedDataLoader
from paceline.data.prefetch import DevicePrefetcher
from paceline.data.prepare import prepare_loader
from paceline.data.sharding import ShardedBatchSampler
from paceline.data.skipping import skip_first_batches

__all__ = [
    "ActiveLoaders",
    "DevicePrefetcher",
    "LoaderFamily",
    "LoaderStatus",
    "LoopPosition",
    "OwnLoaders",
    "PreparedDataLoader",
    "ShardedBatchSampler",
    "looks_like_batches",
    "prepare_loader",
    "skip_first_batches",
]
