"""Copies tensors into pinned host memory with several threads.

One thread copies 6 to 10 GB/s into pinned memory, less than a GPU fetches over PCIe, so that pinning alone would take
longer than the step that it should hide behind. torch's own threads copy fastest (16 of them 113 MB in 1.1 ms on an
H200's host), if there are enough. Where the launcher has limited them, as for many ranks on a machine, threads of our
own copy. Small buffers that are used again, in place of pinned copies, were tried: 4.4 to 6.7 ms.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Pinner", "num_copiers"]

# Smaller tensors are copied faster than they are handed to threads.
_SPLIT_BYTES = 4 * 2**20
_MAX_COPIERS = 8


class Pinner:
    """Pins tensors; `close` ends its threads.

    Args:
        allocate: Makes a tensor of the same shape, dtype and strides in the memory to copy to.
        threads: How many copy at once.
    """

    def __init__(self, allocate: Callable[[Tensor], Tensor], threads: int) -> None:
        self._allocate = allocate
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "paceline-pin") if threads > 1 else None

    def pin(self, tensor: Tensor) -> Tensor:
        """Copy a tensor.

        Args:
            tensor: On the CPU.

        Returns:
            Its copy.
        """
        copy = self._allocate(tensor)
        if torch.get_num_threads() >= _MAX_COPIERS:
            return copy.copy_(tensor)
        if self._pool is not None and tensor.nbytes >= _SPLIT_BYTES and _is_plain(tensor) and copy.is_contiguous():
            self._copy_parts(self._pool, tensor, copy)
            return copy
        return copy.copy_(tensor)

    def _copy_parts(self, pool: ThreadPoolExecutor, tensor: Tensor, copy: Tensor) -> None:
        # Copied as bytes, which numpy does for every dtype, without the lock of the interpreter and torch's threads.
        source, target = _bytes_of(tensor), _bytes_of(copy)
        bounds = np.linspace(0, len(source), self._threads + 1, dtype=np.int64)
        parts = [slice(start, end) for start, end in pairwise(bounds.tolist())]
        for done in [pool.submit(np.copyto, target[part], source[part]) for part in parts]:
            done.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's values are the bytes at its address, in order."""
    is_lazy = tensor.is_conj() or tensor.is_neg()
    return type(tensor) is Tensor and tensor.is_contiguous() and not (is_lazy or tensor.requires_grad)


def _bytes_of(tensor: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    flat: np.ndarray[tuple[int], np.dtype[np.uint8]] = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return flat


def num_copiers(num_devices: int) -> int:
    """How many threads of a rank copy, so that the ranks of a machine do not compete for its cores.

    Args:
        num_devices: Accelerators of this machine, each with a rank.

    Returns:
        From 1 to 8.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MAX_COPIERS, cores // (2 * max(1, num_devices))))
