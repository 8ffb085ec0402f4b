"""From all sources to one checked configuration: merge, translate, infer, build, check."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from paceline.config.checks import CheckContext, find_problems
from paceline.config.draft import Draft, build, infer, read_values
from paceline.config.leniency import STRICT
from paceline.config.resolved import Resolved, current_configuration, values_at
from paceline.config.schema.base import settings_by_field, settings_of
from paceline.config.schema.names import sections
from paceline.config.schema.run import RunConfig
from paceline.config.sources.layers import (
    Layer,
    detected_layer,
    environment_layer,
    file_layer,
    flag_layer,
    merge,
)
from paceline.config.sources.origin import Origin
from paceline.config.translation import translate
from paceline.errors import ConfigError, Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from paceline.config.leniency import Leniency
    from paceline.config.sources.origin import Raw

__all__ = ["resolve", "was_read", "with_arguments", "worker_config"]

_PARAMETERS = {
    "use_cpu": "cpu",
    "fsdp_config": "fsdp_plugin",
    "deepspeed_config": "deepspeed_plugin",
    "dynamo_config": "dynamo_plugin",
    "ddp_config": "kwargs_handlers",
}
"""Keys of the file that `Accelerator` takes under another name."""

_READ: Final[set[str]] = set()


def resolve(
    *,
    flags: Mapping[str, object],
    env: Mapping[str, str],
    file: Path | None,
    detected: Mapping[str, object] | None = None,
    starts_ranks: bool = False,
) -> Resolved:
    """Read, merge and check all sources of the configuration.

    Args:
        flags: Flags that were given, by name with or without dashes; strings are parsed.
        env: The environment, of which the PACELINE_ variables are read.
        file: The configuration file, if there is one.
        detected: Values detected on the machine, by dotted key; any other source overrides them.
        starts_ranks: Whether ranks are about to be started here: the packages that they need must be installed.

    Returns:
        The configuration, with the source of each value.

    Raises:
        ConfigError: With all problems of all sources.
    """
    explicit = [flag_layer(flags), environment_layer(env)]
    if file is not None:
        explicit.append(file_layer(file))
    layers = [*explicit, detected_layer(detected or {})]

    merged = merge(layers)
    translation = translate(merged)
    draft = infer(read_values(translation.raws), None if file is None else file.parent)
    config, draft = build(draft)

    conflicts = _conflicting_types(explicit)
    problems = [problem for layer in layers for problem in layer.problems]
    problems += conflicts + _switch_without_sizes(explicit, merged)
    notes = [note for layer in layers for note in layer.notes]
    if config.strategy in ("fsdp", "auto"):
        problems += translation.problems
        notes += translation.notes
    problems += draft.problems
    given = {key: raw.origin for key, raw in merged.items()}
    invalid = draft.invalid | {problem.key for problem in conflicts}
    problems += find_problems(CheckContext(config, {**given, **draft.origins}, invalid, starts_ranks=starts_ranks))
    if problems:
        raise ConfigError(problems)
    return Resolved(config, draft.origins, tuple(notes))


def worker_config(env: Mapping[str, str]) -> Resolved:
    """Return the configuration of this process.

    Args:
        env: The environment: PACELINE_CONFIG where the launcher started this process, else the PACELINE_ variables.

    Returns:
        The configuration; inside `use_configuration`, that one.

    Raises:
        ConfigError: PACELINE_CONFIG was not written by the launcher, or a PACELINE_ variable is wrong.
    """
    current = current_configuration()
    if current is not None:
        return current
    from_launcher = env.get("PACELINE_CONFIG")
    if from_launcher:
        _READ.add("PACELINE_CONFIG")
        return Resolved.from_json(from_launcher)
    return resolve(flags={}, env=env, file=None)


def was_read() -> bool:
    """Whether `worker_config` has read the launcher's configuration in this process."""
    return bool(_READ)


def with_arguments(resolved: Resolved, arguments: Mapping[str, object], leniency: Leniency = STRICT) -> Resolved:
    """Add the arguments of `Accelerator(…)` to a configuration.

    Args:
        resolved: The configuration of the launcher or the environment.
        arguments: Values by top-level key; None means not given. Of a section, given as a model object, the
            fields that were set count.
        leniency: Whether an argument may replace another source's value, and be one that nothing reads.

    Returns:
        The new configuration.

    Raises:
        ConfigError: An argument contradicts an explicit value of another source, or cannot work.
    """
    draft = Draft(values_at(resolved.config, resolved.origins), resolved.origins)
    for name, value in arguments.items():
        if value is not None:
            draft = _add_argument(draft, name, value, leniency)
    if not resolved.origin("strategy").is_explicit:
        draft = _choose_by_plugin(draft, arguments)
    config, draft = build(infer(draft, None, leniency))
    problems = draft.problems or find_problems(CheckContext(config, draft.origins, draft.invalid, leniency))
    if problems:
        raise ConfigError(problems)
    return replace(resolved, config=config, origins=draft.origins)


def _conflicting_types(layers: Sequence[Layer]) -> list[Problem]:
    """Report sources that name different distributed types: merging would ignore the later one."""
    key = "distributed_type"
    named = [layer.raws[key] for layer in layers if key in layer.raws]
    return [
        Problem(
            named[0].origin.where,
            key,
            f"{named[0]} contradicts {other} at {other.origin.where}",
            "each of them chooses the strategy",
            "remove one of the two",
        )
        for other in named[1:]
        if str(other).casefold() != str(named[0]).casefold()
    ]


def _switch_without_sizes(layers: Sequence[Layer], merged: Mapping[str, Raw]) -> list[Problem]:
    """Report `--use_parallelism_config` where no size of the mesh is set."""
    if any(key.startswith("parallelism_config.") for key in merged):
        return []
    what = "parallelism_config sets no size"
    hint = "add for example --parallelism_config_dp_replicate_size 2"
    return [
        Problem(layer.switch.where, "parallelism_config", what, "there is nothing to use", hint)
        for layer in layers
        if layer.switch is not None
    ]


def _source(key: str, value: str = "…") -> str:
    """Write an argument of `Accelerator` as its caller knows it."""
    return f"Accelerator({_PARAMETERS.get(key, key)}={value})"


def _add_argument(draft: Draft, name: str, value: object, leniency: Leniency) -> Draft:
    known = settings_by_field(RunConfig)
    if name not in known:
        return draft.with_problem(Problem("Accelerator(…)", name, "unknown argument", hint=did_you_mean(name, known)))
    if name not in sections():
        return _add_value(draft, name, known[name].shape.read(value), _source(name), leniency)
    model = sections()[name][0]
    if not isinstance(value, model):
        what = f"a {type(value).__name__} is not allowed"
        return draft.with_problem(Problem(_source(name), name, what, f"it must be a {model.__name__}"))
    for setting in settings_of(model):
        if setting.field in value.model_fields_set:
            where = _source(name, f"{model.__name__}({setting.field}=…)")
            draft = _add_value(draft, f"{name}.{setting.key}", getattr(value, setting.field), where, leniency)
    return draft


def _add_value(draft: Draft, key: str, value: object, where: str, leniency: Leniency) -> Draft:
    old = draft.origins.get(key)
    agrees = old is None or not old.is_explicit or draft.values.get(key) == value
    if old is None or agrees or (leniency.script_wins and old.kind != "argument"):
        return draft.with_value(key, value, Origin("argument", where))
    what = f"{value!r} contradicts {draft.values.get(key)!r} at {old.where}"
    return draft.with_problem(Problem(where, key, what, "one of the two would be ignored", "set it in one place"))


def _choose_by_plugin(draft: Draft, arguments: Mapping[str, object]) -> Draft:
    """Let a plugin choose its strategy when no source names one, as users of Accelerate expect."""
    for section, strategy in (("fsdp_config", "fsdp"), ("deepspeed_config", "deepspeed")):
        if arguments.get(section) is not None and arguments.get("strategy") is None:
            draft = draft.with_value("strategy", strategy, Origin("argument", _source(section)))
    return draft
