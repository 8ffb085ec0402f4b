"""Measures what a step allocates, operation by operation, on tensors without memory.

A model is run under torch's `FakeTensorMode`: every operation computes shapes and no values. What is alive after each
operation is noted, so that the largest sum can be found for any layout of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from paceline.planner.repeated_blocks import BlockMarks, RepeatedBlocks, find_repeated_blocks
from paceline.planner.tensor_memory import TensorMemory

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MemoryCurve", "trace_inference", "trace_training"]

# Not 1: some operations do without a copy then. 512 apart: allocations are multiples of 512 bytes, and what a sample
# adds to a small tensor is exact only over that many.
_BATCHES = (2, 514)


@dataclass(frozen=True, slots=True)
class MemoryCurve:
    """Bytes alive at each allocation of a step, besides the weights, as linear functions of the batch size.

    Attributes:
        fixed: The part of activations that does not depend on the batch.
        per_sample: The part that each sample adds.
        gradients: Gradients of parameters.
        backward: The first moment of the backward pass.
        blocks: The first moment at which the backward pass is in a repeated block; before, it is in the loss.
    """

    fixed: NDArray[np.float64]
    per_sample: NDArray[np.float64]
    gradients: NDArray[np.float64]
    backward: int
    blocks: int

    def peak(self, batch: int, share: float = 1.0, extra: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> int:
        """Return the largest sum of activations and gradients.

        Args:
            batch: Samples of a micro-batch.
            share: The part of each gradient that stays on this rank.
            extra: Bytes to add during the forward, during the backward of the loss, and during that of the blocks.
        """
        total = self.fixed + batch * self.per_sample + share * self.gradients
        total[: self.backward] += extra[0]
        total[self.backward : self.blocks] += extra[1]
        total[self.blocks :] += extra[2]
        return int(total.max(initial=0.0))

    @property
    def all_gradients(self) -> int:
        """Bytes of the gradients of all parameters."""
        return int(self.gradients.max(initial=0.0))

    @classmethod
    def between(cls, small: MemoryCurve, large: MemoryCurve) -> MemoryCurve:
        """Make the curve of any batch from those of two sizes."""
        first, second = small.fixed, large.fixed
        gradients, backward, blocks = small.gradients, small.backward, small.blocks
        if len(first) != len(second):
            # The operations depend on the batch size, so that moments cannot be compared: take the two peaks.
            first, second, gradients = (np.array([each.max()]) for each in (first, second, gradients))
            backward = blocks = 0
        slope = (second - first) / (_BATCHES[1] - _BATCHES[0])
        return cls(first - _BATCHES[0] * slope, slope, gradients, backward, blocks)


def trace_training(
    model: nn.Module,
    loss_of: Callable[[nn.Module, int], torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    checkpointed: Iterable[str] = (),
) -> MemoryCurve:
    """Run forward and backward twice, with two batch sizes.

    Args:
        model: Any; those on the meta device need no memory.
        loss_of: Called with the model and a number of samples; returns the loss.
        dtype: What floating-point weights are computed in; None leaves them as they are.
        autocast: The dtype of an autocast region around the forward.
        checkpointed: Names of blocks that are recomputed in the backward.

    Returns:
        What is alive besides weights and optimizer state.
    """
    trace = _Trace(model, dtype, autocast, frozenset(checkpointed))
    return trace.curve(loss_of, is_training=True)


def trace_inference(
    model: nn.Module,
    call: Callable[[nn.Module, int], Any],
    *,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
) -> MemoryCurve:
    """Run forward without gradients, with two batch sizes; see `trace_training`."""
    return _Trace(model, dtype, autocast, frozenset()).curve(call, is_training=False)


@dataclass(frozen=True)
class _Trace:
    model: nn.Module
    dtype: torch.dtype | None
    autocast: torch.dtype | None
    checkpointed: frozenset[str]

    def curve(self, call: Callable[[nn.Module, int], Any], *, is_training: bool) -> MemoryCurve:
        blocks = find_repeated_blocks(self.model)
        small, large = (self._run(call, batch, blocks, is_training=is_training) for batch in _BATCHES)
        return MemoryCurve.between(small, large)

    def _run(
        self, call: Callable[[nn.Module, int], Any], batch: int, blocks: RepeatedBlocks | None, *, is_training: bool
    ) -> MemoryCurve:
        try:
            found = self._measure(call, batch, blocks, is_training=is_training)
        except (IndexError, KeyError):
            # A model that counts its blocks itself.
            if blocks is None:
                raise
            found = None
        return found or self._whole(call, batch, is_training=is_training)

    def _whole(self, call: Callable[[nn.Module, int], Any], batch: int, *, is_training: bool) -> MemoryCurve:
        found = self._measure(call, batch, None, is_training=is_training)
        assert found is not None
        return found

    def _measure(
        self, call: Callable[[nn.Module, int], Any], batch: int, blocks: RepeatedBlocks | None, *, is_training: bool
    ) -> MemoryCurve | None:
        with _FakeCopy(self.model, self.dtype) as copy:
            memory = TensorMemory([*copy.parameters(), *copy.buffers()])
            marks = BlockMarks(memory)
            for block in blocks.shorten(copy) if blocks else ():
                marks.watch(block)
            _checkpoint(copy, self.checkpointed)
            copy.train(is_training)
            parameters: Iterable[Any] = copy.parameters()
            for parameter in parameters:
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(memory.add_gradient)
            backward = self._step(copy, memory, partial(call, copy, batch), is_training=is_training)
        left_out = blocks.left_out if blocks else 0
        expanded = marks.expand(left_out, backward)
        if expanded is None:
            return None
        activations, gradients = expanded
        entered = marks.backward[0].index if marks.backward else backward
        if left_out:
            shift = left_out * (marks.forward[2].index - marks.forward[1].index)
            backward, entered = backward + shift, entered + shift
        return MemoryCurve(activations, np.zeros_like(activations), gradients, backward, entered)

    def _step(self, copy: nn.Module, memory: TensorMemory, call: Callable[[], Any], *, is_training: bool) -> int:
        """Run the step; return the moment at which the backward begins."""
        with memory, torch.set_grad_enabled(is_training):
            with _autocast(self.autocast):
                result = call()
            backward = len(memory.activations)
            if is_training:
                result.backward()
        return backward


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def _checkpoint(model: nn.Module, names: Container[str]) -> None:
    from torch.utils.checkpoint import checkpoint

    for name, block in model.named_modules():
        if name in names:
            # Random states are not saved: there are none of fake tensors.
            inner: Any = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            block.forward = inner


class _FakeCopy(AbstractContextManager[nn.Module]):
    """Opens a `FakeTensorMode` and makes a copy of a model in it, on the CPU: there its operations are known."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._model = model
        self._dtype = dtype
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    @override
    def __enter__(self) -> nn.Module:
        import copy

        memo: dict[int, Any] = {}
        self._mode.__enter__()
        for tensor in _tensors(self._model):
            memo[id(tensor)] = self._copy(tensor)
        # Tied weights stay tied: a tensor has one copy.
        return copy.deepcopy(self._model, memo)

    @override
    def __exit__(self, *details: Any) -> None:
        self._mode.__exit__(*details)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = tensor.dtype
        if self._dtype is not None and tensor.is_floating_point():
            dtype = self._dtype
        empty = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(empty, requires_grad=tensor.requires_grad)
        return empty


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
