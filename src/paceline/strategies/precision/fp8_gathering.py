"""Weights that FSDP2 gathers in fp8: their shards are rounded once after each step, not before each gather."""

from __future__ import annotations

from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from paceline.strategies.precision.fp8_rounding import Rounding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["GatheredWeights"]


class GatheredWeights:
    """The fp8 layers of one model whose weights FSDP2 gathers in fp8.

    torchao casts a shard whenever it is gathered, in forward and in backward, by one kernel for each operation. Weights
    change only with a step, so all shards are rounded then, in one kernel, and gathered as they are: one byte for each
    element of this rank.
    """

    def __init__(self) -> None:
        self._layers = nn.ModuleList()
        self._weights: list[Any] = []
        # How often each weight had been changed when its scale was computed.
        self._versions: list[int] = []
        self._rounding: Rounding | None = None

    def __len__(self) -> int:
        return len(self._layers)

    def add(self, layer: nn.Module) -> None:
        """Add a layer whose weight torchao has wrapped, before it is sharded."""
        self._layers.append(layer)

    def changed(self) -> None:
        """Compute the scales of all weights with one small collective, and round their shards.

        Collective: every rank must call it, after sharding and after each optimizer step, when no unit is gathered.
        """
        if not self._layers:
            return
        self._weights = [layer.weight for layer in self._layers]
        shards = [weight._local_tensor for weight in self._weights]
        self._versions = [weight._version for weight in self._weights]
        for shard, scale in zip(shards, self._scales(shards), strict=True):
            shard._precomputed_scale = scale
        self._round(shards)

    @torch.no_grad()
    def _scales(self, shards: Sequence[Any]) -> Sequence[Tensor]:
        """The scale of each weight, with one small collective.

        It computes what torchao's `precompute_float8_dynamic_scale_for_fsdp` does, without DTensor's dispatch for each
        weight.
        """
        from torchao.float8.float8_utils import amax_to_scale

        largest = torch.stack(torch._foreach_norm([shard._tensor for shard in shards], float("inf")))
        mesh = self._weights[0].device_mesh
        # Replicas have the same shards.
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=mesh.get_group(mesh.ndim - 1))
        scales: Tensor = amax_to_scale(largest, shards[0]._dtype)
        return scales.unbind()

    def check(self, *_: Any) -> None:
        """Forget scales if something else than a step has changed a weight; the next gather computes them."""
        if self._versions and self._versions != [weight._version for weight in self._weights]:
            self.forget()

    def forget(self) -> None:
        """Let the next gather scale and round: weights were loaded or changed."""
        self._versions = []
        for weight in self._weights:
            shard = weight._local_tensor
            shard._precomputed_scale = None
            vars(shard).pop("fsdp_pre_all_gather", None)

    def _round(self, shards: list[Any]) -> None:
        if any(weight.device.type != weight.device_mesh.device_type for weight in self._weights):
            # Offloaded: FSDP2 moves a shard to the device before it asks for what is gathered.
            return
        masters = [shard._tensor for shard in shards]
        if self._rounding is None or not self._rounding.is_for(masters):
            self._rounding = Rounding(masters, shards[0]._dtype)
        scales = [shard._precomputed_scale for shard in shards]
        for shard, rounded, scale in zip(shards, self._rounding(scales), scales, strict=True):
            # FSDP2 asks the shard itself; its class would cast.
            shard.fsdp_pre_all_gather = _Rounded(rounded, scale)


class _Rounded:
    """What is gathered of one shard: the tensors, and what the gathered weight needs besides."""

    # FSDP2 inspects the signature before each gather of each weight, which takes 7 us without this.
    __signature__ = Signature([Parameter("mesh", Parameter.POSITIONAL_OR_KEYWORD)])

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self._data = data
        self._scale = scale

    def __call__(self, mesh: Any) -> tuple[tuple[Tensor], tuple[Tensor]]:
        return (self._data,), (self._scale,)
