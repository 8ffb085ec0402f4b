"""The engines of a run under DeepSpeed, one for each trained model, and whose is which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.strategies.base import Strategy
from paceline.strategies.deepspeed.build import DTYPES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from paceline.config import DeepSpeedPlugin
    from paceline.strategies.deepspeed.engine import ZeroEngine


class Engines(Strategy):
    """What the parts of `DeepSpeedStrategy` share; it fills the fields."""

    _plugin: DeepSpeedPlugin
    _stage: int
    _engines: list[ZeroEngine]
    _settings: dict[str, Any]
    # Whether somebody steps the schedule that the configuration describes.
    _scheduled: bool

    @property
    def _dtype(self) -> torch.dtype | None:
        """The dtype of the parameters that the forward uses, where that is not fp32."""
        return DTYPES.get(self.context.precision.mode) if self._stage > 0 else None

    def _find(self, optimizer: object) -> ZeroEngine | None:
        return next((b for b in self._engines if b.given is optimizer or b.optimizer is optimizer), None)

    def _engine_of(self, model: nn.Module) -> ZeroEngine | None:
        return next((b for b in self._engines if b.engine is model or b.model is model), None)
