"""Predictions of evaluation batches, and how they are joined: samples of different batches are never merged."""

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
_KEEP_APART = "Set eval_do_concat_batches=False: then compute_metrics and predict get a list with an entry per batch"


class KeptBatches:
    """Predictions of the batches so far: the latest on the device, the others in host memory.

    Args:
        every: Move them to host memory after this many batches; None moves them before they exceed 256 MiB.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._on_device: list[Any] = []
        self._on_host: list[Any] = []
        self._samples: list[int | None] = []
        self._device_bytes = 0

    def add(self, value: Any, samples: int | None) -> None:
        """Store a batch with its number of samples, if that is known."""
        self._on_device.append(value)
        self._samples.append(samples)
        tensors = (leaf for leaf in leaves_of(value) if isinstance(leaf, torch.Tensor))
        self._device_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        is_due = self._every is not None and len(self._on_device) >= self._every
        if is_due or self._device_bytes > _DEVICE_BYTES:
            self._move()

    def _move(self) -> None:
        self._on_host += [map_leaves(_to_host, value) for value in self._on_device]
        self._on_device.clear()
        self._device_bytes = 0

    def everything(self, *, concatenate: bool) -> Any:
        """All batches as one structure of arrays, or as a list with an entry per batch.

        Raises:
            PacelineError: They cannot be concatenated.
        """
        self._move()
        if not self._on_host:
            return None
        if not concatenate:
            return [map_leaves(to_numpy, value) for value in self._on_host]
        joined = {
            name: _joined([value[name] for value in self._on_host], self._samples, name) for name in self._on_host[0]
        }
        return map_leaves(to_numpy, joined)


def join_ranks(local: Any, gathered: Any) -> Any:
    """Concatenate the tensors of all ranks after `gather_object`; lists of entries are joined already.

    Args:
        local: What this rank sent.
        gathered: What came back: a list instead of each tensor.
    """
    if isinstance(local, torch.Tensor):
        return _cat(gathered, "The gathered value")
    if isinstance(local, Mapping):
        return {name: join_ranks(local[name], part) for name, part in gathered.items()}
    if isinstance(local, tuple) and not is_entry_list(local) and len(local) == len(gathered):
        return like(local, [join_ranks(one, part) for one, part in zip(local, gathered, strict=True)])
    return gathered


def to_numpy(value: Any) -> Any:
    """Convert a tensor to an array; return anything else unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:
        value = value.float()
    return value.numpy()


def _to_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    return value


def _joined(parts: list[Any], samples: Sequence[int | None], where: str) -> Any:
    """Join the structures of all batches."""
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
    """Whether a sequence has an entry per sample, rather than being a structure of batched tensors.

    Raises:
        PacelineError: That cannot be decided, and samples of different batches might be merged.
    """
    if len(parts) == 1 or all(map(is_entry_list, parts)):
        return True
    kind, sizes = type(parts[0]), {len(part) for part in parts}
    per_sample = _maybe_per_sample(parts, samples)
    if per_sample is None or (not per_sample and len(sizes) > 1):
        raise PacelineError(
            f"{where} is a {kind.__name__} of {' or '.join(map(str, sorted(sizes)))} tensors in each batch",
            "Whether each of them belongs to a sample is unclear, and samples of different batches must not be merged",
            _KEEP_APART,
        )
    return per_sample


def _maybe_per_sample(parts: list[Any], samples: Sequence[int | None]) -> bool | None:
    """Whether sequences of tensors have a tensor per sample; None if that is unclear."""
    kind = type(parts[0])
    evidence = [SampleEvidence.of(part, n) for part, n in zip(parts, samples, strict=True) if n is not None]
    if any(map(is_ambiguous, parts)):
        if len(evidence) == len(parts):
            return maybe_per_sample(evidence, kind)
        return None
    # A tuple of tensors is a structure, unless they look like those of single samples.
    if not any(map(is_uniform_tensor_tuple, parts)) or maybe_per_sample(evidence, kind) is not True:
        return False
    return None


def _cat(parts: list[torch.Tensor], where: str) -> torch.Tensor:
    """Concatenate along dimension 0; pad dimension 1 with -100 to the largest size."""
    parts = [part if part.dim() else part.reshape(1) for part in parts]
    if parts[0].dim() > 1:
        width = max(part.shape[1] for part in parts)
        parts = [_widened(part, width) for part in parts]
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = ", ".join(str(tuple(shape)) for shape in dict.fromkeys(part.shape for part in parts))
        raise PacelineError(
            f"{where} has the shapes {shapes}", "Batches are concatenated along dimension 0", _KEEP_APART
        )
    return torch.cat(parts)


def _widened(part: torch.Tensor, width: int) -> torch.Tensor:
    if part.shape[1] == width:
        return part
    other_dims = (0, 0) * (part.dim() - 2)
    return F.pad(part, (*other_dims, 0, width - part.shape[1]), value=PADDING)
