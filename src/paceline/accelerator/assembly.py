"""The one place where the parts of a run are built from its configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from paceline.collectives import SoloGroup, TorchGroup
from paceline.config import FullyShardedDataParallelPlugin, with_arguments, worker_config
from paceline.environment.device import choose_device, describe_device, memory_info
from paceline.environment.error_file import ErrorFile
from paceline.environment.process_group import open_process_group
from paceline.environment.world import World
from paceline.planner import choose_strategy, measure
from paceline.precision import LossScaler, policy_for
from paceline.strategies import RunContext, Strategy, load_strategy
from paceline.watchdog import start_watch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from paceline.accelerator.arguments import Handlers
    from paceline.collectives import Group
    from paceline.config import Resolved


@dataclass(frozen=True, slots=True)
class RunComponents:
    """What an Accelerator is made of before it has seen a model."""

    resolved: Resolved
    handlers: Handlers
    context: RunContext
    backend: str | None
    scaler: LossScaler | None
    error_file: ErrorFile

    @property
    def group(self) -> Group:
        """The ranks that share the global batch."""
        return self.context.group


def assemble(env: Mapping[str, str], arguments: Mapping[str, object], handlers: Handlers) -> RunComponents:
    """Build a run's parts from the launcher's configuration and the script's own arguments.

    Collective: every rank must call it.

    Args:
        env: Holds the launcher's variables.
        arguments: What the script said, by top-level configuration key; only what it said.
        handlers: The script's handler objects.

    Raises:
        ConfigError: The script and the launcher's configuration contradict each other.
        PrecisionError: The device cannot compute in the asked precision.
    """
    said = dict(arguments)
    if handlers.ddp is not None:
        said["ddp_config"] = handlers.ddp
    resolved = with_arguments(worker_config(env), said)
    config = resolved.config
    world = World.read(env)
    device = choose_device(world, cpu=config.use_cpu)
    opening = handlers.process_group
    timeout = opening.timeout or (timedelta(seconds=config.timeout) if config.timeout else None)
    backend = open_process_group(
        world,
        device,
        backend=opening.backend,
        timeout=timeout,
        init_method=opening.init_method,
        # A mesh of one still is a mesh: engines that shard run on a single process as well.
        force=config.strategy in ("fsdp", "deepspeed"),
    )
    error_file = ErrorFile.read(env)
    if backend is not None:
        start_watch(world, error_file, config.hang_timeout)
    group: Group = SoloGroup(device) if backend is None else TorchGroup(device)
    precision = policy_for(config.mixed_precision, device, handlers.autocast)
    scaler = LossScaler(handlers.scaler, device, group) if precision.needs_loss_scaling else None
    context = RunContext(world=world, device=device, group=group, precision=precision, config=config)
    return RunComponents(resolved, handlers, context, backend, scaler, error_file)


def decide_strategy(
    components: RunComponents, models: Sequence[nn.Module], optimizers: Sequence[Optimizer]
) -> tuple[Strategy, str]:
    """Build the configured strategy, or the least sharding under which these models fit; say why.

    Collective: every rank must call it.
    """
    config = components.context.config
    if config.strategy != "auto":
        source = components.resolved.origin("strategy")
        return load_strategy(config.strategy)(components.context), f"{config.strategy}: asked for by {source.where}"
    group = components.group
    if group.size == 1:
        return load_strategy("single")(components.context), "single: there is one process"
    footprint = measure(models, optimizers, components.context.device)
    free = torch.tensor(_free_bytes(components), dtype=torch.int64)
    choice = choose_strategy(
        footprint,
        # All ranks must decide alike, so the poorest decides.
        free=int(group.all_reduce(free, "min")),
        ranks=group.size,
        device=describe_device(components.context.device),
    )
    context = components.context
    if choice.settings:
        said = config.fsdp_config or FullyShardedDataParallelPlugin()
        # What somebody said himself stays.
        chosen = {key: value for key, value in choice.settings.items() if key not in said.model_fields_set}
        context = replace(context, config=config.model_copy(update={"fsdp_config": said.changed(**chosen)}))
    return load_strategy(choice.strategy)(context), f"{choice.reason} (auto)"


def _free_bytes(components: RunComponents) -> int:
    free, _ = memory_info(components.context.device, local_size=components.context.world.local_size)
    return free
