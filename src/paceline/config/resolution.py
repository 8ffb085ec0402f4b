"""From all sources to one checked configuration."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from paceline.config.checks import CheckContext, find_problems
from paceline.config.deepspeed_file.settings import AUTO, FILE_KEY, Shared, name_problems, read_settings, shared_values
from paceline.config.force import handed_over
from paceline.config.resolved import Resolved, values_of
from paceline.config.schema.base import Fault, Section, slots, slots_by_field
from paceline.config.schema.deepspeed import DeepSpeedPlugin
from paceline.config.schema.fsdp import FullyShardedDataParallelPlugin
from paceline.config.schema.fsdp1 import translate
from paceline.config.schema.names import sections
from paceline.config.schema.parallelism import ParallelismConfig
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
from paceline.errors import ConfigError, Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from paceline.config.sources.origin import Raw

_STRATEGY_OF = {"NO": "single", "FSDP": "fsdp", "DEEPSPEED": "deepspeed"}
_UNBUILT = ("XLA", "MEGATRON_LM")


@dataclass(slots=True)
class _Draft:
    """Values on their way to a configuration, keyed by dotted key."""

    values: dict[str, Any]
    origins: dict[str, Origin]
    folder: Path | None = None
    problems: list[Problem] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    def settle(self, key: str, value: object, origin: Origin) -> None:
        """Set a value that follows from another one, with the source of that one."""
        self.values[key] = value
        self.origins[key] = origin

    def fault(self, dotted: str, found: Fault, fallback: str = "") -> None:
        """Report a fault at the source of its key."""
        where = self.origins[dotted].where if dotted in self.origins else fallback
        self.problems.append(Problem(where, dotted, found.what, found.why, found.hint))


def resolve(
    *,
    flags: Mapping[str, object],
    env: Mapping[str, str],
    file: Path | None,
    detected: Mapping[str, object] | None = None,
) -> Resolved:
    """Read, merge and check all sources of the configuration.

    Args:
        flags: Flags that were really typed, by name with or without dashes; strings are parsed.
        env: The environment, of which the PACELINE_ variables are read.
        file: The configuration file, if there is one.
        detected: Values found out about the machine, by dotted key; any other source overrides them.

    Raises:
        ConfigError: With everything that is wrong, from all sources at once.
    """
    layers = [flag_layer(flags), environment_layer(env)]
    layers += [file_layer(file)] if file is not None else []
    asked = list(layers)
    layers.append(detected_layer(detected or {}))
    raws = merge(layers)
    problems = [problem for layer in layers for problem in layer.problems]
    rivals = _rivals(asked)
    problems += rivals + _idle_switch(asked, raws)
    notes = [note for layer in layers for note in layer.notes]

    given = {key: raw.origin for key, raw in raws.items()}
    draft, translation_notes, translation_problems = _draft(raws)
    draft.folder = None if file is None else file.parent
    config = _finish(draft)
    if config.strategy in ("fsdp", "auto"):
        problems += translation_problems
        notes += translation_notes
    problems += draft.problems
    broken = frozenset(draft.broken | {problem.key for problem in rivals})
    problems += find_problems(CheckContext(config, {**given, **draft.origins}, broken))
    if problems:
        raise ConfigError(problems)
    return Resolved(config, draft.origins, tuple(notes))


def worker_config(env: Mapping[str, str]) -> Resolved:
    """Return what the launcher resolved, or without a launcher what the PACELINE_ variables say.

    Raises:
        ConfigError: PACELINE_CONFIG is not the launcher's, or a PACELINE_ variable is wrong.
    """
    inside = handed_over()
    if inside is not None:
        return inside
    handed = env.get("PACELINE_CONFIG")
    if handed:
        return Resolved.from_json(handed)
    return resolve(flags={}, env=env, file=None)


def with_arguments(resolved: Resolved, arguments: Mapping[str, object]) -> Resolved:
    """Lay explicit arguments of `Accelerator(…)` over a configuration.

    Args:
        resolved: What the launcher or the environment said.
        arguments: Values by top-level key; of a section, given as a model object, the fields that
            were set count. None means not given.

    Raises:
        ConfigError: An argument contradicts a value that somebody set elsewhere, or cannot work.
    """
    draft = _Draft(dict(values_of(resolved.config)), dict(resolved.origins))
    draft.values = {key: value for key, value in draft.values.items() if key in resolved.origins}
    for name, value in arguments.items():
        if value is not None:
            _lay_over(draft, name, value)
    if not resolved.origin("strategy").is_explicit:
        _follow_section(draft, arguments)
    config = _finish(draft)
    context = CheckContext(config, draft.origins, frozenset(draft.broken))
    problems = draft.problems or find_problems(context)
    if problems:
        raise ConfigError(problems)
    return replace(resolved, config=config, origins=draft.origins)


def _rivals(layers: list[Layer]) -> list[Problem]:
    """Report sources that name different distributed types: the later one would silently lose."""
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


def _idle_switch(layers: list[Layer], raws: Mapping[str, Raw]) -> list[Problem]:
    if any(key.startswith("parallelism_config.") for key in raws):
        return []
    hint = "add for example --parallelism_config_dp_replicate_size 2"
    what = "no size of parallelism_config is given"
    return [
        Problem(layer.switch.where, "parallelism_config", what, "there is nothing to use", hint)
        for layer in layers
        if layer.switch is not None
    ]


def _draft(raws: dict[str, Raw]) -> tuple[_Draft, list[str], list[Problem]]:
    """Translate version 1, and read every raw value as its field's type."""
    translation = translate(raws)
    draft = _Draft({}, {})
    for section, models in {"": (RunConfig,), **sections()}.items():
        prefix = f"{section}." if section else ""
        for model in models:
            for slot in slots(model):
                raw = translation.raws.get(prefix + slot.key)
                if raw is not None and (section or slot.field not in sections()):
                    value = slot.shape.read(raw.value, raw.style, raw.text)
                    draft.settle(prefix + slot.key, value, raw.origin)
    return draft, translation.notes, translation.problems


def _finish(draft: _Draft) -> RunConfig:
    """Build the sections, settle what follows from other values, and build the whole."""
    built: dict[str, Any] = {}
    _adopt_deepspeed(draft)
    for section, models in sections().items():
        for model in models:
            part = _build_section(draft, section, model)
            if part is not None and model is models[0]:
                built[section] = part
    top, faults = RunConfig.build(_values(draft, "", RunConfig))
    for found in faults:
        draft.fault(found.field, found)
        draft.broken.add(found.field)
        draft.values.pop(found.field, None)
    _settle_strategy(draft, top)
    top, _ = RunConfig.build(_values(draft, "", RunConfig))
    if top.strategy == "fsdp":
        built.setdefault("fsdp_config", FullyShardedDataParallelPlugin())
    if top.strategy == "deepspeed":
        built.setdefault("deepspeed_config", DeepSpeedPlugin())
    mesh = built.get("parallelism_config")
    if mesh is not None:
        built["parallelism_config"] = _infer_shards(draft, mesh, top.num_processes)
    return RunConfig.build({**_values(draft, "", RunConfig), **built})[0]


def _adopt_deepspeed(draft: _Draft) -> None:
    """Read DeepSpeed's own JSON, and let the run follow what only the JSON says."""
    value = draft.values.get(FILE_KEY)
    if isinstance(value, (str, dict)) and value != "none":
        settings, name, wrong = read_settings(value, draft.folder)
        if settings is None:
            draft.fault(FILE_KEY, Fault("", wrong, hint="name a DeepSpeed JSON file"))
            draft.values[FILE_KEY] = {}
            return
        name = draft.origins[FILE_KEY].where if isinstance(value, dict) else name
        draft.problems.extend(name_problems(settings, name))
        draft.values[FILE_KEY] = settings
        for shared in shared_values(settings):
            _adopt(draft, shared, f"{name}: {shared.path}")
    inner = "deepspeed_config.gradient_accumulation_steps"
    if isinstance(draft.values.get(inner), int):
        _adopt(draft, Shared("", "gradient_accumulation_steps", draft.values[inner]), draft.origins[inner].where)


def _adopt(draft: _Draft, shared: Shared, where: str) -> None:
    """Take over one value of the JSON, unless somebody said it already; then the two must agree."""
    origin = draft.origins.get(shared.key)
    if origin is None or not origin.is_explicit:
        draft.settle(shared.key, shared.value, Origin("file", where))
    elif draft.values.get(shared.key) not in (shared.value, AUTO):
        what = f"{draft.values.get(shared.key)!r} contradicts {shared.value!r} at {where}"
        hint = 'set it in one place, or write "auto" into the JSON'
        draft.problems.append(Problem(origin.where, shared.key, what, "one of the two would silently lose", hint))
    elif draft.values.get(shared.key) == AUTO:
        draft.settle(shared.key, shared.value, Origin("file", where))


def _values(draft: _Draft, section: str, model: type[Section]) -> dict[str, Any]:
    prefix = f"{section}." if section else ""
    return {slot.field: draft.values[prefix + slot.key] for slot in slots(model) if prefix + slot.key in draft.values}


def _build_section(draft: _Draft, section: str, model: type[Section]) -> Section | None:
    values = _values(draft, section, model)
    if not values:
        return None
    built, faults = model.build(values)
    names = slots_by_field(model)
    first = next(iter(values))
    for found in faults:
        fallback = draft.origins[f"{section}.{names[first].key}"].where
        draft.fault(f"{section}.{names[found.field].key}", found, fallback)
    return built


def _settle_strategy(draft: _Draft, top: RunConfig) -> None:
    """Make strategy, distributed_type, num_processes and use_cpu say the same."""
    if top.distributed_type is not None:
        _settle_type(draft, top, top.distributed_type)
    strategy = draft.values.get("strategy", "auto")
    processes = draft.origins.get("num_processes")
    open_count = processes is None or not processes.is_explicit
    if strategy == "single" and open_count and "num_processes" not in draft.broken:
        draft.settle("num_processes", 1, draft.origins["strategy"])


def _settle_type(draft: _Draft, top: RunConfig, named: str) -> None:
    origin = draft.origins["distributed_type"]
    meant = _STRATEGY_OF.get(named, "ddp")
    given = draft.origins.get("strategy")
    if given is None or not given.is_explicit:
        if named not in _UNBUILT:
            draft.settle("strategy", meant, origin)
    elif top.strategy != meant and "strategy" not in draft.broken:
        what = f"{top.strategy} contradicts distributed_type {named} at {origin.where}"
        why = f"{named} means strategy {meant}"
        draft.problems.append(Problem(given.where, "strategy", what, why, "remove one of the two"))
        draft.broken.add("strategy")
    if named == "MULTI_CPU" and "use_cpu" not in draft.broken:
        draft.settle("use_cpu", True, draft.origins.get("use_cpu", origin) if top.use_cpu else origin)


def _infer_shards(draft: _Draft, mesh: ParallelismConfig, count: int | None) -> ParallelismConfig:
    """Shard each copy over the ranks that it gets, unless the size was given."""
    key = "parallelism_config.parallelism_config_dp_shard_size"
    if key in draft.values or count is None or mesh.total_size == 1 or count % mesh.total_size:
        return mesh
    if count == mesh.total_size:
        return mesh
    size = count // mesh.total_size
    draft.settle(key, size, Origin("detected", "num_processes divided by the other sizes"))
    return ParallelismConfig.build({**_values(draft, "parallelism_config", ParallelismConfig)})[0]


def _parameter(key: str) -> str:
    """What the constructor of `Accelerator` calls a key of the file."""
    if key == "use_cpu":
        return "cpu"
    plugins = {"fsdp_config": "fsdp_plugin", "deepspeed_config": "deepspeed_plugin", "dynamo_config": "dynamo_plugin"}
    return plugins.get(key, "kwargs_handlers" if key == "ddp_config" else key)


def _lay_over(draft: _Draft, name: str, value: object) -> None:
    known = slots_by_field(RunConfig)
    if name not in known:
        hint = did_you_mean(name, known)
        draft.problems.append(Problem("Accelerator(…)", name, "unknown argument", hint=hint))
    elif name not in sections():
        _lay_value(draft, name, known[name].shape.read(value), f"Accelerator({_parameter(name)}=…)")
    elif isinstance(value, sections()[name][0]):
        for slot in slots(type(value)):
            if slot.field in value.model_fields_set:
                where = f"Accelerator({_parameter(name)}={type(value).__name__}({slot.field}=…))"
                _lay_value(draft, f"{name}.{slot.key}", getattr(value, slot.field), where)
    else:
        what = f"a {type(value).__name__} is not allowed"
        why = f"it must be a {sections()[name][0].__name__}"
        draft.problems.append(Problem(f"Accelerator({_parameter(name)}=…)", name, what, why))


def _lay_value(draft: _Draft, key: str, value: object, where: str) -> None:
    old = draft.origins.get(key)
    if old is not None and old.is_explicit and draft.values.get(key) != value:
        what = f"{value!r} contradicts {draft.values.get(key)!r} at {old.where}"
        why = "one of the two would silently lose"
        draft.problems.append(Problem(where, key, what, why, "set it in one place"))
    else:
        draft.settle(key, value, Origin("argument", where))


def _follow_section(draft: _Draft, arguments: Mapping[str, object]) -> None:
    """Let a plugin choose its strategy when nobody else did, as users of Accelerate expect."""
    for section, strategy in (("fsdp_config", "fsdp"), ("deepspeed_config", "deepspeed")):
        if arguments.get(section) is not None and arguments.get("strategy") is None:
            draft.settle("strategy", strategy, Origin("argument", f"Accelerator({_parameter(section)}=…)"))
