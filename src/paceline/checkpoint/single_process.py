"""Writing a checkpoint from one process, out of tensors that are whole: what converters do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from paceline.checkpoint.folder import TRAINING, open_checkpoint, rank_document
from paceline.checkpoint.format.shards import TensorShard
from paceline.collectives import SoloGroup

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor

    from paceline.checkpoint.folder import Checkpoint
    from paceline.checkpoint.format.manifest import Manifest

__all__ = ["write_checkpoint"]


def write_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | TensorShard],
    *,
    training: Mapping[str, Any],
    ranks: Mapping[int, Mapping[str, Any]],
    facts: Manifest,
    documents: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Write a checkpoint; until it is whole, what was under its name before stays.

    Args:
        folder: Its name.
        tensors: Whole, by the names that the manifest lists; those mapped from files are read piece by piece.
            A `TensorShard` may be one that reads its values when they are asked for.
        training: What `training.json` holds.
        ranks: What each rank noted for itself.
        facts: The manifest without files and tensors.
        documents: Further texts, by file name.

    Raises:
        CheckpointError: It could not be written; nothing is left of it.
    """
    from paceline.checkpoint.writing import Common, Content, save_checkpoint

    texts = {TRAINING: json.dumps(training), **(documents or {})}
    texts.update((rank_document(rank), json.dumps(own)) for rank, own in ranks.items())
    shards = {
        name: held if isinstance(held, TensorShard) else TensorShard.whole(held) for name, held in tensors.items()
    }
    content = Content(shards=shards, documents=texts, common=Common(), facts=facts)
    save_checkpoint(folder, lambda _: content, SoloGroup())
    return open_checkpoint(folder)
