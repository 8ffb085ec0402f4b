"""Builds the components of a run from its configuration: devices, process group, precision."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from paceline.accelerator.stepping import LossScaler
from paceline.collectives import SoloGroup, TorchGroup
from paceline.collectives.watchdog import start_watch
from paceline.config import with_arguments, worker_config
from paceline.environment.device import choose_device, supported_precisions
from paceline.environment.error_file import ErrorFile
from paceline.environment.process_group import open_process_group
from paceline.environment.world import World
from paceline.errors import ConfigError, Problem
from paceline.strategies import RunContext
from paceline.strategies.precision import policy_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.accelerator.arguments import Handlers
    from paceline.accelerator.policies import Policies
    from paceline.collectives import Group
    from paceline.config import Resolved


@dataclass(frozen=True, slots=True)
class RunComponents:
    """What a run has before there is a model.

    Attributes:
        resolved: The configuration with the origin of each value.
        handlers: The script's `kwargs_handlers`.
        context: What strategies know of the run.
        backend: The backend of the process group; None without one.
        scaler: The loss scaler of fp16.
        error_file: Where a failure is reported to the launcher.
        policies: The rules of the run.
        arguments: What the script configures, by top-level configuration key.
    """

    resolved: Resolved
    handlers: Handlers
    context: RunContext
    backend: str | None
    scaler: LossScaler | None
    error_file: ErrorFile
    policies: Policies
    arguments: Mapping[str, object]

    def resolve_with(self, env: Mapping[str, str], section: str, plugin: object) -> Resolved:
        """The configuration with another section of the script's.

        Raises:
            ConfigError: It contradicts the launcher's configuration.
        """
        return resolve_arguments(env, {**self.arguments, section: plugin}, self.handlers, self.policies)


def resolve_arguments(
    env: Mapping[str, str], arguments: Mapping[str, object], handlers: Handlers, policies: Policies
) -> Resolved:
    """Add what the script says to the launcher's configuration; see `assemble`."""
    explicit = {key: value for key, value in arguments.items() if value is not None}
    if handlers.ddp is not None:
        explicit["ddp_config"] = handlers.ddp
    if handlers.fp8 is not None:
        explicit["fp8_config"] = handlers.fp8
    return with_arguments(worker_config(env), explicit, policies.leniency)


def _refuse_idle_switch(resolved: Resolved) -> None:
    """Raise where only the environment asks for the switch: nothing turns it on in a process of plain Python."""
    why = "Python had started the script before paceline was imported, so `import accelerate` finds the real package"
    hint = "start it with `python -m paceline.compat SCRIPT` or `paceline launch SCRIPT`, or unset the variable"
    where = resolved.origin("as_accelerate").where
    raise ConfigError([Problem(where, "as_accelerate", "true has no effect here", why, hint)])


def assemble(
    env: Mapping[str, str], arguments: Mapping[str, object], handlers: Handlers, policies: Policies
) -> RunComponents:
    """Build a run's components from the launcher's configuration and the script's own arguments.

    Collective: every rank must call it.

    Args:
        env: Environment variables, with the launcher's.
        arguments: What the script configures, by top-level configuration key; None where it leaves that open.
        handlers: The script's `kwargs_handlers`.
        policies: The rules of the run.

    Raises:
        ConfigError: The script and the launcher's configuration contradict each other.
        PrecisionError: The device cannot compute in the requested precision.
    """
    resolved = resolve_arguments(env, arguments, handlers, policies)
    config = resolved.config
    if config.as_accelerate and "PACELINE_CONFIG" not in env and "paceline.compat.install" not in sys.modules:
        _refuse_idle_switch(resolved)
    world = World.read(env)
    device = choose_device(world, cpu=config.use_cpu, named=env.get("ACCELERATE_TORCH_DEVICE", ""))
    group_settings = handlers.process_group
    timeout = group_settings.timeout
    if timeout is None and config.timeout:
        timeout = timedelta(seconds=config.timeout)
    backend = open_process_group(
        world,
        device,
        backend=group_settings.backend,
        timeout=timeout,
        init_method=group_settings.init_method,
        # FSDP2 and DeepSpeed need a process group even for a single process.
        force=config.strategy in ("fsdp", "deepspeed"),
    )
    error_file = ErrorFile.read(env)
    if backend is not None:
        start_watch(world, error_file, config.hang_timeout)
    group: Group = SoloGroup(device) if backend is None else TorchGroup(device)
    emulates_fp8 = config.fp8_config is not None and config.fp8_config.emulate
    supported = supported_precisions(device) | ({"fp8"} if emulates_fp8 else set())
    precision = policy_for(config.mixed_precision, device, handlers.autocast, supported=supported)
    scaler = LossScaler(handlers.scaler, device, group) if precision.needs_loss_scaling else None
    context = RunContext(
        world=world,
        device=device,
        group=group,
        precision=precision,
        config=config,
        leniency=policies.leniency,
        source_of=lambda key: resolved.origin(key).where,
    )
    return RunComponents(resolved, handlers, context, backend, scaler, error_file, policies, arguments)
