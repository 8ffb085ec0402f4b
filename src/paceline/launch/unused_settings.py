"""Which of the launcher's settings a script leaves unused that trains without paceline's Accelerator."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

from paceline.config import Resolved
from paceline.config.schema.base import Section, settings_of
from paceline.config.schema.run import RunConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.config import Origin

__all__ = ["say_unused"]

# What only an Accelerator carries out; anything else acts by the launcher itself.
_VALUES = ("mixed_precision", "gradient_accumulation_steps", "debug", "timeout", "use_cpu")
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


def say_unused(who: str, env: Mapping[str, str]) -> None:
    """Print one line about the settings that are not used, if there are any and no Accelerator of ours is there.

    Args:
        who: What trains instead, as the beginning of a sentence.
        env: Holds what the launcher resolved.
    """
    if _is_facade_built():
        return
    found = [*_unused(Resolved.from_json(env["PACELINE_CONFIG"]))]
    if found:
        print(
            f"paceline: {who} reads nothing of paceline's configuration. Not used: {', '.join(found)}. "
            "Write `from paceline import Trainer, TrainingArguments`, or `Accelerator`, in the script: they have the "
            "same names; or start it with `accelerate launch`.",
            file=sys.stderr,
            flush=True,
        )


def _is_facade_built() -> bool:
    facade = sys.modules.get("paceline.accelerator.accelerator")
    # Not `isinstance`: some libraries keep objects that fail when they are asked for their class.
    return facade is not None and any(issubclass(type(thing), facade.Accelerator) for thing in gc.get_objects())


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
            is_obvious = setting.field == "use_cpu" and not _has_device()
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


def _has_device() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.accelerator.is_available())
