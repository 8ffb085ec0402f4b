"""Writing a checkpoint from one process, out of tensors that are whole: what converters do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from paceline.checkpoint.folder import TRAINING, open_checkpoint, rank_document
from paceline.checkpoint.parts import Part
from paceline.collectives import SoloGroup

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor

    from paceline.checkpoint.folder import Checkpoint
    from paceline.checkpoint.manifest import Manifest

__all__ = ["write_checkpoint"]


def write_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | Part],
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
            A `Part` may be one that reads its values when they are asked for.
        training: What `training.json` holds.
        ranks: What each rank noted for itself.
        facts: The manifest without files and tensors.
        documents: Further texts, by file name.

    Raises:
        CheckpointError: It could not be written; nothing is left of it.
    """
    from paceline.checkpoint.saving import Common, Content, save_checkpoint

    texts = {TRAINING: json.dumps(training), **(documents or {})}
    texts.update((rank_document(rank), json.dumps(own)) for rank, own in ranks.items())
    parts = {name: held if isinstance(held, Part) else Part.whole(held) for name, held in tensors.items()}
    content = Content(parts=parts, documents=texts, common=Common(), facts=facts)
    save_checkpoint(folder, lambda _: content, SoloGroup())
    return open_checkpoint(folder)
