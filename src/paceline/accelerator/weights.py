"""Gathers and writes the weights of prepared models, without the rest of the training state."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from paceline import checkpoint
from paceline.accelerator.training_state.manager import require_safe_serialization
from paceline.errors import PacelineError
from paceline.strategies.adapters import embedding_names, frozen_base, is_adapted, write_adapters

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from paceline.accelerator.strategy_selection import StrategySelector
    from paceline.collectives import Group

__all__ = ["WeightWriter"]


class WeightWriter:
    """Writes the weights of models on rank 0.

    Args:
        group: All ranks.
        selector: Knows the strategy.
    """

    def __init__(self, group: Group, selector: StrategySelector) -> None:
        self._group = group
        self._selector = selector

    def gather(self, model: nn.Module) -> dict[str, Tensor]:
        """See `Accelerator.get_state_dict`."""
        return self._selector.select([model]).gather_state(model)

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: str | int,
        safe_serialization: object,
    ) -> None:
        """See `Accelerator.save_model`."""
        require_safe_serialization("save_model", safe_serialization)
        state = self.gather(model)
        self._write_on_main(
            save_directory, lambda folder: checkpoint.save_weights(state, folder, max_shard_size=max_shard_size)
        )

    def save_adapter(self, model: nn.Module, save_directory: str | os.PathLike[str]) -> None:
        """See `Accelerator.save_adapter`."""
        strategy = self._selector.select([model])
        module: Any = strategy.unwrap(model)
        if not is_adapted(module):
            raise PacelineError(
                f"save_adapter was called with a {type(module).__name__}",
                "Only a PeftModel has adapters",
                "Call save_model",
            )
        base = frozen_base(module, strategy.named_parameters(model)) - embedding_names(module)
        state = strategy.gather_state(model, without=base)
        self._write_on_main(save_directory, lambda folder: write_adapters(module, folder, state))

    def _write_on_main(self, folder: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
        """Write into what the name leads to on rank 0, and raise a failure on all ranks."""
        cause: Exception | None = None
        if self._group.rank == 0:
            try:
                write(checkpoint.real_folder(folder))
            except Exception as error:
                # Whatever it is, the other ranks wait for the outcome.
                cause = error
        failure = self._group.broadcast_object(None if cause is None else f"{type(cause).__name__}: {cause}")
        if failure is not None:
            raise PacelineError(f"The weights could not be saved into {folder}", failure) from cause
