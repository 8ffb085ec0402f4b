"""Resolves the DeepSpeed configuration: fills every `"auto"` from the run, and reports every contradiction.

The result describes the run as it is; `engine_settings` later takes out what the engine must not do itself.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from paceline.config.deepspeed_file.keys import OPTIMIZERS, SCHEDULES
from paceline.config.deepspeed_file.settings import AUTO, value_at, walk
from paceline.config.deepspeed_file.values import decided_settings
from paceline.errors import ConfigError, Problem, did_you_mean
from paceline.strategies.placeholders import DummyOptim, DummyScheduler

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn
    from torch.optim import Optimizer

    from paceline.config import DeepSpeedPlugin, RunConfig

__all__ = ["AutoValues", "hidden_size_of", "resolve_scheduler", "resolve_settings"]

_WHERE = "DeepSpeed configuration"
_CONFLICT = "the two conflict; one would be ignored"
_ADAM = ("adam", "adamw")
_ADAM_MORE = {"torch_adam", "adam_w_mode", "bias_correction", "fp32_optimizer_states", "set_grad_none"}
# The defaults of torch's Adam.
_ADAM_DEFAULTS = {"betas": [0.9, 0.999], "eps": 1e-8}


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoValues:
    """What the run knows, for the values that are `"auto"`.

    Attributes:
        world_size: Ranks that share the global batch.
        micro_batch: Samples in one rank's batch; None if no prepared loader has a batch size.
        hidden_size: Width of the model, from which DeepSpeed's buckets are sized; None if its config has none.
        optimizer: What the script passed to `prepare`.
        schedule: The placeholder of its schedule, if the script passed it in the same call.
        on_cpu: Whether the run computes on a CPU, where memory is not pinned.
    """

    world_size: int
    micro_batch: int | None
    hidden_size: int | None
    optimizer: Optimizer
    on_cpu: bool
    schedule: DummyScheduler | None = None


def resolve_settings(
    plugin: DeepSpeedPlugin, config: RunConfig, auto: AutoValues, *, script_wins: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration, complete.

    Args:
        plugin: What the script and the configuration say of DeepSpeed.
        config: The run.
        auto: What only the run knows.
        script_wins: Replace batch sizes that differ from the run's, instead of refusing them.

    Raises:
        ConfigError: Values that contradict the run, and `"auto"` that cannot be resolved; all at once.
    """
    settings = decided_settings(plugin, config)
    problems: list[Problem] = []
    _batch_sizes(settings, config, auto, problems, script_wins=script_wins)
    problems += _scaling(settings)
    _optimizer(settings, auto.optimizer, problems)
    if auto.schedule is not None and auto.schedule.lr_scheduler_callable is None and "scheduler" in settings:
        problems += _schedule(settings["scheduler"], auto.schedule, auto.optimizer)[1]
    _buckets(settings["zero_optimization"], auto.hidden_size)
    _memory(settings["zero_optimization"], auto)
    problems += [
        Problem(_WHERE, path, 'cannot resolve "auto"', "paceline has no value for this key", "write a value")
        for path, value in walk(settings)
        if value == AUTO and not path.startswith("scheduler.")
    ]
    if problems:
        raise ConfigError(problems)
    return settings


def _batch_sizes(
    settings: dict[str, Any], config: RunConfig, auto: AutoValues, problems: list[Problem], *, script_wins: bool
) -> None:
    accumulation = config.gradient_accumulation_steps
    if script_wins:
        settings.pop("train_batch_size", None)
        if auto.micro_batch is not None:
            settings["train_micro_batch_size_per_gpu"] = AUTO
    key = "train_micro_batch_size_per_gpu"
    micro_batch = settings.get(key, AUTO)
    if micro_batch == AUTO:
        settings[key] = micro_batch = auto.micro_batch or 1
    elif auto.micro_batch not in (None, micro_batch):
        what = f"{micro_batch} contradicts the run"
        why = f"the prepared loader gives each rank batches of {auto.micro_batch}"
        problems.append(Problem(_WHERE, key, what, why, 'write "auto", or change the loader'))
    total = micro_batch * accumulation * auto.world_size
    given = settings.get("train_batch_size", AUTO)
    settings["train_batch_size"] = total
    if given not in (AUTO, total):
        what = f"{given} contradicts the run"
        why = f"{auto.world_size} ranks x {accumulation} micro-batches x {micro_batch} samples make {total}"
        problems.append(Problem(_WHERE, "train_batch_size", what, why, 'write "auto"'))


def _scaling(settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Scales of gradients that DeepSpeed cannot bring together with its reduce-scatter."""
    zero = settings["zero_optimization"]
    if zero["stage"] < 2 or not zero.get("reduce_scatter", True):
        return
    why = f"with stage {zero['stage']} DeepSpeed averages by reduce-scatter, which scales after the sum alone"
    hint = 'remove the key, or write "reduce_scatter": false into zero_optimization'
    if settings.get("prescale_gradients"):
        yield Problem(_WHERE, "prescale_gradients", "true", why, hint)
    factor = settings.get("gradient_predivide_factor")
    if factor not in (None, AUTO, 1):
        yield Problem(_WHERE, "gradient_predivide_factor", f"{factor}", why, hint)


def _optimizer(settings: dict[str, Any], optimizer: Optimizer, problems: list[Problem]) -> None:
    section = settings.get("optimizer")
    if not isinstance(optimizer, DummyOptim):
        if section is not None:
            what = f"{section.get('type')} is described, and the script has an optimizer {type(optimizer).__name__}"
            hint = "prepare a DummyOptim in its place, or remove the section"
            problems.append(Problem(_WHERE, "optimizer", what, _CONFLICT, hint))
        return
    if section is None:
        hint = "add the section, or pass a torch optimizer"
        problems.append(Problem(_WHERE, "optimizer", "is missing", "a DummyOptim was prepared for it", hint))
        return
    parameters = section["params"] = dict(section.get("params") or {})
    # What the script passes and the section leaves out would otherwise be replaced by the optimizer's default.
    parameters.update({key: value for key, value in optimizer.explicit.items() if key not in parameters})
    for key, value in list(parameters.items()):
        if value == AUTO:
            parameters[key] = optimizer.defaults.get(key, _ADAM_DEFAULTS.get(key, AUTO))
        elif key in optimizer.explicit and not _same(value, optimizer.explicit[key]):
            what = f"{value} contradicts DummyOptim({key}={optimizer.explicit[key]})"
            hint = 'write "auto", or leave the argument out'
            problems.append(Problem(_WHERE, f"optimizer.params.{key}", what, _CONFLICT, hint))
    problems += _unknown_optimizer(section)


def _unknown_optimizer(section: Mapping[str, Any]) -> Iterator[Problem]:
    """Report a class that neither DeepSpeed nor torch has, and arguments that the class does not have."""
    kind = section.get("type")
    torch_class = getattr(torch.optim, "AdamW" if str(kind).lower() in _ADAM else str(kind), None)
    if not isinstance(kind, str) or (kind.lower() not in OPTIMIZERS and torch_class is None):
        hint = f"write a class of torch.optim, or one of {', '.join(sorted(OPTIMIZERS))}"
        yield Problem(_WHERE, "optimizer.type", f"{kind!r} is unknown", "neither DeepSpeed nor torch has it", hint)
    elif torch_class is not None:
        accepted = {*inspect.signature(torch_class).parameters} | (_ADAM_MORE if kind.lower() in _ADAM else set())
        for key in section.get("params") or {}:
            if key not in accepted:
                hint = "write gradient_clipping" if key == "max_grad_norm" else did_you_mean(key, accepted)
                yield Problem(_WHERE, f"optimizer.params.{key}", f"{kind} has no such argument", hint=hint)


def _same(one: Any, other: Any) -> bool:
    as_list = [list(value) if isinstance(value, (list, tuple)) else value for value in (one, other)]
    return bool(as_list[0] == as_list[1])


def _buckets(zero: dict[str, Any], hidden: int | None) -> None:
    width = hidden or 0
    sizes = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    for key, size in sizes.items():
        if zero.get(key) == AUTO:
            zero[key] = size
            if hidden is None:
                # Leaves DeepSpeed's own default.
                del zero[key]


def _memory(zero: dict[str, Any], auto: AutoValues) -> None:
    for part in ("offload_optimizer", "offload_param"):
        section = zero.get(part)
        if section:
            # Pinned memory only speeds up copies to an accelerator.
            section["pin_memory"] = bool(section.get("pin_memory", not auto.on_cpu)) and not auto.on_cpu


def resolve_scheduler(settings: Mapping[str, Any], placeholder: DummyScheduler, given: Optimizer) -> dict[str, Any]:
    """The `scheduler` section with every `"auto"` resolved from the placeholder.

    Args:
        settings: DeepSpeed's configuration.
        placeholder: Its `optimizer` is the one that is stepped.
        given: The optimizer that the script passed to `prepare`.

    Raises:
        ConfigError: Some cannot be resolved, or contradict the placeholder.
    """
    section, problems = _schedule(value_at(settings, "scheduler"), placeholder, given)
    if problems:
        raise ConfigError(problems)
    return section


def _schedule(
    section: Mapping[str, Any], placeholder: DummyScheduler, given: Optimizer
) -> tuple[dict[str, Any], list[Problem]]:
    """The section as the placeholder completes it, and their contradictions."""
    parameters = dict(section.get("params") or {})
    explicit = _explicit_values(placeholder, given)
    accepted = SCHEDULES.get(section.get("type", ""), frozenset(placeholder.kwargs))
    parameters |= {key: value for key, value in explicit.items() if key in accepted and key not in parameters}
    values = {
        "warmup_min_lr": 0,
        "warmup_max_lr": _rates(placeholder.optimizer),
        "warmup_num_steps": max(1, placeholder.warmup_num_steps),
        **explicit,
    }
    problems = []
    for key, value in parameters.items():
        path = f"scheduler.params.{key}"
        if value == AUTO and values.get(key) is not None:
            parameters[key] = values[key]
        elif value == AUTO:
            hint = f"pass DummyScheduler(optimizer, {key}=…), or write a value"
            problems.append(Problem(_WHERE, path, 'cannot resolve "auto"', "", hint))
        elif key in explicit and not _same(value, explicit[key]):
            source = "the optimizer's rate" if key == "warmup_max_lr" else f"DummyScheduler({key}=…)"
            what = f"{value} contradicts {explicit[key]}, {source}"
            problems.append(Problem(_WHERE, path, what, _CONFLICT, 'write "auto"'))
    return {**section, "params": parameters}, problems


def _explicit_values(placeholder: DummyScheduler, given: Optimizer) -> dict[str, Any]:
    """What the script sets of a schedule: the arguments of the placeholder, and the optimizer's learning rate."""
    explicit = {
        "warmup_num_steps": placeholder.warmup_num_steps or None,
        "total_num_steps": placeholder.total_num_steps,
        "warmup_max_lr": None if isinstance(given, DummyOptim) and "lr" not in given.explicit else _rates(given),
        **placeholder.kwargs,
    }
    return {key: value for key, value in explicit.items() if value is not None}


def _rates(optimizer: Optimizer) -> Any:
    """The optimizer's learning rate, or a list with one for each group if they differ."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return rates[0] if len(set(rates)) == 1 else rates


def hidden_size_of(model: nn.Module) -> int | None:
    """The width in a model's `config`, which models of transformers have; None without one."""
    config = getattr(model, "config", None)
    for source in (config, getattr(config, "text_config", None)):
        size = getattr(source, "hidden_size", None)
        if isinstance(size, int):
            return size
        sizes = getattr(source, "hidden_sizes", None)
        if sizes:
            return int(max(sizes))
    return None
