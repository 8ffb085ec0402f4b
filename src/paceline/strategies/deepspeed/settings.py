"""From the configuration to DeepSpeed's dictionary: every `"auto"` filled from the run, every clash named.

What the dictionary says is the truth about the run; what the engine must not do itself is taken out of it later.
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

__all__ = ["Known", "hidden_size_of", "resolve_scheduler", "resolve_settings"]

_WHERE = "DeepSpeed configuration"
_ADAM = ("adam", "adamw")
_ADAM_MORE = {"torch_adam", "adam_w_mode", "bias_correction", "fp32_optimizer_states", "set_grad_none"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What only the run knows.

    Attributes:
        world_size: Ranks that share the global batch.
        micro_batch: Samples in a batch of one rank, where a prepared loader said it.
        hidden_size: Width of the model, from which DeepSpeed's buckets are sized; None where it says none.
        optimizer: What the script handed to `prepare`.
        schedule: The stand-in for its schedule, where the script handed that over in the same call.
        on_cpu: Whether the run computes on a CPU, which pins no memory.
    """

    world_size: int
    micro_batch: int | None
    hidden_size: int | None
    optimizer: Optimizer
    on_cpu: bool
    schedule: DummyScheduler | None = None


def resolve_settings(plugin: DeepSpeedPlugin, config: RunConfig, known: Known) -> dict[str, Any]:
    """DeepSpeed's configuration, complete.

    Raises:
        ConfigError: Values that contradict the run, and `"auto"` that nothing can fill; all at once.
    """
    settings = decided_settings(plugin, config)
    problems: list[Problem] = []
    _batch_sizes(settings, config, known, problems)
    _optimizer(settings, known.optimizer, problems)
    if known.schedule is not None and known.schedule.lr_scheduler_callable is None and "scheduler" in settings:
        problems += _schedule(settings["scheduler"], known.schedule, known.optimizer)[1]
    _buckets(settings["zero_optimization"], known.hidden_size)
    _memory(settings["zero_optimization"], known)
    problems += [
        Problem(_WHERE, path, '"auto" cannot be filled', "paceline does not know this value", "write a value")
        for path, value in walk(settings)
        if value == AUTO and not path.startswith("scheduler.")
    ]
    if problems:
        raise ConfigError(problems)
    return settings


def _batch_sizes(settings: dict[str, Any], config: RunConfig, known: Known, problems: list[Problem]) -> None:
    accumulation = config.gradient_accumulation_steps
    key = "train_micro_batch_size_per_gpu"
    said = settings.get(key, AUTO)
    if said == AUTO:
        settings[key] = said = known.micro_batch or 1
    elif known.micro_batch not in (None, said):
        why = f"the prepared loader gives each rank batches of {known.micro_batch}"
        problems.append(Problem(_WHERE, key, f"{said} contradicts the run", why, 'write "auto", or change the loader'))
    total = said * accumulation * known.world_size
    given = settings.get("train_batch_size", AUTO)
    settings["train_batch_size"] = total
    if given not in (AUTO, total):
        what = f"{given} contradicts the run"
        why = f"{known.world_size} ranks x {accumulation} micro-batches x {said} samples make {total}"
        problems.append(Problem(_WHERE, "train_batch_size", what, why, 'write "auto"'))


def _optimizer(settings: dict[str, Any], optimizer: Optimizer, problems: list[Problem]) -> None:
    section = settings.get("optimizer")
    if not isinstance(optimizer, DummyOptim):
        if section is not None:
            what = f"{section.get('type')} is described beside the script's {type(optimizer).__name__}"
            hint = "prepare a DummyOptim in its place, or remove the section"
            problems.append(Problem(_WHERE, "optimizer", what, "one of the two would silently lose", hint))
        return
    if section is None:
        hint = "add the section, or pass an optimizer of torch"
        problems.append(Problem(_WHERE, "optimizer", "is missing", "a DummyOptim was prepared for it", hint))
        return
    parameters = section["params"] = dict(section.get("params") or {})
    # What the section leaves out and the script says would otherwise silently lose to the optimizer's default.
    parameters.update({key: value for key, value in optimizer.said.items() if key not in parameters})
    for key, value in list(parameters.items()):
        if value == AUTO and key in optimizer.defaults:
            parameters[key] = optimizer.defaults[key]
        elif value != AUTO and key in optimizer.said and not _same(value, optimizer.said[key]):
            what = f"{value} contradicts DummyOptim({key}={optimizer.said[key]})"
            hint = 'write "auto", or leave the argument out'
            problems.append(Problem(_WHERE, f"optimizer.params.{key}", what, "one would silently lose", hint))
        elif value == AUTO and key in ("betas", "eps"):
            # What torch's Adam takes when nobody says it.
            parameters[key] = [0.9, 0.999] if key == "betas" else 1e-8
    problems += _described(section)


def _described(section: Mapping[str, Any]) -> Iterator[Problem]:
    """What no optimizer of DeepSpeed's or torch's can be made from."""
    kind = section.get("type")
    made = getattr(torch.optim, "AdamW" if str(kind).lower() in _ADAM else str(kind), None)
    if not isinstance(kind, str) or (kind.lower() not in OPTIMIZERS and made is None):
        hint = f"write a class of torch.optim, or one of {', '.join(sorted(OPTIMIZERS))}"
        yield Problem(_WHERE, "optimizer.type", f"{kind!r} is unknown", "neither DeepSpeed nor torch has it", hint)
    elif made is not None:
        taken = {*inspect.signature(made).parameters} | (_ADAM_MORE if kind.lower() in _ADAM else set())
        for key in section.get("params") or {}:
            if key not in taken:
                hint = "write gradient_clipping" if key == "max_grad_norm" else did_you_mean(key, taken)
                yield Problem(_WHERE, f"optimizer.params.{key}", f"{kind} takes no such argument", hint=hint)


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
                # DeepSpeed's own default holds.
                del zero[key]


def _memory(zero: dict[str, Any], known: Known) -> None:
    for part in ("offload_optimizer", "offload_param"):
        section = zero.get(part)
        if section:
            # A CPU run has no device that pinned memory would serve.
            section["pin_memory"] = bool(section.get("pin_memory", not known.on_cpu)) and not known.on_cpu


def resolve_scheduler(settings: Mapping[str, Any], stand_in: DummyScheduler, given: Optimizer) -> dict[str, Any]:
    """The `scheduler` section with every `"auto"` filled from the stand-in.

    Args:
        settings: DeepSpeed's configuration.
        stand_in: It holds the optimizer in force.
        given: The optimizer that the script handed to `prepare`.

    Raises:
        ConfigError: Some cannot be filled, or contradict the stand-in.
    """
    section, problems = _schedule(value_at(settings, "scheduler"), stand_in, given)
    if problems:
        raise ConfigError(problems)
    return section


def _schedule(
    section: Mapping[str, Any], stand_in: DummyScheduler, given: Optimizer
) -> tuple[dict[str, Any], list[Problem]]:
    """The section as the stand-in fills it, and what the two cannot agree on."""
    parameters = dict(section.get("params") or {})
    said = _said_of_schedule(stand_in, given)
    takes = SCHEDULES.get(section.get("type", ""), frozenset(stand_in.kwargs))
    parameters |= {key: value for key, value in said.items() if key in takes and key not in parameters}
    known = {
        "warmup_min_lr": 0,
        "warmup_max_lr": _rates(stand_in.optimizer),
        "warmup_num_steps": max(1, stand_in.warmup_num_steps),
        **said,
    }
    problems = []
    for key, value in parameters.items():
        path = f"scheduler.params.{key}"
        if value == AUTO and known.get(key) is not None:
            parameters[key] = known[key]
        elif value == AUTO:
            hint = f"pass DummyScheduler(optimizer, {key}=…), or write a value"
            problems.append(Problem(_WHERE, path, '"auto" cannot be filled', "", hint))
        elif key in said and not _same(value, said[key]):
            source = "the optimizer's rate" if key == "warmup_max_lr" else f"DummyScheduler({key}=…)"
            what = f"{value} contradicts {said[key]}, {source}"
            problems.append(Problem(_WHERE, path, what, "one would silently lose", 'write "auto"'))
    return {**section, "params": parameters}, problems


def _said_of_schedule(stand_in: DummyScheduler, given: Optimizer) -> dict[str, Any]:
    """What the script says of a schedule: the arguments of its stand-in, and the rate of its optimizer."""
    said = {
        "warmup_num_steps": stand_in.warmup_num_steps or None,
        "total_num_steps": stand_in.total_num_steps,
        "warmup_max_lr": None if isinstance(given, DummyOptim) and "lr" not in given.said else _rates(given),
        **stand_in.kwargs,
    }
    return {key: value for key, value in said.items() if value is not None}


def _rates(optimizer: Optimizer) -> Any:
    """The optimizer's rate, or one for each group where they differ."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return rates[0] if len(set(rates)) == 1 else rates


def hidden_size_of(model: nn.Module) -> int | None:
    """The width that a model's `config` tells, as models of transformers do; None without one."""
    config = getattr(model, "config", None)
    for source in (config, getattr(config, "text_config", None)):
        size = getattr(source, "hidden_size", None)
        if isinstance(size, int):
            return size
        sizes = getattr(source, "hidden_sizes", None)
        if sizes:
            return int(max(sizes))
    return None
