"""Which of the launcher's settings a script does not use, with Accelerate's own Accelerator or without any."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from paceline.config import Resolved
from paceline.config.schema.base import Section, settings_of
from paceline.config.schema.run import RunConfig
from paceline.environment.world import World
from paceline.errors import ConfigError, Problem
from paceline.launch.accelerate_variables import installed_target, not_carried, not_sharded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.config import Origin

__all__ = ["check_accelerate", "say_unused"]

# What only an Accelerator carries out; anything else acts by the launcher itself.
_VALUES = ("mixed_precision", "gradient_accumulation_steps", "debug", "timeout", "use_cpu", "as_accelerate")
_SECTIONS = (
    "ddp_config",
    "fsdp_config",
    "deepspeed_config",
    "parallelism_config",
    "fp8_config",
    "dynamo_config",
    "megatron_lm_config",
)
# Ranks that are started together are plain data parallel in any library.
_SHARDING = ("fsdp", "deepspeed")


def check_accelerate(arguments: Mapping[str, Any], env: Mapping[str, str]) -> None:
    """Compare the launcher's settings with what Accelerate's own Accelerator is about to do; rank 0 says what differs.

    Args:
        arguments: The keyword arguments of its constructor.
        env: Holds what the launcher resolved.

    Raises:
        ConfigError: Explicit settings do not reach it.
    """
    resolved, world = Resolved.from_json(env["PACELINE_CONFIG"]), World.read(env)
    target = installed_target(resolved, world.size, _device_type())
    problems = [*not_carried(resolved, target), *_other_accumulation(resolved, arguments)]
    if problems:
        raise ConfigError(problems)
    if world.rank == 0:
        for line in _differences(resolved, arguments, shards=not not_sharded(resolved, target), ranks=world.size):
            print(f"paceline: {line}", file=sys.stderr, flush=True)


def _other_accumulation(resolved: Resolved, arguments: Mapping[str, Any]) -> Iterator[Problem]:
    """A script that passes its own accumulation plugin does not read the variable; the Trainer always does."""
    config, key = resolved.config, "gradient_accumulation_steps"
    origin = resolved.origin(key)
    is_open = config.strategy == "deepspeed" or not origin.is_explicit or config.gradient_accumulation_steps == 1
    if arguments.get("gradient_accumulation_plugin") is not None and not is_open:
        yield Problem(
            origin.where,
            key,
            f"{config.gradient_accumulation_steps} is not used",
            "the script passes a gradient_accumulation_plugin, as the Trainer of transformers does",
            f"write TrainingArguments({key}={config.gradient_accumulation_steps}) and remove the key",
        )


def _differences(resolved: Resolved, arguments: Mapping[str, Any], *, shards: bool, ranks: int) -> Iterator[str]:
    config = resolved.config
    if not shards and ranks > 1:
        yield (
            f"strategy fsdp ({resolved.origin('strategy').where}): Accelerate shards on accelerators only; here the "
            f"{ranks} ranks train whole replicas, averaged by DDP, and fsdp_config is not used. To shard on the CPU, "
            "start with --as_accelerate."
        )
    precision, origin = arguments.get("mixed_precision"), resolved.origin("mixed_precision")
    if precision is not None and origin.is_explicit and str(precision) != config.mixed_precision:
        yield f"mixed_precision {config.mixed_precision} ({origin.where}) is overridden: the script says {precision}."
    if arguments.get("fsdp_plugin") is not None and config.fsdp_config is not None:
        yield "fsdp_config is overridden: the script passes an fsdp_plugin, or TrainingArguments(fsdp=…)."


def say_unused(env: Mapping[str, str]) -> None:
    """Print one line about settings that nothing used: the script has built neither an Accelerator nor a Trainer.

    Args:
        env: Holds what the launcher resolved.
    """
    resolution = sys.modules.get("paceline.config.resolution")
    if resolution is not None and resolution.was_read():
        return
    found = [*_unused(Resolved.from_json(env["PACELINE_CONFIG"]))]
    if found:
        print(
            "paceline: the script built neither an Accelerator nor a Trainer, and nothing else reads these settings: "
            f"{', '.join(found)}",
            file=sys.stderr,
            flush=True,
        )


def _unused(resolved: Resolved) -> Iterator[str]:
    config = resolved.config
    strategy = resolved.origin("strategy")
    if config.strategy in _SHARDING and strategy.is_explicit:
        yield f"strategy {config.strategy} ({strategy.where})"
    for setting in settings_of(RunConfig):
        value = getattr(config, setting.field)
        if setting.field in _SECTIONS and isinstance(value, Section):
            yield from _of_section(resolved, setting.key, value)
        elif setting.field in _VALUES and _is_explicit(resolved.origin(setting.key), RunConfig, setting.field, value):
            is_obvious = setting.field == "use_cpu" and _device_type() is None
            if not is_obvious:
                yield f"{setting.key} {value} ({resolved.origin(setting.key).where})"


def _of_section(resolved: Resolved, name: str, section: Section) -> Iterator[str]:
    """A section with the names of its explicit values."""
    explicit = [
        inner.key
        for inner in settings_of(type(section))
        # Nobody compiles: that is carried out.
        if getattr(section, inner.field) != "no"
        and _is_explicit(
            resolved.origin(f"{name}.{inner.key}"), type(section), inner.field, getattr(section, inner.field)
        )
    ]
    if explicit:
        where = resolved.origin(f"{name}.{explicit[0]}").where
        more = f" and {len(explicit) - 1} more" if len(explicit) > 1 else ""
        yield f"{name}.{explicit[0]}{more} ({where})"


def _is_explicit(origin: Origin, model: type[Section], field: str, value: Any) -> bool:
    default = model.model_fields[field].get_default(call_default_factory=True)
    return origin.is_explicit and bool(value != default)


def _device_type() -> str | None:
    """The type of the accelerator that the script can use; None without one, or where torch was not imported."""
    torch = sys.modules.get("torch")
    accelerator = None if torch is None else torch.accelerator.current_accelerator(check_available=True)
    return None if accelerator is None else str(accelerator.type)
