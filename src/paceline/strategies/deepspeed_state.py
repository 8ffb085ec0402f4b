"""The training state of all engines, out and in; `zero_state` knows how one engine keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from paceline.checkpoint.format.shards import OptimizerState, TensorShard
from paceline.errors import StateError
from paceline.strategies.deepspeed import state as zero_state
from paceline.strategies.deepspeed.engines import Engines
from paceline.strategies.deepspeed.state import gather_whole, is_cut, value_of
from paceline.strategies.state import saved_buffers

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from paceline.checkpoint.format.shards import Number, Slot
    from paceline.strategies.deepspeed.engine import ZeroEngine


class EngineState(Engines):
    """The verbs of state, each handed to the engine that it concerns."""

    @override
    def num_elements(self, model: nn.Module) -> int:
        # Stage 3 leaves empty parameters behind.
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())

    @override
    def model_state(self, model: nn.Module) -> dict[str, TensorShard]:
        zero = self._engine_of(model)
        inner = self.unwrap(model)
        parts = {name: value_of(zero, parameter) for name, parameter in inner.named_parameters()}
        return parts | {name: TensorShard.whole(buffer) for name, buffer in saved_buffers(inner)}

    @override
    def optimizer_state(self, optimizer: Optimizer, names: Mapping[int, str]) -> OptimizerState:
        return zero_state.optimizer_state(self._bound(optimizer), names)

    @override
    def make_slots(
        self,
        optimizer: Optimizer,
        names: Mapping[int, str],
        slots: Mapping[str, Mapping[str, Slot]],
        numbers: Mapping[str, Mapping[str, Number]],
    ) -> None:
        zero_state.make_slots(self._bound(optimizer), names, slots, numbers)

    @override
    def set_groups(self, optimizer: Optimizer, names: Mapping[int, str], groups: Sequence[Mapping[str, Any]]) -> None:
        zero_state.set_groups(self._bound(optimizer), names, groups)

    @override
    def state_written(self) -> None:
        for zero in self._engines:
            zero_state.state_written(zero)

    @override
    def engine_state(self) -> dict[str, Any]:
        return {"loss_scalers": [zero_state.scaler_state(zero.engine.optimizer) for zero in self._engines]}

    @override
    def load_engine_state(self, state: Mapping[str, Any]) -> None:
        for zero, held in zip(self._engines, state.get("loss_scalers", ()), strict=False):
            zero_state.take_scaler_state(zero.engine.optimizer, held)

    def _bound(self, optimizer: Optimizer) -> ZeroEngine:
        zero = self._find(optimizer)
        if zero is None:
            raise StateError(f"The state of a {type(optimizer).__name__} was asked for that was not prepared")
        return zero

    @override
    @torch.no_grad()
    def gather_state(self, model: nn.Module, *, without: Container[str] = ()) -> dict[str, Tensor]:
        zero = self._engine_of(model)
        state: dict[str, Tensor] = {}
        cut = {name for name, p in self.unwrap(model).named_parameters() if is_cut(zero, p)}
        for name, part in self.model_state(model).items():
            if name in without:
                continue
            whole = (
                gather_whole(part, self.context.group, self.context.device)
                if name in cut
                else part.values.reshape(part.shape).cpu()
            )
            if self.context.world.is_main:
                state[name] = whole
        if not state:
            return {}
        self._round(zero, self.unwrap(model), state)
        state.update((alias, state[first]) for alias, first in self.tied_names(model).items() if first in state)
        return state

    def _round(self, zero: ZeroEngine | None, inner: nn.Module, state: dict[str, Tensor]) -> None:
        """Give weights the dtype they came in, or 16 bits where the configuration asks for it."""
        if zero is None:
            return
        short = self._dtype if self._plugin.zero3_save_16bit_model else None
        for name, parameter in inner.named_parameters():
            if name not in state:
                continue
            state[name] = state[name].to(short or zero.dtypes.get(id(parameter), state[name].dtype))
