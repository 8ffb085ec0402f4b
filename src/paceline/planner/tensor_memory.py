"""Counts the memory of tensors, operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

__all__ = ["TensorMemory"]


class TensorMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations create, for as long as they live.

    Args:
        known: Tensors that are there before, which are not counted.
        granularity: Each allocation is rounded up to a multiple of it, as allocators of devices do.

    Attributes:
        activations: Bytes alive after each allocation, without gradients of parameters.
        gradients: Bytes of those gradients at the same moments.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), granularity: int = 512) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.activations: list[int] = []
        self.gradients: list[int] = []
        self._granularity = granularity
        self._known = [_storage(tensor) for tensor in known]  # kept, so that no other gets their keys
        self._sizes: dict[int, int] = {storage._cdata: 0 for storage in self._known}
        self._references: dict[int, Any] = {}
        self._of_gradients: set[int] = set()
        self._alive = 0
        self._alive_gradients = 0

    @property
    def level(self) -> tuple[int, int]:
        """Bytes of activations and of gradients alive now."""
        return self._alive, self._alive_gradients

    @property
    def peak(self) -> int:
        """The largest sum so far."""
        return max((a + g for a, g in zip(self.activations, self.gradients, strict=True)), default=0)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = _storage(tensor)
        key = storage._cdata
        if key in self._sizes:
            return
        size = -(-storage.nbytes() // self._granularity) * self._granularity
        self._sizes[key] = size
        self._references[key] = weakref.ref(storage, partial(self._remove, key))
        self._alive += size
        self._note()

    def add_gradient(self, parameter: torch.Tensor) -> None:
        """Count a parameter's gradient as one from now on, not as an activation."""
        if parameter.grad is None:
            return
        self.add(parameter.grad)
        key = _storage(parameter.grad)._cdata
        if key not in self._of_gradients:
            self._of_gradients.add(key)
            self._alive -= self._sizes[key]
            self._alive_gradients += self._sizes[key]

    def _remove(self, key: int, _reference: Any) -> None:
        size = self._sizes.pop(key, 0)
        self._references.pop(key, None)
        if key in self._of_gradients:
            self._of_gradients.discard(key)
            self._alive_gradients -= size
        else:
            self._alive -= size

    def _note(self) -> None:
        self.activations.append(self._alive)
        self.gradients.append(self._alive_gradients)


def _storage(tensor: Any) -> torch.UntypedStorage:
    """The storage of a tensor; of a sharded one, that of this rank's part."""
    storage: torch.UntypedStorage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
    return storage
