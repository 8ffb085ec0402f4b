"""What training and inference take on each rank, under every strategy, before anything is started.

Weights, gradients and optimizer state are counted; activations come from a trace of one step (`planner/trace.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from paceline.planner.tensor_memory import TensorMemory
from paceline.planner.trace import MemoryCurve, trace_inference, trace_training

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["MOST_SAMPLES", "Estimator", "Layout", "ModelSize", "OptimizerCost", "RankMemory", "layouts"]

_PROBE = 4096
_FP32: Final = 4
# DeepSpeed keeps that many gathered parameters of ZeRO-3 before it frees those that it has used (its default).
_ZERO3_LIVE: Final = 1_000_000_000
MOST_SAMPLES: Final = 1 << 20
"""The largest micro-batch that is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A way to train, or to run a model.

    Attributes:
        name: As the table shows it.
        strategy: `single`, `ddp`, `fsdp`, `zero1`, `zero2`, `zero3` or `inference`.
        reshard: Under FSDP2: whether weights are sharded again after the forward.
        checkpointing: Whether blocks are recomputed in the backward.
        offload: Whether weights or optimizer state are in host memory.
        flags: What to write after `paceline launch`.
    """

    name: str
    strategy: str
    reshard: bool = True
    checkpointing: bool = False
    offload: bool = False
    flags: str = ""


_ZERO = "--use_deepspeed --zero_stage"
_SHARDED: Final = (
    Layout(name="ZeRO-1", strategy="zero1", flags=f"{_ZERO} 1"),
    Layout(name="ZeRO-2", strategy="zero2", flags=f"{_ZERO} 2"),
    Layout(
        name="FSDP2, weights kept after the forward",
        strategy="fsdp",
        reshard=False,
        flags="--use_fsdp --fsdp_reshard_after_forward false",
    ),
    Layout(name="FSDP2", strategy="fsdp", flags="--use_fsdp"),
    Layout(name="ZeRO-3", strategy="zero3", flags=f"{_ZERO} 3"),
    Layout(
        name="FSDP2, activation checkpointing",
        strategy="fsdp",
        checkpointing=True,
        flags="--use_fsdp --fsdp_activation_checkpointing true",
    ),
)
_OFFLOADED: Final = (
    Layout(
        name="ZeRO-2, optimizer in host memory",
        strategy="zero2",
        offload=True,
        flags=f"{_ZERO} 2 --offload_optimizer_device cpu",
    ),
    Layout(
        name="ZeRO-3, weights and optimizer in host memory",
        strategy="zero3",
        offload=True,
        flags=f"{_ZERO} 3 --offload_param_device cpu --offload_optimizer_device cpu",
    ),
    Layout(
        name="FSDP2, checkpointing, weights in host memory",
        strategy="fsdp",
        checkpointing=True,
        offload=True,
        flags="--use_fsdp --fsdp_activation_checkpointing true --fsdp_offload_params true",
    ),
)


def layouts(num_processes: int) -> tuple[Layout, ...]:
    """Return the ways to train on this many ranks, the least sharding first."""
    if num_processes > 1:
        ddp = Layout(name="DDP", strategy="ddp", flags="--strategy ddp")
        return (ddp, replace(ddp, name="DDP, activation checkpointing", checkpointing=True), *_SHARDED, *_OFFLOADED)
    single = Layout(name="single", strategy="single")
    return (
        single,
        replace(single, name="single, activation checkpointing", checkpointing=True),
        *(each for each in _OFFLOADED if each.strategy != "zero3"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on the rank that needs most.

    Attributes:
        layout: The way to train.
        num_processes: Ranks.
        batch: Samples of a rank's micro-batch.
        weights: Weights and buffers.
        gradients: Gradients, when all are there.
        optimizer: Optimizer state, with its copy of the weights if it has one.
        activations: What forward and backward create, at most.
        communication: Weights gathered for computing, gradients on their way to other ranks.
        peak: The most at any moment; less than the sum, as not all is there at once.
        host: Bytes of host memory for each rank.
    """

    layout: Layout
    num_processes: int
    batch: int
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    communication: int = 0
    peak: int = 0
    host: int = 0


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The parameters of a model, by the units in which they are sharded.

    Attributes:
        units: The parameters of each block.
        root: Those outside of blocks.
        buffers: Bytes of buffers.
    """

    units: tuple[tuple[nn.Parameter, ...], ...]
    root: tuple[nn.Parameter, ...]
    buffers: int

    @classmethod
    def of(cls, model: nn.Module, blocks: Sequence[str]) -> ModelSize:
        """Measure a model.

        Args:
            model: It may be on the meta device.
            blocks: Names of the blocks, inner ones before outer ones.
        """
        taken: set[int] = set()
        units = []
        for name in blocks:
            own = tuple(p for p in model.get_submodule(name).parameters() if id(p) not in taken)
            taken.update(id(p) for p in own)
            units.append(own)
        root = tuple(p for p in model.parameters() if id(p) not in taken)
        return cls(tuple(units), root, sum(b.numel() * b.element_size() for b in model.buffers()))

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """All of them."""
        return (*(p for unit in self.units for p in unit), *self.root)

    @property
    def largest_unit(self) -> int:
        """Elements of the largest block."""
        return max((_elements(unit) for unit in self.units), default=0)


def _elements(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _trained(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def _shard(parameters: Sequence[nn.Parameter], ranks: int) -> int:
    """Elements on rank 0, which has a whole row more where rows cannot be divided evenly."""
    return sum(-(-p.shape[0] // ranks) * (p.numel() // p.shape[0]) if p.dim() and p.numel() else 1 for p in parameters)


@dataclass(frozen=True, slots=True)
class OptimizerCost:
    """What an optimizer keeps and creates, in bytes for each element of a parameter.

    Attributes:
        state: What it keeps between steps.
        temporary: What a step creates for all parameters at once.
        for_one: What a step creates for one parameter after the other.
    """

    state: float
    temporary: float
    for_one: float

    @classmethod
    def measure(cls, make: Callable[[list[nn.Parameter]], Optimizer], dtype: torch.dtype) -> OptimizerCost:
        """Let an optimizer take steps on small parameters.

        Args:
            make: Builds the optimizer from parameters.
            dtype: The dtype of the weights that it updates.
        """
        kept, four = _step_of(make, 4, dtype)
        _, eight = _step_of(make, 8, dtype)
        temporary = (eight - four) / 4
        return cls(kept / 4 / _PROBE, temporary / _PROBE, max(four - 4 * temporary, 0) / _PROBE)

    def update(self, parameters: Sequence[nn.Parameter], ranks: int = 1) -> int:
        """Return the bytes that a step creates on this rank.

        Args:
            parameters: All that it updates.
            ranks: Ranks over which each is sharded.
        """
        largest = max((_shard([parameter], ranks) for parameter in parameters), default=0)
        return int(_shard(parameters, ranks) * self.temporary + largest * self.for_one)


def _step_of(make: Callable[[list[nn.Parameter]], Optimizer], count: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that an optimizer keeps for some parameters, and that its second step creates."""
    parameters = [nn.Parameter(torch.zeros(_PROBE // 64, 64, dtype=dtype)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make(parameters)
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    kept = sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1)
    known = [*parameters, *tensors, *(p.grad for p in parameters if p.grad is not None)]
    with TensorMemory(known, granularity=1) as memory:
        optimizer.step()
    return kept, memory.peak


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What a rank of a sharded strategy keeps, in bytes.

    Attributes:
        weights: On the device.
        gradients: On the device.
        optimizer: On the device.
        update: What the optimizer's step needs besides weights and state.
        host: In host memory.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    update: int = 0
    host: int = 0

    def offloaded(self, *, keeps_weights: bool, copies: int) -> _State:
        """Move the optimizer to the host, and the weights unless they are kept.

        Args:
            keeps_weights: Whether the device keeps them.
            copies: Bytes of the copies that the host works on.
        """
        moved = self.optimizer + copies + (0 if keeps_weights else self.weights)
        return replace(self, weights=self.weights if keeps_weights else 0, optimizer=0, update=0, host=moved)


@dataclass(frozen=True)
class Estimator:
    """Estimates a model's memory for any layout, number of ranks and batch.

    Attributes:
        model: The model, also on the meta device.
        blocks: The names of its blocks, inner ones before outer ones.
        loss_of: Called with the model and a number of samples; returns the loss. None leaves activations out.
        call: The same for inference.
        optimizer: What the optimizer takes.
        compute: The dtype of mixed precision; None computes in that of the weights.
        accumulation: Micro-batches for each optimizer step.
        progress: Called with a line before each trace.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    loss_of: Callable[[nn.Module, int], torch.Tensor] | None
    call: Callable[[nn.Module, int], object] | None
    optimizer: OptimizerCost
    compute: torch.dtype | None
    accumulation: int = 1
    progress: Callable[[str], None] = print

    @cached_property
    def size(self) -> ModelSize:
        """The model's parameters."""
        return ModelSize.of(self.model, self.blocks)

    @cached_property
    def _curves(self) -> dict[tuple[object, ...], MemoryCurve | None]:
        return {}

    def _curve(self, dtype: torch.dtype | None, *, checkpointing: bool, autocast: bool = True) -> MemoryCurve | None:
        key = (dtype, checkpointing, autocast)
        if self.loss_of is None:
            return None
        if key not in self._curves:
            what = "training" + (", checkpointed" if checkpointing else "") + (f", weights in {dtype}" if dtype else "")
            self.progress(f"tracing a step: {what}")
            self._curves[key] = trace_training(
                self.model,
                self.loss_of,
                dtype=dtype,
                autocast=self.compute if autocast else None,
                checkpointed=self.blocks if checkpointing else (),
            )
        return self._curves[key]

    def _inference_curve(self, dtype: torch.dtype) -> MemoryCurve | None:
        if self.call is None:
            return None
        key = (dtype, "inference")
        if key not in self._curves:
            self.progress(f"tracing a forward: weights in {dtype}")
            self._curves[key] = trace_inference(self.model, self.call, dtype=dtype)
        return self._curves[key]

    @property
    def _width(self) -> int:
        """Bytes of an element of the weights."""
        return max((p.element_size() for p in self.size.parameters), default=_FP32)

    @property
    def _computed(self) -> int:
        """Bytes of an element that is computed with where weights are cast once, not in each operation."""
        return self.compute.itemsize if self.compute else self._width

    def inference(self, dtype: torch.dtype, batch: int) -> RankMemory:
        """Estimate a forward without gradients, on one rank.

        Args:
            dtype: The dtype of the weights.
            batch: Samples.
        """
        weights = _elements(self.size.parameters) * dtype.itemsize + self.size.buffers
        curve = self._inference_curve(dtype)
        activations = curve.peak(batch) if curve else 0
        name = f"inference, {str(dtype).removeprefix('torch.')}"
        return RankMemory(
            layout=Layout(name=name, strategy="inference"),
            num_processes=1,
            batch=batch,
            weights=weights,
            activations=activations,
            peak=weights + activations,
        )

    def training(self, layout: Layout, num_processes: int, batch: int) -> RankMemory:
        """Estimate a training step.

        Args:
            layout: The way to train.
            num_processes: Ranks.
            batch: Samples of a rank's micro-batch.
        """
        match layout.strategy:
            case "fsdp":
                return self._fsdp(layout, num_processes, batch)
            case "zero1" | "zero2" | "zero3":
                return self._zero(layout, num_processes, batch)
            case _:
                return self._replica(layout, num_processes, batch)

    def largest_batch(self, layout: Layout, num_processes: int, memory: int) -> int:
        """Return the largest micro-batch that fits, or 0; `MOST_SAMPLES` where larger ones may fit too.

        Args:
            layout: The way to train.
            num_processes: Ranks.
            memory: Bytes that a rank may take.
        """
        low, high = 0, MOST_SAMPLES
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.training(layout, num_processes, middle).peak <= memory
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _replica(self, layout: Layout, ranks: int, batch: int) -> RankMemory:
        """One device, and DDP: everything is whole."""
        trained = _trained(self.size.parameters)
        elements = _elements(trained)
        weights = sum(p.numel() * p.element_size() for p in self.size.parameters) + self.size.buffers
        gradients = sum(p.numel() * p.element_size() for p in trained)
        optimizer = int(elements * self.optimizer.state)
        curve = self._curve(None, checkpointing=layout.checkpointing)
        # DDP's buckets hold the gradients from the start; over several micro-batches they stay in any case.
        stays = layout.strategy == "ddp" or self.accumulation > 1
        activations = curve.peak(batch, share=0.0) if curve else 0
        step = activations + gradients
        if curve and not stays:
            step = curve.peak(batch)
        update = gradients + self.optimizer.update(trained)
        return RankMemory(
            layout=layout,
            num_processes=ranks,
            batch=batch,
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            activations=activations,
            peak=weights + optimizer + max(step, update),
        )

    def _fsdp(self, layout: Layout, ranks: int, batch: int) -> RankMemory:
        size, computed = self.size, self._computed
        trained = _trained(size.parameters)
        elements = _shard(trained, ranks)
        root, unit = _elements(size.root) * computed, size.largest_unit
        state = _State(
            weights=_shard(size.parameters, ranks) * self._width,
            gradients=elements * self._width,
            optimizer=int(elements * self.optimizer.state),
            update=elements * self._width + self.optimizer.update(trained, ranks),
        )
        # The root's weights stay from its forward to the end of the backward. Forward: a block's weights, the buffer
        # that they were gathered in, and that of the block before. Backward: the weights of a block and the next ones
        # in their buffer; and its gradients, and those of the block before, in fp32, on their way to other ranks.
        forward, backward, loss = 3 * unit * computed, 2 * unit * computed, unit * computed
        if not layout.reshard:
            blocks = _elements(size.parameters) * computed - root
            forward, backward, loss = blocks + unit * computed, blocks, blocks
        extra = (root + forward, 2 * root + loss, root + backward + unit * (computed + _FP32))
        last = 2 * root + _elements(size.root) * _FP32
        if layout.offload:
            state = _State(host=state.weights + state.gradients + state.optimizer)
        curve = self._curve(self.compute, checkpointing=layout.checkpointing)
        return self._assembled(self._row(layout, ranks, batch), state, curve, extra, last + state.gradients)

    def _zero(self, layout: Layout, ranks: int, batch: int) -> RankMemory:
        """DeepSpeed: weights in the computed dtype, and a flat fp32 copy of this rank's part beside the optimizer."""
        stage, computed = int(layout.strategy[-1]), self._computed
        elements, trained = _elements(self.size.parameters), _elements(_trained(self.size.parameters))
        part = -(-trained // ranks)
        state = _State(
            weights=(elements if stage < 3 else -(-elements // ranks)) * computed,
            gradients=(trained if stage == 1 else part) * computed,
            optimizer=int(part * (self.optimizer.state + _FP32)),
            update=part * _FP32,
        )
        gathered = 0
        if stage == 3:
            gathered = min(elements, _ZERO3_LIVE) * computed
        bucket = 2 * self.size.largest_unit * computed if stage > 1 else 0
        extra = (gathered, gathered + bucket, gathered + bucket)
        if layout.offload:
            state = state.offloaded(keeps_weights=stage < 3, copies=part * _FP32)
        curve = self._curve(self.compute, checkpointing=layout.checkpointing, autocast=False)
        return self._assembled(self._row(layout, ranks, batch), state, curve, extra, state.gradients + state.update)

    def _row(self, layout: Layout, ranks: int, batch: int) -> RankMemory:
        return RankMemory(layout=layout, num_processes=ranks, batch=batch)

    def _assembled(
        self,
        row: RankMemory,
        state: _State,
        curve: MemoryCurve | None,
        extra: tuple[int, int, int],
        last: int,
    ) -> RankMemory:
        """Fill in a row of a sharded strategy.

        Args:
            row: What is estimated.
            state: What stays on the device, and on the host.
            curve: What the step creates.
            extra: What is gathered and reduced during the forward, the loss, and the backward of the blocks.
            last: What there is when the backward ends, besides weights and optimizer.
        """
        step, activations = max(extra) + state.gradients, 0
        if curve is not None:
            share = state.gradients / max(curve.all_gradients, 1)
            step, activations = curve.peak(row.batch, share, extra), curve.peak(row.batch, share=0.0)
        stays = state.weights + state.optimizer + self.size.buffers
        return replace(
            row,
            weights=state.weights + self.size.buffers,
            gradients=state.gradients,
            optimizer=state.optimizer,
            activations=activations,
            communication=max(extra),
            peak=stays + max(step, last, state.update),
            host=state.host,
        )

    def rows(self, num_processes: int, batch: int) -> Iterator[RankMemory]:
        """Yield the estimate of every way to train, the least sharding first."""
        for layout in layouts(num_processes):
            yield self.training(layout, num_processes, batch)
