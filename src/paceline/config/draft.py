"""Values on their way to a configuration, and the steps that complete them; each step returns a new draft."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from paceline.config.deepspeed_file.settings import AUTO, FILE_KEY, Shared, name_problems, read_settings, shared_values
from paceline.config.leniency import STRICT
from paceline.config.schema.base import settings_by_field, settings_of
from paceline.config.schema.deepspeed import DeepSpeedPlugin
from paceline.config.schema.fsdp import FullyShardedDataParallelPlugin
from paceline.config.schema.names import sections
from paceline.config.schema.parallelism import ParallelismConfig
from paceline.config.schema.run import RunConfig
from paceline.config.sources.origin import Origin
from paceline.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from paceline.config.leniency import Leniency
    from paceline.config.schema.base import Fault, Section
    from paceline.config.sources.origin import Raw

__all__ = ["Draft", "build", "infer", "read_values"]

_STRATEGY_OF = {"NO": "single", "FSDP": "fsdp", "DEEPSPEED": "deepspeed"}
"""The strategies that distributed types name; any other type means ddp."""
_UNSUPPORTED_TYPES = ("XLA", "MEGATRON_LM")


@dataclass(frozen=True, slots=True)
class Draft:
    """Values with their sources.

    Attributes:
        values: Dotted key to value.
        origins: Dotted key to the source of the value.
        problems: Everything that is wrong so far.
        invalid: Keys whose value was wrong and has been reported.
    """

    values: Mapping[str, Any]
    origins: Mapping[str, Origin]
    problems: tuple[Problem, ...] = ()
    invalid: frozenset[str] = frozenset()

    def with_value(self, key: str, value: object, origin: Origin) -> Draft:
        """Set a value."""
        return replace(self, values={**self.values, key: value}, origins={**self.origins, key: origin})

    def without_invalid(self, key: str) -> Draft:
        """Drop a wrong value, so that its default takes its place."""
        values = {other: value for other, value in self.values.items() if other != key}
        return replace(self, values=values, invalid=self.invalid | {key})

    def with_problem(self, *problems: Problem) -> Draft:
        """Add problems."""
        return replace(self, problems=(*self.problems, *problems))

    def with_fault(self, key: str, fault: Fault, fallback: str = "") -> Draft:
        """Report a fault at the source of its key, else at `fallback`."""
        where = self.origins[key].where if key in self.origins else fallback
        return self.with_problem(Problem(where, key, fault.what, fault.why, fault.hint))

    def is_explicit(self, key: str) -> bool:
        """Whether a flag, variable, file or argument sets the value."""
        return key in self.origins and self.origins[key].is_explicit

    def fields(self, section: str, model: type[Section]) -> dict[str, Any]:
        """Return the values of a section (empty: of the top level) by Python name."""
        prefix = f"{section}." if section else ""
        if not any(key.startswith(prefix) for key in self.values):
            return {}
        keys = {setting.field: prefix + setting.key for setting in settings_of(model)}
        return {field: self.values[key] for field, key in keys.items() if key in self.values}


def read_values(raws: Mapping[str, Raw]) -> Draft:
    """Read every raw value as its field's type."""
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for section, models in {"": (RunConfig,), **sections()}.items():
        prefix = f"{section}." if section else ""
        if not any(key.startswith(prefix) for key in raws):
            continue
        for setting in (setting for model in models for setting in settings_of(model)):
            raw = raws.get(prefix + setting.key)
            if raw is not None and (section or setting.field not in sections()):
                values[prefix + setting.key] = setting.shape.read(raw.value, raw.style, raw.text)
                origins[prefix + setting.key] = raw.origin
    return Draft(values, origins)


def infer(draft: Draft, folder: Path | None, leniency: Leniency = STRICT) -> Draft:
    """Add the values that follow from others: from DeepSpeed's JSON, the distributed type and the strategy.

    Args:
        draft: The values of all sources.
        folder: Where the JSON may be named relative to: the folder of the configuration file.
        leniency: Whether the script's arguments may replace values of the JSON.

    Returns:
        The draft, without wrong values at the top level.
    """
    draft = _drop_invalid_values(_follow_deepspeed_file(draft, folder, leniency))
    named = draft.values.get("distributed_type")
    if named is not None:
        draft = _follow_distributed_type(draft, named, leniency)
    is_single = draft.values.get("strategy") == "single"
    if is_single and not draft.is_explicit("num_processes") and "num_processes" not in draft.invalid:
        draft = draft.with_value("num_processes", 1, draft.origins["strategy"])
    return draft


def build(draft: Draft) -> tuple[RunConfig, Draft]:
    """Make the models, with defaults in the place of wrong values.

    Returns:
        The configuration, and the draft with the problems of the sections.
    """
    built: dict[str, Any] = {}
    for section, models in sections().items():
        for model in models:
            values = draft.fields(section, model)
            if not values:
                continue
            made, draft = _build_section(draft, section, model, values)
            if model is models[0]:
                built[section] = made
    strategy = draft.values.get("strategy")
    if strategy == "fsdp":
        built.setdefault("fsdp_config", FullyShardedDataParallelPlugin())
    if strategy == "deepspeed":
        built.setdefault("deepspeed_config", DeepSpeedPlugin())
    if "parallelism_config" in built:
        built["parallelism_config"], draft = _infer_shard_size(draft, built["parallelism_config"])
    return RunConfig.build({**draft.fields("", RunConfig), **built})[0], draft


def _follow_deepspeed_file(draft: Draft, folder: Path | None, leniency: Leniency) -> Draft:
    """Read DeepSpeed's own JSON, and take over the values that only it sets."""
    value = draft.values.get(FILE_KEY)
    if isinstance(value, (str, dict)) and value != "none":
        settings, name, wrong = read_settings(value, folder)
        if settings is None:
            problem = Problem(draft.origins[FILE_KEY].where, FILE_KEY, wrong, hint="name a DeepSpeed JSON file")
            return draft.with_problem(problem).with_value(FILE_KEY, {}, draft.origins[FILE_KEY])
        if isinstance(value, dict):
            name = draft.origins[FILE_KEY].where
        draft = draft.with_problem(*name_problems(settings, name))
        draft = draft.with_value(FILE_KEY, settings, draft.origins[FILE_KEY])
        for shared in shared_values(settings):
            draft = _share(draft, shared, f"{name}: {shared.path}", leniency)
    inner = "deepspeed_config.gradient_accumulation_steps"
    steps = draft.values.get(inner)
    if isinstance(steps, int):
        draft = _share(draft, Shared("", "gradient_accumulation_steps", steps), draft.origins[inner].where, leniency)
    return draft


def _share(draft: Draft, shared: Shared, where: str, leniency: Leniency) -> Draft:
    """Take over one value of the JSON; where another source sets it too, the two must agree."""
    current = draft.values.get(shared.key)
    is_explicit = draft.is_explicit(shared.key)
    if not is_explicit or current == AUTO:
        return draft.with_value(shared.key, shared.value, Origin("file", where))
    is_scripts = draft.origins[shared.key].kind == "argument"
    if current == shared.value or (is_scripts and leniency.script_wins):
        return draft
    what = f"{current!r} contradicts {shared.value!r} at {where}"
    hint = 'set it in one place, or write "auto" into the JSON'
    why = "one of the two would be ignored"
    return draft.with_problem(Problem(draft.origins[shared.key].where, shared.key, what, why, hint))


def _drop_invalid_values(draft: Draft) -> Draft:
    """Report wrong values at the top level, so that what follows looks at good ones."""
    for fault in RunConfig.build(draft.fields("", RunConfig))[1]:
        draft = draft.with_fault(fault.field, fault).without_invalid(fault.field)
    return draft


def _follow_distributed_type(draft: Draft, named: str, leniency: Leniency) -> Draft:
    """Let `distributed_type` choose the strategy and the device, unless these are given and contradict it."""
    origin = draft.origins["distributed_type"]
    meant = _STRATEGY_OF.get(named, "ddp")
    if not draft.is_explicit("strategy"):
        if named not in _UNSUPPORTED_TYPES:
            draft = draft.with_value("strategy", meant, origin)
    elif leniency.script_wins and draft.origins["strategy"].kind == "argument":
        pass
    elif "strategy" not in draft.invalid and draft.values["strategy"] != meant:
        what = f"{draft.values['strategy']} contradicts distributed_type {named} at {origin.where}"
        problem = Problem(
            draft.origins["strategy"].where,
            "strategy",
            what,
            f"{named} means strategy {meant}",
            "remove one of the two",
        )
        draft = replace(draft.with_problem(problem), invalid=draft.invalid | {"strategy"})
    if named == "MULTI_CPU" and "use_cpu" not in draft.invalid and not draft.values.get("use_cpu"):
        draft = draft.with_value("use_cpu", True, origin)
    return draft


def _build_section(
    draft: Draft, section: str, model: type[Section], values: Mapping[str, Any]
) -> tuple[Section, Draft]:
    built, faults = model.build(values)
    names = settings_by_field(model)
    first = f"{section}.{names[next(iter(values))].key}"
    for fault in faults:
        draft = draft.with_fault(f"{section}.{names[fault.field].key}", fault, draft.origins[first].where)
    return built, draft


def _infer_shard_size(draft: Draft, mesh: ParallelismConfig) -> tuple[ParallelismConfig, Draft]:
    """Shard each copy over the ranks that it gets, unless the size is given."""
    key = "parallelism_config.parallelism_config_dp_shard_size"
    count, size = draft.values.get("num_processes"), mesh.total_size
    if key in draft.values or count is None or size in (1, count) or count % size:
        return mesh, draft
    origin = Origin("detected", "num_processes divided by the other sizes")
    draft = draft.with_value(key, count // size, origin)
    return ParallelismConfig.build(draft.fields("parallelism_config", ParallelismConfig))[0], draft
