"""A checkpoint of our own in the same form as those of others, so that all are converted alike."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from paceline.checkpoint.folder import TRAINING, rank_document
from paceline.checkpoint.format.json_state import from_plain, to_plain
from paceline.checkpoint.format.layout import dtype_named
from paceline.checkpoint.format.manifest import Manifest
from paceline.checkpoint.format.shards import Slot, TensorShard
from paceline.checkpoint.portable_state import ForeignOptimizer, ForeignState, Source, Tensors
from paceline.checkpoint.writing import Common, Content, save_checkpoint
from paceline.collectives import SoloGroup
from paceline.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from paceline.checkpoint.folder import Checkpoint

__all__ = ["from_checkpoint", "write_paceline"]

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
        optimizer = ForeignOptimizer(numbers=dict(held["numbers"]), groups=from_plain(held["groups"]))
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
            if own["generators"]:
                state.generators[rank] = from_plain(own["generators"])
            if own.get("loaders") and not rank:
                state.notes.append("left: the positions of the loaders; what is converted begins an epoch anew")
    return state


def _short(full: str) -> str:
    return full.removeprefix("model/")


def _source(checkpoint: Checkpoint, name: str) -> Source:
    record = checkpoint.manifest.tensors[name]

    return Source(Slot(record.shape, dtype_named(record.dtype)), lambda: checkpoint.read(name))


# The other way


def write_paceline(state: ForeignState, out: Path, on_progress: Callable[[int], None]) -> list[str]:
    """Write a checkpoint of our own.

    Returns:
        What was left, and why.
    """
    training, shards = _training(state)
    cache = _Latest(on_progress)
    for name in state.weights:
        full = name if _MODEL.fullmatch(name) else f"model/{name}"
        shards[full] = _Read.of(state.weights, name, full, cache)
    for index, optimizer in enumerate(state.optimizers):
        family = f"optimizer_{index}" if index else "optimizer"
        for owner, held in optimizer.slots.items():
            for slot in held:
                full = f"{family}/{owner}/{slot}"
                shards[full] = _Read.of(held, slot, full, cache)
    # No position is not the position 0: a run that loads this begins an epoch.
    ranks = {
        rank: {"loaders": None, "generators": to_plain(state.generators.get(rank), "generators")}
        for rank in range(_ranks(state))
    }
    config = state.folder / "config.json"
    documents = {config.name: config.read_text(encoding="utf-8")} if config.is_file() else {}
    documents[TRAINING] = json.dumps(training)
    documents.update((rank_document(rank), json.dumps(own)) for rank, own in ranks.items())
    content = Content(shards=shards, documents=documents, common=Common(), facts=_facts(state))
    save_checkpoint(out, lambda _: content, SoloGroup())
    return []


def _training(state: ForeignState) -> tuple[dict[str, Any], dict[str, TensorShard]]:
    """What is no tensor, and the tensors that it points to."""
    tensors: dict[str, Tensor] = {}
    training: dict[str, Any] = {
        "optimizers": [
            {"groups": to_plain(held.groups, "groups"), "numbers": held.numbers, "steps": state.step or held.steps}
            for held in state.optimizers
        ],
        "schedulers": [to_plain(s, f"scheduler_{i}/state", tensors) for i, s in enumerate(state.schedulers)],
        "scaler": None if state.scaler is None else to_plain(state.scaler, "scaler/state", tensors),
        "engine": {},
        "engine_settings": {},
        "custom": [to_plain(s, f"custom_{i}/state", tensors) for i, s in enumerate(state.custom)],
    }
    return training, {name: TensorShard.whole(tensor) for name, tensor in tensors.items()}


def _ranks(state: ForeignState) -> int:
    return max(state.generators, default=0) + 1


def _facts(state: ForeignState) -> Manifest:
    ties = {alias: name for alias, name in state.ties.items() if name in state.weights}
    return Manifest(
        id="",
        paceline=__version__,
        torch=torch.__version__,
        created=datetime.now(timezone.utc).isoformat(),
        step=state.step,
        epoch=state.epoch,
        samples=0,
        world_size=_ranks(state),
        strategy=f"converted from {state.kind}",
        mixed_precision="no",
        ties={f"model/{alias}": f"model/{name}" for alias, name in ties.items()},
    )


class _Latest:
    """The tensor that is being written, which several threads take pieces of."""

    def __init__(self, on_progress: Callable[[int], None]) -> None:
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._held: tuple[str, Tensor] | None = None

    def get(self, full: str, read: Callable[[], Tensor]) -> Tensor:
        """The tensor of that name, flat; the one before it is let go."""
        with self._lock:
            if self._held is None or self._held[0] != full:
                self._held = full, read().reshape(-1)
                self._on_progress(self._held[1].numel() * self._held[1].element_size())
            return self._held[1]


@dataclass(frozen=True, slots=True)
class _Read(TensorShard):
    """A whole tensor that is read when its first piece is written."""

    fetch: Callable[[], Tensor]

    @classmethod
    def of(cls, tensors: Tensors, name: str, full: str, cache: _Latest) -> _Read:
        """A tensor of a state, under its name in the checkpoint."""
        slot = tensors.slot(name)
        empty = torch.empty(slot.shape, dtype=slot.dtype, device="meta")
        return cls(slot.shape, 0, empty, lambda: cache.get(full, lambda: tensors[name]))

    @override
    def flat(self) -> Tensor:
        return self.fetch()
