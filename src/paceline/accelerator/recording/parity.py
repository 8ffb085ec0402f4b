"""Records what `paceline parity` compares: samples, losses, gradient norms and learning rates, step by step."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from paceline.accelerator.recording.dropout import watch_dropout
from paceline.accelerator.stepping import steps_taken
from paceline.collectives import as_bytes, leaves
from paceline.environment.random_generators import is_seeded, set_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from paceline.accelerator.stepping import AcceleratedOptimizer
    from paceline.collectives import Group
    from paceline.config import Recording
    from paceline.data import PreparedDataLoader
    from paceline.strategies import Strategy

__all__ = ["ParityRecorder", "Recorded"]

_IGNORED_LABEL = -100


class Recorded(Protocol):
    """The Accelerator, as far as the recorder uses it."""

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """Measure the norm of gradients, with a `max_norm` of infinity."""
        ...

    def get_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Gather all weights on rank 0."""
        ...

    @property
    def strategy(self) -> Strategy:
        """The strategy."""
        ...


class ParityRecorder:
    """Writes a line for each backward pass and each optimizer step of this rank.

    Reading numbers waits for the device, which does not matter in a run that is only checked.

    Args:
        recording: Where to write, and when to end.
        group: All ranks.
        run: The Accelerator.
        models: The prepared models; grows.
        optimizers: The prepared optimizers; grows.
    """

    def __init__(
        self,
        recording: Recording,
        group: Group,
        run: Recorded,
        models: Sequence[nn.Module],
        optimizers: Sequence[AcceleratedOptimizer],
    ) -> None:
        self._recording = recording
        self._group = group
        self._run = run
        self._models = models
        self._optimizers = optimizers
        self._batch: dict[str, Any] = {}
        self._norm: float | None = None
        self._last_micro_batch = (-1, 0)
        self._has_dropout = False
        self._has_begun = False
        self._is_measuring = False
        folder = Path(recording.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank-{group.rank:05d}.jsonl"
        seeded = is_seeded()
        if not seeded:
            set_seed(0)
        watch_dropout(self._note_dropout, keep=recording.keep_dropout)
        self._write("start", seeded=seeded, matmul=torch.get_float32_matmul_precision(), ranks=group.size)

    def _write(self, kind: str, **what: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **what}) + "\n")

    def _note_dropout(self) -> None:
        if not self._has_dropout:
            self._has_dropout = True
            self._write("dropout")

    def note_batch(self, loader: PreparedDataLoader, batch: Any) -> None:
        """Remember the batch that is handed out; before the first one, record the weights that training begins with."""
        if not self._has_begun and self._models:
            self._has_begun = True
            self._write("model", **self._first_weights())
        position = loader.state_dict()
        self._batch = {
            "epoch": position.get("epoch"),
            "samples": position.get("samples"),
            **_contents(batch),
        }

    def _first_weights(self) -> dict[str, Any]:
        weights: dict[str, int] = {}
        norms: list[str] = []
        for index, model in enumerate(self._models):
            for name, tensor in self._run.get_state_dict(model).items():
                weights[f"{index}.{name}"] = _checksum(tensor)
            norms += [
                name
                for name, module in model.named_modules()
                if isinstance(module, _BatchNorm) and not isinstance(module, torch.nn.SyncBatchNorm)
            ]
        return {"weights": weights, "batch_norms": norms}

    def note_loss(self, loss: Tensor, weight: float | Tensor | None = None) -> None:
        """Write a line before the backward pass of a loss; end the run at the step where it should end."""
        step = steps_taken(self._optimizers)
        if step >= self._recording.stop_at:
            raise SystemExit(0)
        micro_batch = self._last_micro_batch[1] + 1 if self._last_micro_batch[0] == step else 0
        self._last_micro_batch = step, micro_batch
        self._write(
            "loss",
            step=step,
            micro=micro_batch,
            loss=float(loss.detach().double().mean()),
            weight=None if weight is None else float(weight),
            **self._batch,
        )

    def note_norm(self, norm: Tensor, norm_type: float) -> None:
        """Remember the norm that the script's own clipping measured."""
        if norm_type == 2 and not self._is_measuring:
            self._norm = float(norm)

    def note_schedule(self, name: str, steps: int | None) -> None:
        """Write down how many optimizer steps a prepared schedule is made for, where that is known."""
        if steps is not None:
            self._write("schedule", name=name, steps=steps)

    def watching(self, before_step: Callable[[], None], index: int) -> Callable[[], None]:
        """Return what an optimizer calls before each step: `before_step`, then a line is written."""

        def note_step() -> None:
            before_step()
            optimizer = self._optimizers[index]
            norm = self._norm if self._norm is not None else self._measure(optimizer)
            self._norm = None
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            self._write("step", optimizer=index, step=optimizer.num_steps, norm=norm, rates=rates)

        return note_step

    def _measure(self, optimizer: AcceleratedOptimizer) -> float:
        self._is_measuring = True
        try:
            parameters = self._run.strategy.parameters_of(optimizer.optimizer)
            return float(self._run.clip_grad_norm_(parameters, float("inf")))
        finally:
            self._is_measuring = False


def _contents(batch: Any) -> Mapping[str, Any]:
    """A checksum of each sample, the shapes of samples, and how many labels count for the loss."""
    rows: list[int] = []
    shapes: list[list[int]] = []
    labels = None
    for path, value in leaves(batch):
        if not isinstance(value, torch.Tensor) or not value.ndim:
            continue
        if rows and value.shape[0] != len(rows):
            continue
        shapes.append(list(value.shape[1:]))
        host = value.detach().cpu()
        rows = [_checksum(row, crc) for row, crc in zip(host, rows or [0] * len(host), strict=True)]
        if path and path[-1] == "labels" and not value.is_floating_point():
            labels = int((host != _IGNORED_LABEL).sum())
    return {"rows": rows, "shapes": shapes, "labels": labels}


def _checksum(tensor: Tensor, crc: int = 0) -> int:
    raw = as_bytes(tensor.detach().cpu().contiguous()).numpy().tobytes()
    return zlib.crc32(raw, crc)
