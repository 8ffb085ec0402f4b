"""Compiles the models of a run as it is configured: when they are prepared, or later, once that pays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.errors import PrepareError
from paceline.strategies.automatic_compilation import AutomaticCompilation, automatic_compilation
from paceline.strategies.compilation import compile_model
from paceline.strategies.compile_cache import open_cache
from paceline.strategies.cuda_graphs import copy_gradients, uses_graphs

if TYPE_CHECKING:
    from torch import nn

    from paceline.strategies.context import RunContext

__all__ = ["Compiler"]


class Compiler:
    """What is compiled of each model of a run.

    Args:
        context: The run, with `dynamo_config` of its configuration.
        keeps_addresses: Whether weights stay where they are in memory, so that steps can be replayed as CUDA graphs.
    """

    def __init__(self, context: RunContext, *, keeps_addresses: bool) -> None:
        self._context = context
        self._settings = context.config.dynamo_config
        self._keeps_addresses = keeps_addresses
        self._automatic: list[AutomaticCompilation] = []

    @property
    def is_for_blocks(self) -> bool:
        """Whether repeated blocks are compiled, each by itself, and not a model as a whole."""
        return self._settings.backend == "auto" or self._settings.use_regional_compilation

    def compile(self, model: nn.Module) -> None:
        """Compile a model in place, now or under `auto` once that pays.

        Args:
            model: As it will be trained.

        Raises:
            PrepareError: There is an activation memory budget, and the model is not compiled.
        """
        settings = self._settings
        if settings.backend == "inductor" or (settings.backend == "auto" and self._context.device.type == "cuda"):
            open_cache(settings, may_empty=self._context.world.is_local_main)
        compile_model(model, settings)
        if self._keeps_addresses and uses_graphs(settings):
            copy_gradients(model.parameters())
        if settings.backend == "auto" and not settings.disable:
            self._compile_automatically(model)

    def _compile_automatically(self, model: nn.Module) -> None:
        settings = self._settings
        found = automatic_compilation(
            model,
            settings,
            self._context.device,
            self._context.remaining_steps,
            at_once=self._context.precision.mode == "fp8" or settings.activation_memory_budget < 1,
            may_replay=self._keeps_addresses and settings.cuda_graphs,
        )
        if settings.activation_memory_budget < 1 and (found is None or not found.is_on):
            raise PrepareError(
                f"dynamo_activation_memory_budget is {settings.activation_memory_budget:g}, and "
                f"{type(model).__name__} is not compiled: {found.state if found else 'auto compiles on CUDA only'}",
                "Only compiled code has a budget, so the memory would be that of a run without one",
                "Set dynamo_backend to inductor, or use activation checkpointing",
            )
        if found is not None:
            self._automatic.append(found)

    def stepped(self) -> None:
        """Take note of an optimizer step, for what is compiled once that pays."""
        for compilation in self._automatic:
            if not compilation.is_decided:
                compilation.stepped()

    def describe(self) -> list[str]:
        """Describe what is compiled by default, or why nothing is: a line for each model."""
        return [compilation.describe() for compilation in self._automatic]

    def close(self) -> None:
        """Leave the models as they were."""
        for compilation in self._automatic:
            compilation.end("the memory was freed")
