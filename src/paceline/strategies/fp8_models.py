"""The models of a run whose large linear layers multiply in fp8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.environment.logging import get_logger
from paceline.errors import PrepareError
from paceline.strategies.blocks import repeated_blocks
from paceline.strategies.precision.fp8_layers import restore_layers

if TYPE_CHECKING:
    from torch import nn

    from paceline.strategies.context import RunContext
    from paceline.strategies.precision.fp8 import Fp8Layers

__all__ = ["Fp8Models"]

_LOG = get_logger(__name__)


class Fp8Models:
    """Converts models where fp8 is the run's precision, and tells their weights of each step.

    Args:
        context: The run, with its precision and `fp8_config`.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._converted: list[Fp8Layers] = []

    def convert(self, model: nn.Module, *, gathers: bool = False) -> Fp8Layers | None:
        """Let the large linear layers of a model multiply in fp8, if that is the run's precision.

        Args:
            model: Changed in place, before it is sharded and compiled.
            gathers: Whether its weights can be gathered in fp8.

        Returns:
            The layers; None in any other precision.

        Raises:
            PrepareError: No layer can be converted, or nothing of the model would be compiled.
        """
        restore_layers(model)
        if self._context.precision.mode != "fp8":
            return None
        from paceline.strategies.precision.fp8 import convert_layers

        config = self._context.config
        blocks = repeated_blocks(model)
        emulates = config.fp8_config is not None and config.fp8_config.emulate
        if config.dynamo_config.backend == "auto" and not blocks and not emulates:
            raise PrepareError(
                f"mixed_precision is fp8, and {type(model).__name__} has no repeated blocks to compile",
                "Without torch.compile, scaling and rounding cost more than fp8 products save",
                "Set dynamo_backend='inductor', which compiles the whole model, or use mixed_precision='bf16'",
            )
        layers = convert_layers(model, config.fp8_config, blocks, gathers=gathers)
        self._converted.append(layers)
        _LOG.info("%s", layers.describe())
        return layers

    def stepped(self) -> None:
        """Scale and round the weights that are gathered in fp8. Collective: every rank must call it."""
        for layers in self._converted:
            layers.gathered.changed()

    def state_written(self) -> None:
        """Forget scales of weights that were loaded."""
        for layers in self._converted:
            layers.gathered.forget()

    def describe(self) -> list[str]:
        """Describe which layers multiply in fp8, and why others do not: a line for each model."""
        return [layers.describe() for layers in self._converted]
