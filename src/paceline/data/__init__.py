"""Prepared data loaders: they distribute data over the ranks, and their position can be saved and resumed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.environment.lazy_names import lazy_attributes

if TYPE_CHECKING:
    from paceline.data.active_loaders import ActiveLoaders, LoaderStatus
    from paceline.data.family import LoaderFamily, LoopPosition, OwnLoaders
    from paceline.data.iterable_loader import looks_like_batches
    from paceline.data.loader import PreparedDataLoader
    from paceline.data.prefetch import DevicePrefetcher
    from paceline.data.prepare import prepare_loader
    from paceline.data.sharding import ShardedBatchSampler
    from paceline.data.skipping import skip_first_batches
else:
    __getattr__, _ = lazy_attributes(
        __name__,
        {
            "active_loaders": "ActiveLoaders LoaderStatus",
            "family": "LoaderFamily LoopPosition OwnLoaders",
            "iterable_loader": "looks_like_batches",
            "loader": "PreparedDataLoader",
            "prefetch": "DevicePrefetcher",
            "prepare": "prepare_loader",
            "sharding": "ShardedBatchSampler",
            "skipping": "skip_first_batches",
        },
    )

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
