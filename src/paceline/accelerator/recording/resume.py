"""Records what `paceline verify-resume` compares: batches and losses."""

from __future__ import annotations

import json
import os
import signal
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paceline.collectives import as_bytes, leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from paceline.collectives import Group
    from paceline.config import Recording
    from paceline.data import PreparedDataLoader

__all__ = ["ResumeRecorder", "counted_steps"]


class ResumeRecorder:
    """Writes a line for each backward pass of this rank: the step, the batch, and the loss.

    Reading the loss waits for the device, which does not matter in a run that is only checked.

    Args:
        recording: Where to write, and when to end or be killed.
        group: All ranks.
        steps: Returns the number of optimizer steps taken.
        restored: Returns the number of steps that loaded states of optimizers have counted.
        finish_save: Waits for a save that is still being written.
    """

    def __init__(
        self,
        recording: Recording,
        group: Group,
        steps: Callable[[], int],
        restored: Callable[[], int],
        finish_save: Callable[[], None],
    ) -> None:
        self._recording = recording
        self._group = group
        self._steps = steps
        self._restored = restored
        self._before: int | None = None
        self._finish_save = finish_save
        self._batch: dict[str, Any] = {}
        self._last = (-1, 0)
        folder = Path(recording.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank-{group.rank:05d}.jsonl"

    def note_batch(self, loader: PreparedDataLoader, batch: Any) -> None:
        """Remember the batch that is handed out."""
        position = loader.state_dict()
        self._batch = {
            "epoch": position.get("epoch"),
            "samples": position.get("samples"),
            "content": _digest(batch),
        }

    def note_norm(self, norm: Tensor, norm_type: float) -> None:
        """Record no norms."""

    def note_schedule(self, name: str, steps: int | None) -> None:
        """Record no schedules."""

    def watching(self, before_step: Callable[[], None], index: int) -> Callable[[], None]:
        """Record no steps."""
        return before_step

    def note_loss(self, loss: Tensor, weight: float | Tensor | None = None) -> None:
        """Write a line before the backward pass of a loss; end the run at the step where it should end."""
        step = self._step()
        if step >= self._recording.stop_at:
            raise SystemExit(0)
        if step == self._recording.kill_at and self._group.rank == self._group.size - 1:
            # Short steps may be over before the only checkpoint is complete: that would say nothing of the script.
            self._finish_save()
            os.kill(os.getpid(), signal.SIGKILL)
        micro_batch = self._last[1] + 1 if self._last[0] == step else 0
        self._last = step, micro_batch
        line = {"step": step, "micro": micro_batch, "loss": float(loss.detach().float().mean()), **self._batch}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _step(self) -> int:
        """The optimizer steps taken, those before a checkpoint included.

        A Trainer of transformers loads its optimizer itself, without `load_state`, which restores the count.
        """
        if self._before is None:
            self._before = max(self._restored() - self._steps(), 0)
        return self._steps() + self._before


def counted_steps(optimizers: Iterable[Any]) -> int:
    """The steps that the states of optimizers have counted; 0 where none counts them, as SGD does not."""
    states = [state for optimizer in optimizers for state in getattr(optimizer, "state", {}).values()]
    return max((int(state["step"]) for state in states if isinstance(state, dict) and "step" in state), default=0)


def _digest(batch: Any) -> str:
    """A checksum of all values in a batch."""
    crc = 0
    for _, value in leaves(batch):
        if isinstance(value, torch.Tensor):
            raw = as_bytes(value.detach().cpu().contiguous()).numpy().tobytes()
        else:
            raw = repr(value).encode()
        crc = zlib.crc32(raw, crc)
    return f"{crc:08x}"
