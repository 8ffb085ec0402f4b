"""Blocks that a model repeats: a few of them are traced, and stand for all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.planner.tensor_memory import TensorMemory

__all__ = ["BlockMarks", "RepeatedBlocks", "find_repeated_blocks"]

# The first and the last may differ from those between, and only those are multiplied.
_KEPT = 3


@dataclass(frozen=True, slots=True)
class RepeatedBlocks:
    """Equal blocks in a row.

    Attributes:
        container: Name of the list that holds them.
        names: Their names.
    """

    container: str
    names: tuple[str, ...]

    @property
    def left_out(self) -> int:
        """How many need not be traced."""
        return max(len(self.names) - _KEPT, 0)

    def shorten(self, model: nn.Module) -> list[nn.Module]:
        """Keep three of the blocks in a model, and return them; all others go."""
        container: Any = model.get_submodule(self.container)
        kept = list(container)[:_KEPT]
        del container[_KEPT:]
        return kept


def find_repeated_blocks(model: nn.Module) -> RepeatedBlocks | None:
    """Find the list with most parameters whose modules are all equal; None if there is none worth shortening."""
    found: list[tuple[int, RepeatedBlocks]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > _KEPT and _are_equal(module):
            size = sum(parameter.numel() for parameter in module.parameters())
            names = tuple(f"{name}.{index}" if name else str(index) for index in range(len(module)))
            found.append((size, RepeatedBlocks(name, names)))
    return max(found, key=lambda each: each[0])[1] if found else None


def _are_equal(modules: nn.ModuleList) -> bool:
    shapes = [(type(module), [(n, p.shape, p.dtype) for n, p in module.named_parameters()]) for module in modules]
    return len(list(groupby(shapes))) == 1 and bool(shapes[0][1])


@dataclass(slots=True)
class _Mark:
    index: int
    activations: int
    gradients: int


@dataclass(slots=True)
class BlockMarks:
    """Where in a trace each of the three blocks begins, forward and backward.

    Attributes:
        memory: What counts.
        forward: A mark for each block, in the order of the forward.
        backward: The same, in the order of the backward.
    """

    memory: TensorMemory
    forward: list[_Mark] = field(default_factory=list)
    backward: list[_Mark] = field(default_factory=list)

    def watch(self, block: nn.Module) -> None:
        """Note when a block is entered, in both passes."""
        block.register_forward_pre_hook(lambda _module, _inputs: self.forward.append(self._mark()))
        block.register_forward_hook(self._watch_output)

    def _watch_output(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if tensors:
            tensors[0].register_hook(lambda _gradient: self.backward.append(self._mark()))

    def _mark(self) -> _Mark:
        return _Mark(len(self.memory.activations), *self.memory.level)

    def expand(self, left_out: int, turn: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Write the trace as if all blocks had been there; None if the marks are not those of three blocks.

        Args:
            left_out: How many blocks are missing.
            turn: The first moment of the backward pass.
        """
        activations = np.array(self.memory.activations, dtype=np.float64)
        gradients = np.array(self.memory.gradients, dtype=np.float64)
        if left_out == 0:
            return activations, gradients
        if len(self.forward) != _KEPT or len(self.backward) not in (0, _KEPT):
            return None
        pieces = list(self._pieces(activations, gradients, left_out, turn))
        return np.concatenate([a for a, _ in pieces]), np.concatenate([g for _, g in pieces])

    def _pieces(
        self, activations: NDArray[np.float64], gradients: NDArray[np.float64], left_out: int, turn: int
    ) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        _, second, third = self.forward
        kept = third.activations - second.activations
        yield activations[: third.index], gradients[: third.index]
        for copy in range(1, left_out + 1):
            part = slice(second.index, third.index)
            yield activations[part] + copy * kept, gradients[part]
        if not self.backward:
            yield activations[third.index :] + left_out * kept, gradients[third.index :]
            return
        _, middle, first = self.backward
        yield activations[third.index : turn] + left_out * kept, gradients[third.index : turn]
        # What autocast cast for a block is gone when the forward ends, unless the backward needs it.
        kept = middle.activations - first.activations
        yield activations[turn : middle.index] + left_out * kept, gradients[turn : middle.index]
        grown = first.gradients - middle.gradients
        for copy in range(left_out + 1):
            part = slice(middle.index, first.index)
            yield activations[part] + (left_out - copy) * kept, gradients[part] + copy * grown
        yield activations[first.index :], gradients[first.index :] + left_out * grown
