"""Which strategy a run trains with, and when that is decided."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from paceline.environment.device import describe_device, memory_info
from paceline.environment.logging import get_logger
from paceline.errors import ConfigError, PrepareError, Problem
from paceline.strategies import Strategy, load_strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from paceline.accelerator.assembly import RunComponents
    from paceline.accelerator.stepping import AcceleratedOptimizer, LossScaler
    from paceline.config import RunConfig
    from paceline.strategies import RunContext

__all__ = ["StrategySelector", "unused_settings", "usable_scaler"]

_LOG = get_logger(__name__)
# The strategy that reads a section, of those that `auto` chooses among.
_READER = {"ddp_config": "ddp", "fsdp_config": "fsdp", "parallelism_config": "fsdp"}


class StrategySelector:
    """Builds the strategy: at once where it is configured, with the first model where it is `auto`.

    Args:
        components: The run.
        optimizers: The prepared optimizers, whose state counts for `auto`; grows.
        strategy: The script's own: an object, or a class or function that is called with the `RunContext`. With a
            name or None the configured one is built.
        remaining_steps: See `RunContext.remaining_steps`.

    Attributes:
        maybe_current: The strategy; None while `auto` waits for a model.
        reason: Which strategy it is and why, in one line; empty while it is undecided.
    """

    def __init__(
        self,
        components: RunComponents,
        optimizers: Sequence[AcceleratedOptimizer],
        strategy: object,
        remaining_steps: Callable[[], int | None],
    ) -> None:
        self._components = replace(components, context=replace(components.context, remaining_steps=remaining_steps))
        self._optimizers = optimizers
        self._own_strategy = None if isinstance(strategy, str) else strategy
        self.maybe_current: Strategy | None
        self.maybe_current, self.reason = self._select_early()

    @property
    def current(self) -> Strategy:
        """The strategy.

        Raises:
            PrepareError: It is undecided.
        """
        if self.maybe_current is None:
            raise PrepareError(
                "The strategy was needed before a model was prepared",
                "strategy='auto' depends on the size of the model",
                "Call accelerator.prepare(model, ...) first, or name a strategy",
            )
        return self.maybe_current

    def select(self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer] = ()) -> Strategy:
        """Decide for these models, unless that is done; return the strategy.

        Collective while it is undecided: every rank must call it.
        """
        if self.maybe_current is None:
            known = [*optimizers, *(wrapper.optimizer for wrapper in self._optimizers)]
            self.maybe_current, self.reason = select_strategy(self._components, models, known)
        return self.maybe_current

    @property
    def context(self) -> RunContext:
        """What the strategy knows of the run."""
        return self._components.context

    def use_config(self, config: RunConfig) -> None:
        """Begin with a new strategy of the same kind under other settings.

        Raises:
            PrepareError: Models were prepared under the present settings.
        """
        if self.maybe_current is not None and self.maybe_current.parameters():
            raise PrepareError(
                f"Other settings of {self.maybe_current.name} were selected after a model was prepared",
                "All models of one Accelerator share its settings",
                "Select before the first prepare(), and build an Accelerator for each of them",
            )
        self._components = replace(self._components, context=replace(self.context, config=config))
        self.reset()

    def reset(self) -> None:
        """Close the strategy, and begin with a new one."""
        if self.maybe_current is not None:
            self.maybe_current.close()
        self.maybe_current, self.reason = self._select_early()

    def _select_early(self) -> tuple[Strategy | None, str]:
        """The strategy and why, where that does not depend on the model."""
        context = self._components.context
        if self._own_strategy is not None:
            return _build_own(self._own_strategy, context), "passed by the script"
        if context.config.strategy == "auto" and context.group.size > 1:
            return None, ""
        return select_strategy(self._components, (), ())


def select_strategy(
    components: RunComponents, models: Sequence[nn.Module], optimizers: Sequence[Optimizer]
) -> tuple[Strategy, str]:
    """Build the configured strategy, or the least sharding with which these models fit; return it and the reason.

    Collective: every rank must call it.
    """
    context = components.context
    config, group = context.config, context.group
    if config.strategy != "auto":
        source = components.resolved.origin("strategy")
        return load_strategy(config.strategy)(context), f"{config.strategy}: set by {source.where}"
    if group.size == 1:
        _warn_of_unused(components, "single", "single: there is one process")
        return load_strategy("single")(context), "single: there is one process"
    from paceline.planner import choose_strategy, measure

    free, _ = memory_info(context.device, local_size=context.world.local_size)
    choice = choose_strategy(
        measure(models, optimizers, context.device),
        # All ranks must decide alike, so the one with the least memory decides.
        free=int(group.all_reduce(torch.tensor(free, dtype=torch.int64), "min")),
        ranks=group.size,
        device=describe_device(context.device),
    )
    if choice.settings:
        from paceline.config import FullyShardedDataParallelPlugin

        plugin = config.fsdp_config or FullyShardedDataParallelPlugin()
        # Explicit settings take precedence.
        chosen = {key: value for key, value in choice.settings.items() if key not in plugin.model_fields_set}
        context = replace(context, config=config.model_copy(update={"fsdp_config": plugin.changed(**chosen)}))
    _warn_of_unused(components, choice.strategy, choice.reason)
    return load_strategy(choice.strategy)(context), f"{choice.reason} (auto)"


def unused_settings(components: RunComponents, strategy: str) -> list[str]:
    """The explicit settings of sections that a strategy does not read, which `auto` has chosen.

    Args:
        components: The run.
        strategy: The name of the strategy.

    Returns:
        Dotted keys, such as `fsdp_config.fsdp_offload_params`.
    """
    if components.context.config.strategy != "auto":
        return []
    explicit = [key for key, _, origin in components.resolved.explain() if origin.is_explicit]
    return [key for key in explicit if _READER.get(key.partition(".")[0], strategy) != strategy]


def _warn_of_unused(components: RunComponents, strategy: str, reason: str) -> None:
    unused = unused_settings(components, strategy)
    if not unused or components.policies.leniency.unread_settings:
        return
    places = ", ".join(f"{key} ({components.resolved.origin(key).where})" for key in unused)
    verb = "has" if len(unused) == 1 else "have"
    readers = sorted({_READER[key.partition(".")[0]] for key in unused})
    hint = f"set strategy to {' or '.join(readers)}, or remove {'it' if len(unused) == 1 else 'them'}"
    _LOG.warning("%s %s no effect: strategy auto chose %s; %s", places, verb, reason, hint)


def usable_scaler(components: RunComponents, strategy: Strategy | None) -> LossScaler | None:
    """The loss scaler of the run; None where the strategy's engine scales the loss itself.

    Raises:
        ConfigError: The script configures a scaler that would not be used.
    """
    if strategy is None or not strategy.scales_loss:
        return components.scaler
    # On first use: the schema takes longer to load than all of this package.
    from paceline.config import GradScalerKwargs

    if components.handlers.scaler != GradScalerKwargs() and not components.policies.leniency.unread_settings:
        hint = "write initial_scale_power and loss_scale_window into the fp16 section of its configuration"
        why = f"the engine of {strategy.name} scales the loss itself"
        raise ConfigError([Problem("Accelerator(…)", "kwargs_handlers", "GradScalerKwargs is not used", why, hint)])
    return None


def _build_own(strategy: object, context: RunContext) -> Strategy:
    built = strategy(context) if callable(strategy) else strategy
    if isinstance(built, Strategy):
        return built
    raise PrepareError(
        f"strategy={strategy!r}",
        "A strategy is a name, or a class derived from paceline.strategies.Strategy",
        "Choose auto, single, ddp, fsdp or deepspeed",
    )
