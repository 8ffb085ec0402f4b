"""Where a DeepSpeed engine keeps the gradients, values and optimizer states of each parameter.

ZeRO concatenates the parameters of a group and splits that flat tensor into one partition a rank (stages 1 and 2), or
splits every parameter on its own (stage 3). Both leave a rank one contiguous range of each parameter, whose fp32
value, gradient and moments are a slice of a flat tensor: a `PartitionSlice`. At stage 0 nothing is sharded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from paceline.checkpoint.format.shards import TensorShard
from paceline.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class PartitionSlice:
    """Where a rank stores its shard of one parameter.

    Attributes:
        flat: The flat tensor that the optimizer updates, a key of its state.
        offset: Index of the shard's first element in `flat`.
        start: Index of the shard's first element in the flattened parameter.
        numel: Elements of the shard; there may be none.
        group: Index of the optimizer's parameter group.
    """

    flat: Tensor
    offset: int
    start: int
    numel: int
    group: int

    def cut(self, flat: Tensor) -> Tensor:
        """This shard of a tensor that is laid out like `flat`."""
        return flat.view(-1).narrow(0, self.offset, self.numel)


class Partitions(ABC):
    """How one engine's parameters are partitioned over the ranks.

    Attributes:
        is_sharded: Whether ranks have different shards, so that a sum over shards must be summed over ranks, too.
    """

    is_sharded = True

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._zero = engine.optimizer

    @property
    def reaches_gradients(self) -> bool:
        """Whether `gradient` works between a backward and its step."""
        return True

    @property
    def loss_scale(self) -> float:
        """The factor in fp16 gradients until the step."""
        return float(getattr(self._zero, "loss_scale", 1.0))

    @abstractmethod
    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's shard of the averaged gradient, in live memory; None if there is none."""

    @abstractmethod
    def slice_of(self, parameter: nn.Parameter) -> PartitionSlice | None:
        """Where the optimizer stores this rank's shard; None for a parameter that it does not update."""

    @abstractmethod
    def value(self, parameter: nn.Parameter) -> TensorShard:
        """This rank's shard of the parameter, from the most exact copy that there is."""

    @abstractmethod
    def is_updated(self, parameter: nn.Parameter) -> bool:
        """Whether the optimizer updates a copy of the parameter, not the parameter itself."""

    @abstractmethod
    def forward_copies(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
        """This rank's shard as the next forward has it and as the engine wrote it, in the forward's dtype.

        None where the forward gathers it anew.
        """

    def transfer_changes(self, parameter: nn.Parameter) -> None:
        """Change the optimizer's fp32 values where the script has changed the parameter.

        All others keep the bits that the forward's dtype does not have. `write_back` has to follow.
        """
        if not self.is_updated(parameter):
            return
        exact = self.value(parameter).values
        changed = self.forward_shard(parameter).to(exact.device)
        exact.copy_(torch.where(changed == exact.to(changed.dtype), exact, changed.to(exact.dtype)))

    @abstractmethod
    def forward_shard(self, parameter: nn.Parameter) -> Tensor:
        """This rank's shard in the dtype of the forward, flat."""

    @abstractmethod
    def publish(self) -> None:
        """Copy the optimizer's fp32 values to the parameters that the forward uses. Collective."""

    def write_back(self) -> None:
        """Write what `slice_of` read from NVMe, and the caller may have changed, back to it."""
        return

    @abstractmethod
    def drop_gradients(self) -> None:
        """Drop the gradients accumulated since the last step."""


class Unpartitioned(Partitions):
    """Stage 0: every rank has everything."""

    is_sharded = False

    @override
    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.grad

    @override
    def slice_of(self, parameter: nn.Parameter) -> PartitionSlice | None:
        if not parameter.requires_grad:
            return None
        groups = self._zero.param_groups
        group = next((i for i, g in enumerate(groups) if any(p is parameter for p in g["params"])), None)
        return None if group is None else PartitionSlice(parameter, 0, 0, parameter.numel(), group)

    @override
    def value(self, parameter: nn.Parameter) -> TensorShard:
        return TensorShard.whole(parameter)

    @override
    def is_updated(self, parameter: nn.Parameter) -> bool:
        return False

    @override
    def forward_copies(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
        return None

    @override
    def forward_shard(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().reshape(-1)

    @override
    def publish(self) -> None:
        pass

    @override
    def drop_gradients(self) -> None:
        self._engine.zero_grad()


class FlatPartitions(Partitions):
    """Stages 1 and 2: a group's parameters in one flat tensor, partitioned regardless of where a parameter ends."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        groups = self._zero.bit16_groups
        self._group_of = {id(p): index for index, group in enumerate(groups) for p in group}
        flats: Any = getattr(self._zero, "single_partition_of_fp32_groups", None)
        self._flats: list[Tensor] = self._zero.fp32_groups_flat_partition if flats is None else flats

    @override
    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        gradients = mapping.offload_gradient_dict if mapping.use_offload else mapping.gradient_dict
        in_group = gradients.get(mapping.param_group_index)
        if in_group is None:
            return None
        gradient: Tensor = in_group[parameter._index_in_param_group]  # type: ignore[attr-defined]
        fragment = mapping.lp_fragment_address
        if gradient.numel() == fragment.numel:
            return gradient
        # The optimizer of stage 1 with fp32 accumulation keeps whole gradients.
        return gradient.reshape(-1).narrow(0, fragment.start, fragment.numel)

    @override
    def slice_of(self, parameter: nn.Parameter) -> PartitionSlice | None:
        group = self._group_of.get(id(parameter))
        if group is None:
            return None
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        flat = self._flats[group]
        if mapping is None:
            return PartitionSlice(flat, 0, 0, 0, group)
        fp32, fragment = mapping.hp_fragment_address, mapping.lp_fragment_address
        return PartitionSlice(flat, fp32.start, fragment.start, fragment.numel, group)

    @override
    def value(self, parameter: nn.Parameter) -> TensorShard:
        slice_of = self.slice_of(parameter)
        if slice_of is None:
            return TensorShard.whole(parameter)
        return TensorShard(tuple(parameter.shape), slice_of.start, slice_of.cut(slice_of.flat.detach()))

    @override
    def is_updated(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._group_of

    @override
    def forward_copies(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
        seen = self.forward_shard(parameter)
        return seen, self.value(parameter).values.to(seen)

    @override
    def forward_shard(self, parameter: nn.Parameter) -> Tensor:
        shard = self.value(parameter)
        return parameter.detach().reshape(-1)[shard.start : shard.stop]

    @override
    def publish(self) -> None:
        self._zero.update_lp_params()

    @override
    def drop_gradients(self) -> None:
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        zero.micro_step_id = -1
        for index in list(zero.averaged_gradients):
            zero.averaged_gradients[index] = None
        for index in list(getattr(zero, "all_grad_tensors", ())):
            zero.all_grad_tensors[index] = None


class ParameterPartitions(Partitions):
    """Stage 3: every parameter is partitioned on its own, into equal pieces of which the last is padded.

    With the optimizer on NVMe, a sub-group's fp32 values and states are in memory only during a step. `slice_of`
    reads a copy of them into the same tensors, where the next step drops it.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        groups = self._zero.fp16_groups
        self._index = {id(p): (i, j) for i, group in enumerate(groups) for j, p in enumerate(group)}

    @property
    @override
    def reaches_gradients(self) -> bool:
        return not self._zero.swap_optimizer

    @override
    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        position = self._index.get(id(parameter))
        if position is None:
            return None
        zero = self._zero
        if not self.reaches_gradients:
            raise StateError(
                "Gradients of a run with its optimizer on NVMe were requested",
                "The backward writes them to NVMe, and only the step reads them back",
                "Leave clipping to DeepSpeed (gradient_clipping in its configuration), or offload the optimizer to cpu",
            )
        if zero.offload_optimizer:
            slice_of = self.slice_of(parameter)
            gradient = None if slice_of is None else slice_of.flat.grad
            return None if slice_of is None or gradient is None else slice_of.cut(gradient)
        group, index = position
        in_group = zero.averaged_gradients.get(group)
        if in_group is None:
            return None
        piece: Tensor = in_group[index].view(-1)
        return piece.narrow(0, 0, min(self._range_of(parameter)[1], piece.numel()))

    @override
    def slice_of(self, parameter: nn.Parameter) -> PartitionSlice | None:
        if id(parameter) not in self._index:
            return None
        zero = self._zero
        sub_group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        self._swap_in(sub_group)
        start, numel = self._range_of(parameter)
        flat = zero.fp32_partitioned_groups_flat[sub_group]
        return PartitionSlice(flat, offset, start, numel, zero.sub_group_to_group_id[sub_group])

    def _swap_in(self, sub_group: int) -> None:
        zero = self._zero
        if not zero._swappable_optimizer_subgroup(sub_group) or self._in_memory(sub_group):
            return
        if zero.optimizer_swapper.__class__.__name__ == "PipelinedOptimizerSwapper":
            raise StateError(
                "The state of a run with its optimizer on NVMe was requested",
                "With pipeline_read or pipeline_write it is in memory only during a step",
                "Remove both from offload_optimizer",
            )
        zero._optimizer_states_and_gradient_swap_in(sub_group)
        info = zero.optimizer_swapper._get_param_swap_info(zero.fp32_partitioned_groups_flat[sub_group])
        tensors = info.get_compute_tensors()
        copies = [tensor.detach().clone() for tensor in tensors]
        zero._release_swap_buffers(sub_group)
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.data = copy

    def _in_memory(self, sub_group: int) -> bool:
        return bool(self._zero.fp32_partitioned_groups_flat[sub_group].numel())

    @override
    def write_back(self) -> None:
        zero = self._zero
        for sub_group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            if not zero._swappable_optimizer_subgroup(sub_group) or not self._in_memory(sub_group):
                continue
            # DeepSpeed writes from buffers of its own, as it would after a step.
            swapper = zero.optimizer_swapper
            info = swapper._get_param_swap_info(flat)
            tensors = info.get_compute_tensors()
            copies = [tensor.detach() for tensor in tensors]
            size = swapper._io_aligned_numel(info.numel())
            info.swap_buffers = swapper.swap_buffer_manager.allocate(size, len(tensors), flat.dtype)
            info.set_swap_buffers(info.swap_buffers, size)
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.data.copy_(copy)
            zero._optimizer_states_and_gradient_swap_out(sub_group)

    @override
    def value(self, parameter: nn.Parameter) -> TensorShard:
        shape = tuple(parameter.ds_shape)  # type: ignore[attr-defined]
        slice_of = self.slice_of(parameter)
        if slice_of is not None:
            return TensorShard(shape, slice_of.start, slice_of.cut(slice_of.flat.detach()))
        return piece_of(parameter)

    @override
    def is_updated(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._index

    @override
    def forward_copies(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
        piece = piece_of(parameter)
        # Small parameters stay gathered between steps.
        if parameter.numel() != piece.numel:
            return None
        return parameter.detach().reshape(-1)[piece.start : piece.stop], piece.values.to(parameter)

    @override
    def forward_shard(self, parameter: nn.Parameter) -> Tensor:
        return piece_of(parameter).values

    @staticmethod
    def _range_of(parameter: nn.Parameter) -> tuple[int, int]:
        piece = piece_of(parameter)
        return piece.start, piece.values.numel()

    @override
    @torch.no_grad()
    def publish(self) -> None:
        zero = self._zero
        # Copies that are gathered right now would hide the new values.
        zero._partition_all_parameters()
        for sub_group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            # What is not in memory was not changed.
            if flat.numel():
                zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        self.write_back()
        # Small parameters stay gathered between steps, so their whole copies must be renewed, too.
        persistent = zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
        zero.invalidate_secondary_tensor()

    @override
    def drop_gradients(self) -> None:
        self._zero.zero_grad(set_to_none=True)
        if not self._zero.offload_optimizer:
            self._zero.averaged_gradients = {}


def piece_of(parameter: nn.Parameter) -> TensorShard:
    """This rank's piece of a parameter that stage 3 has partitioned, without the padding of the last piece."""
    partitioned: Any = parameter
    piece, size = partitioned.ds_tensor, partitioned.partition_numel()
    import deepspeed.comm as ds_comm

    start = min(size * ds_comm.get_rank(group=partitioned.ds_process_group), partitioned.ds_numel)
    numel = min(size, partitioned.ds_numel - start)
    return TensorShard(tuple(partitioned.ds_shape), start, piece.detach().view(-1).narrow(0, 0, numel))


def partitions_of(engine: Any, stage: int) -> Partitions:
    """The layout of an engine that has an optimizer."""
    if stage == 0:
        return Unpartitioned(engine)
    return ParameterPartitions(engine) if stage == 3 else FlatPartitions(engine)


def norm_of(gradients: Iterable[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The norm of several shards as one vector, to the power that makes it add up over ranks (`inf`: the largest).

    Shape [], fp32, on `device`.
    """
    filled = [gradient for gradient in gradients if gradient.numel()]
    if not filled:
        return torch.zeros((), device=device)
    norms = torch.stack(torch._foreach_norm(filled, norm_type, dtype=torch.float32))
    norm: Tensor = torch.linalg.vector_norm(norms, norm_type).to(device)
    return norm if norm_type == float("inf") else norm.pow(norm_type)
