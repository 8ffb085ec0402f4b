"""A paceline checkpoint as a portable state and back, so that every format is converted the same way."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from paceline.checkpoint.folder import TRAINING, rank_document
from paceline.checkpoint.format.json_state import from_plain, to_plain
from paceline.checkpoint.format.layout import dtype_named
from paceline.checkpoint.format.manifest import Manifest, numbered
from paceline.checkpoint.format.shards import Slot, TensorShard
from paceline.checkpoint.portable_state import LazyTensors, PortableOptimizer, PortableState, TensorSource
from paceline.checkpoint.save_load import Common, Content, save_checkpoint
from paceline.collectives import SoloGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from paceline.checkpoint.folder import Checkpoint

__all__ = ["from_checkpoint", "write_paceline"]

_MODEL = re.compile(r"model(?:_(\d+))?/(.+)")


# Reading


def from_checkpoint(checkpoint: Checkpoint) -> PortableState:
    """Everything that a checkpoint holds except the loader positions."""
    manifest, training = checkpoint.manifest, checkpoint.training
    state = PortableState(kind="paceline", folder=checkpoint.folder, step=manifest.step, epoch=manifest.epoch)
    sources = {name: _source(checkpoint, name) for name in manifest.tensors}
    state.weights = LazyTensors({_short(name): source for name, source in sources.items() if _MODEL.fullmatch(name)})
    state.ties = {_short(alias): _short(name) for alias, name in manifest.ties.items()}
    state.optimizers = [_optimizer(i, saved, sources) for i, saved in enumerate(training["optimizers"])]
    others = {name: source for name, source in sources.items() if not name.startswith(("model", "optimizer"))}
    _read_objects(state, training, LazyTensors(others))
    _read_ranks(state, checkpoint)
    return state


def _optimizer(index: int, saved: Mapping[str, Any], sources: Mapping[str, TensorSource]) -> PortableOptimizer:
    optimizer = PortableOptimizer(numbers=dict(saved["numbers"]), groups=from_plain(saved["groups"]))
    prefix = f"{numbered('optimizer', index)}/"
    for full, source in sources.items():
        if full.startswith(prefix):
            parameter, _, slot = full.removeprefix(prefix).rpartition("/")
            optimizer.slots.setdefault(parameter, LazyTensors()).sources[slot] = source
    return optimizer


def _read_objects(state: PortableState, training: Mapping[str, Any], tensors: LazyTensors) -> None:
    state.schedulers = [from_plain(saved, tensors) for saved in training["schedulers"]]
    state.scaler = from_plain(training["scaler"], tensors) if training.get("scaler") else None
    state.custom = [from_plain(saved, tensors) for saved in training["custom"]]


def _read_ranks(state: PortableState, checkpoint: Checkpoint) -> None:
    for rank in range(checkpoint.manifest.world_size):
        saved = checkpoint.of_rank(rank)
        if saved is None:
            continue
        if saved["generators"]:
            state.generators[rank] = from_plain(saved["generators"])
        if saved.get("loaders") and not rank:
            state.has_loader_positions = True


def _short(full: str) -> str:
    return full.removeprefix("model/")


def _source(checkpoint: Checkpoint, name: str) -> TensorSource:
    record = checkpoint.manifest.tensors[name]
    return TensorSource(Slot(record.shape, dtype_named(record.dtype)), lambda: checkpoint.read(name))


# Writing


def write_paceline(state: PortableState, out: Path, on_progress: Callable[[int], None]) -> list[str]:
    """Write a paceline checkpoint.

    Returns:
        Sentences about what was left out, and why.
    """
    training, shards = _training(state)
    cache = _LatestTensor(on_progress)
    for name in state.weights:
        full = name
        if not _MODEL.fullmatch(name):
            full = f"model/{name}"
        shards[full] = _LazyShard.of(state.weights, name, full, cache)
    for index, optimizer in enumerate(state.optimizers):
        family = numbered("optimizer", index)
        for parameter, slots in optimizer.slots.items():
            for slot in slots:
                full = f"{family}/{parameter}/{slot}"
                shards[full] = _LazyShard.of(slots, slot, full, cache)
    documents = {TRAINING: json.dumps(training)}
    for rank in range(_num_ranks(state)):
        # None is not position 0: a run that loads this starts a new epoch.
        saved = {"loaders": None, "generators": to_plain(state.generators.get(rank), "generators")}
        documents[rank_document(rank)] = json.dumps(saved)
    config = state.folder / "config.json"
    if config.is_file():
        documents[config.name] = config.read_text(encoding="utf-8")
    content = Content(shards=shards, documents=documents, common=Common(), manifest=_manifest(state))
    save_checkpoint(out, lambda _: content, SoloGroup())
    return []


def _training(state: PortableState) -> tuple[dict[str, Any], dict[str, TensorShard]]:
    """What is not a tensor, and the tensors that it refers to."""
    tensors: dict[str, Tensor] = {}
    training: dict[str, Any] = {
        "optimizers": [
            {"groups": to_plain(each.groups, "groups"), "numbers": each.numbers, "steps": state.step or each.steps}
            for each in state.optimizers
        ],
        "schedulers": [to_plain(s, f"scheduler_{i}/state", tensors) for i, s in enumerate(state.schedulers)],
        "scaler": None if state.scaler is None else to_plain(state.scaler, "scaler/state", tensors),
        "engine": {},
        "engine_settings": {},
        "custom": [to_plain(s, f"custom_{i}/state", tensors) for i, s in enumerate(state.custom)],
    }
    return training, {name: TensorShard.whole(tensor) for name, tensor in tensors.items()}


def _num_ranks(state: PortableState) -> int:
    return max(state.generators, default=0) + 1


def _manifest(state: PortableState) -> Manifest:
    ties = {alias: name for alias, name in state.ties.items() if name in state.weights}
    return Manifest(
        step=state.step,
        epoch=state.epoch,
        samples=0,
        world_size=_num_ranks(state),
        strategy=f"converted from {state.kind}",
        mixed_precision="no",
        ties={f"model/{alias}": f"model/{name}" for alias, name in ties.items()},
    )


class _LatestTensor:
    """The tensor that is being written, kept while several threads write its pieces."""

    def __init__(self, on_progress: Callable[[int], None]) -> None:
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._name = ""
        self._tensor = torch.empty(0)

    def get(self, full: str, read: Callable[[], Tensor]) -> Tensor:
        """The tensor of that name, flattened; the previous one is released."""
        with self._lock:
            if self._name != full:
                self._name, self._tensor = full, read().reshape(-1)
                self._on_progress(self._tensor.numel() * self._tensor.element_size())
            return self._tensor


@dataclass(frozen=True, slots=True)
class _LazyShard(TensorShard):
    """A whole tensor that is read when its first piece is written."""

    fetch: Callable[[], Tensor]

    @classmethod
    def of(cls, tensors: LazyTensors, name: str, full: str, cache: _LatestTensor) -> _LazyShard:
        """A tensor of a state, under its name in the checkpoint."""
        slot = tensors.slot(name)
        empty = torch.empty(slot.shape, dtype=slot.dtype, device="meta")
        return cls(slot.shape, 0, empty, lambda: cache.get(full, lambda: tensors[name]))

    @override
    def flat(self) -> Tensor:
        return self.fetch()
