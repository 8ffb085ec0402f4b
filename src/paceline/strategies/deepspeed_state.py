"""The training state of all engines, out and in; `zero_state` knows how one engine keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from paceline.checkpoint.parts import OptimizerState, Part
from paceline.errors import StateError
from paceline.strategies import zero_state
from paceline.strategies.deepspeed_engines import Engines
from paceline.strategies.state import saved_buffers
from paceline.strategies.zero_state import gather_whole, is_cut, value_of

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from paceline.checkpoint.parts import Number, Slot
    from paceline.strategies.zero_engine import Bound


class EngineState(Engines):
    """The verbs of state, each handed to the engine that it concerns."""

    @override
    def num_elements(self, model: nn.Module) -> int:
        # Stage 3 leaves empty parameters behind.
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())

    @override
    def model_state(self, model: nn.Module) -> dict[str, Part]:
        bound = self._engine_of(model)
        inner = self.unwrap(model)
        parts = {name: value_of(bound, parameter) for name, parameter in inner.named_parameters()}
        return parts | {name: Part.whole(buffer) for name, buffer in saved_buffers(inner)}

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
        for bound in self._engines:
            zero_state.state_written(bound)

    @override
    def engine_state(self) -> dict[str, Any]:
        return {"loss_scalers": [zero_state.scaler_state(bound.engine.optimizer) for bound in self._engines]}

    @override
    def load_engine_state(self, state: Mapping[str, Any]) -> None:
        for bound, held in zip(self._engines, state.get("loss_scalers", ()), strict=False):
            zero_state.take_scaler_state(bound.engine.optimizer, held)

    def _bound(self, optimizer: Optimizer) -> Bound:
        bound = self._find(optimizer)
        if bound is None:
            raise StateError(f"The state of a {type(optimizer).__name__} was asked for that was not prepared")
        return bound

    @override
    @torch.no_grad()
    def gather_state(self, model: nn.Module, *, without: Container[str] = ()) -> dict[str, Tensor]:
        bound = self._engine_of(model)
        state: dict[str, Tensor] = {}
        cut = {name for name, p in self.unwrap(model).named_parameters() if is_cut(bound, p)}
        for name, part in self.model_state(model).items():
            if name in without:
                continue
            whole = (
                gather_whole(part, self.around.group, self.around.device)
                if name in cut
                else part.values.reshape(part.shape).cpu()
            )
            if self.around.world.is_main:
                state[name] = whole
        if not state:
            return {}
        self._round(bound, self.unwrap(model), state)
        state.update((alias, state[first]) for alias, first in self.tied_names(model).items() if first in state)
        return state

    def _round(self, bound: Bound | None, inner: nn.Module, state: dict[str, Tensor]) -> None:
        """Give weights the dtype they came in, or 16 bits where the configuration asks for it."""
        if bound is None:
            return
        short = self._dtype if self._plugin.zero3_save_16bit_model else None
        for name, parameter in inner.named_parameters():
            if name not in state:
                continue
            state[name] = state[name].to(short or bound.dtypes.get(id(parameter), state[name].dtype))
