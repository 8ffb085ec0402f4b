"""What an evaluation keeps of its batches, and how it becomes one: samples of different batches are never merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from paceline.collectives import SampleEvidence, is_ambiguous, is_entry_list, is_uniform_tensor_tuple, maybe_per_sample
from paceline.errors import PacelineError
from paceline.trainer.batches.nested import leaves_of, like, map_leaves

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PADDING", "KeptBatches", "join_ranks", "to_numpy"]

PADDING = -100
_DEVICE_BYTES = 256 * 2**20
_APART = "Set eval_do_concat_batches=False: then compute_metrics and predict get a list, one entry a batch"


class KeptBatches:
    """Predictions of the batches so far: the newest on the device, the others in host memory.

    Args:
        every: Move to host memory after so many batches; None lets memory decide.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._waiting: list[Any] = []
        self._stored: list[Any] = []
        self._samples: list[int | None] = []
        self._bytes_waiting = 0

    def add(self, value: Any, samples: int | None) -> None:
        """Keep one batch of so many samples; move to host memory what has become too much."""
        self._waiting.append(value)
        self._samples.append(samples)
        found = (leaf for leaf in leaves_of(value) if isinstance(leaf, torch.Tensor))
        self._bytes_waiting += sum(tensor.numel() * tensor.element_size() for tensor in found)
        due = self._every is not None and len(self._waiting) >= self._every
        if due or self._bytes_waiting > _DEVICE_BYTES:
            self._move()

    def _move(self) -> None:
        self._stored += [map_leaves(_to_host, value) for value in self._waiting]
        self._waiting.clear()
        self._bytes_waiting = 0

    def everything(self, *, concatenate: bool) -> Any:
        """All batches as one structure of arrays, or as a list of structures.

        Raises:
            PacelineError: They cannot become one.
        """
        self._move()
        if not self._stored:
            return None
        if not concatenate:
            return [map_leaves(to_numpy, value) for value in self._stored]
        joined = {
            name: _joined([value[name] for value in self._stored], self._samples, name) for name in self._stored[0]
        }
        return map_leaves(to_numpy, joined)


def join_ranks(own: Any, gathered: Any) -> Any:
    """Make one tensor of those that ranks sent as objects; lists of entries are one list already.

    Args:
        own: What this rank sent.
        gathered: What came back: a list in place of each tensor.
    """
    if isinstance(own, torch.Tensor):
        return _cat(gathered, "what was gathered")
    if isinstance(own, Mapping):
        return {name: join_ranks(own[name], part) for name, part in gathered.items()}
    if isinstance(own, tuple) and not is_entry_list(own) and len(own) == len(gathered):
        return like(own, [join_ranks(mine, part) for mine, part in zip(own, gathered, strict=True)])
    return gathered


def to_numpy(value: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _to_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def _joined(parts: list[Any], samples: Sequence[int | None], where: str) -> Any:
    """One structure from those of all batches."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return _cat(parts, where)
    if isinstance(first, np.ndarray):
        return _cat([torch.from_numpy(part) for part in parts], where).numpy()
    if isinstance(first, Mapping):
        return {name: _joined([part[name] for part in parts], samples, f"{where}[{name!r}]") for name in first}
    if not isinstance(first, list | tuple):
        return parts
    if _are_entries(parts, samples, where):
        return type(first)(entry for part in parts for entry in part)
    columns = zip(*parts, strict=True)
    return like(first, [_joined(list(column), samples, f"{where}[{n}]") for n, column in enumerate(columns)])


def _are_entries(parts: list[Any], samples: Sequence[int | None], where: str) -> bool:
    """Say whether a sequence is one entry a sample, rather than a set of tensors.

    Raises:
        PacelineError: That cannot be told, so that samples of different batches might be merged.
    """
    if len(parts) == 1 or all(map(is_entry_list, parts)):
        return True
    kind, sizes = type(parts[0]), {len(part) for part in parts}
    seen = [SampleEvidence.of(part, n) for part, n in zip(parts, samples, strict=True) if n is not None]
    per_sample: bool | None = None
    if any(map(is_ambiguous, parts)):
        per_sample = maybe_per_sample(seen, kind) if len(seen) == len(parts) else None
    elif not any(map(is_uniform_tensor_tuple, parts)) or maybe_per_sample(seen, kind) is not True:
        # A tuple of tensors is structure, unless they look like those of single samples.
        per_sample = False
    if per_sample is None or (not per_sample and len(sizes) > 1):
        raise PacelineError(
            f"{where} is a {kind.__name__} of {' or '.join(map(str, sorted(sizes)))} tensors in each batch",
            "It cannot be told whether each entry belongs to a sample, and samples of different batches must not be "
            "merged",
            _APART,
        )
    return per_sample


def _cat(parts: list[torch.Tensor], where: str) -> torch.Tensor:
    """Join along dimension 0; what differs in dimension 1 is padded with -100."""
    parts = [part if part.dim() else part.reshape(1) for part in parts]
    if parts[0].dim() > 1:
        width = max(part.shape[1] for part in parts)
        parts = [_widened(part, width) for part in parts]
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = ", ".join(str(tuple(shape)) for shape in dict.fromkeys(part.shape for part in parts))
        raise PacelineError(f"{where} has the shapes {shapes}", "Batches are joined along dimension 0", _APART)
    return torch.cat(parts)


def _widened(part: torch.Tensor, width: int) -> torch.Tensor:
    if part.shape[1] == width:
        return part
    room = (0, 0) * (part.dim() - 2)
    return F.pad(part, (*room, 0, width - part.shape[1]), value=PADDING)
