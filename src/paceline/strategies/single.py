"""One process, one device: plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from paceline.strategies.base import Strategy
from paceline.strategies.context import DistributedType

if TYPE_CHECKING:
    from torch import nn


class SingleStrategy(Strategy):
    """Moves the model to the device, and changes nothing else."""

    name = "single"
    keeps_addresses = True

    @property
    @override
    def distributed_type(self) -> DistributedType:
        return DistributedType.NO

    @override
    def prepare_model(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        self.fp8.convert(model)
        self.place_whole(model, place=place)
        self.compiler.compile(model)
        return model
