"""A checkpoint of our own in the same form as those of others, so that all are converted alike."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from paceline.checkpoint.dtypes import dtype_named
from paceline.checkpoint.foreign.state import ForeignOptimizer, ForeignState, Source, Tensors
from paceline.checkpoint.parts import Slot
from paceline.checkpoint.plain import from_plain

if TYPE_CHECKING:
    from paceline.checkpoint.folder import Checkpoint

__all__ = ["from_checkpoint"]

_MODEL = re.compile(r"model(?:_(\d+))?/(.+)")


def from_checkpoint(checkpoint: Checkpoint) -> ForeignState:
    """Everything that a checkpoint holds but the positions of its loaders."""
    manifest, training = checkpoint.manifest, checkpoint.training
    state = ForeignState(kind="paceline", folder=checkpoint.folder, step=manifest.step, epoch=manifest.epoch)
    sources = {name: _source(checkpoint, name) for name in manifest.tensors}
    for full, source in sources.items():
        matched = _MODEL.fullmatch(full)
        if matched:
            state.weights.sources[_short(full)] = source
    state.ties = {_short(alias): _short(name) for alias, name in manifest.ties.items()}
    for index, held in enumerate(training["optimizers"]):
        optimizer = ForeignOptimizer(numbers=dict(held["numbers"]), groups=list(held["groups"]))
        prefix = f"optimizer_{index}/" if index else "optimizer/"
        for full, source in sources.items():
            if full.startswith(prefix):
                owner, _, slot = full.removeprefix(prefix).rpartition("/")
                optimizer.slots.setdefault(owner, Tensors()).sources[slot] = source
        state.optimizers.append(optimizer)
    loose = Tensors({name: source for name, source in sources.items() if not name.startswith(("model", "optimizer"))})
    state.schedulers = [from_plain(held, loose) for held in training["schedulers"]]
    state.scaler = from_plain(training["scaler"], loose) if training.get("scaler") else None
    state.custom = [from_plain(held, loose) for held in training["custom"]]
    for rank in range(manifest.world_size):
        own = checkpoint.of_rank(rank)
        if own is not None:
            state.generators[rank] = from_plain(own["generators"])
            if own.get("loaders") and not rank:
                state.notes.append("left: the positions of the loaders; no other format has a place for them")
    return state


def _short(full: str) -> str:
    return full.removeprefix("model/")


def _source(checkpoint: Checkpoint, name: str) -> Source:
    record = checkpoint.manifest.tensors[name]

    return Source(Slot(record.shape, dtype_named(record.dtype)), lambda: checkpoint.read(name))
