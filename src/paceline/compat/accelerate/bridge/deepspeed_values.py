"""What only the run knows of DeepSpeed's configuration: each `auto` is filled in the plugin, where programs read it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from paceline.accelerator.stepping.scheduler import is_scheduler
from paceline.compat.accelerate.settings.errors import InvalidValueError
from paceline.strategies.placeholders import DummyOptim, DummyScheduler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.compat.accelerate.settings.deepspeed import DeepSpeedPlugin

__all__ = ["fill_configuration"]

_MICRO_BATCH = "train_micro_batch_size_per_gpu"
_BUCKETS = (
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
)


def fill_configuration(
    plugin: DeepSpeedPlugin,
    things: Sequence[Any],
    *,
    accumulation: int,
    ranks: int,
    split_batches: bool,
    sequence_ranks: int = 1,
) -> None:
    """Fill each `auto` of a plugin from what a program prepares in one call with its model.

    Args:
        plugin: The active plugin, whose configuration is changed.
        things: What is prepared.
        accumulation: Micro-batches to an optimizer step.
        ranks: The number of ranks.
        split_batches: Whether a loader's batch size is that of all ranks together.
        sequence_ranks: How many ranks share each sequence.

    Raises:
        InvalidValueError: Optimizer or scheduler contradict the configuration, or a value is not to be found.
    """
    micro_batch = _micro_batch(plugin, things, ranks if split_batches else 1)
    _fill(plugin, gradient_accumulation_steps=accumulation)
    model, optimizer, schedule = _parts(things)
    _check_optimizer(plugin, optimizer)
    _check_schedule(plugin, schedule, optimizer)
    values: dict[str, Any] = {
        # Without a word of the program or the file, Accelerate clips: a program written for it has the losses of that.
        "gradient_clipping": 1.0,
        "zero_optimization.stage3_gather_16bit_weights_on_model_save": False,
        _MICRO_BATCH: micro_batch,
        "train_batch_size": micro_batch * plugin.get_value("gradient_accumulation_steps", 1) * ranks // sequence_ranks,
    }
    _fill(plugin, **values, **_bucket_sizes(plugin, model), **_optimizer_values(optimizer))
    if isinstance(optimizer, Optimizer) and not isinstance(optimizer, DummyOptim):
        plugin.deepspeed_config["zero_allow_untested_optimizer"] = True
    if isinstance(schedule, DummyScheduler) and schedule.lr_scheduler_callable is None:
        _fill_schedule(plugin, schedule, 1 if split_batches else ranks)


def _parts(things: Sequence[Any]) -> tuple[nn.Module, Optimizer | None, Any]:
    """The model, its optimizer and its schedule."""
    model = next(thing for thing in things if isinstance(thing, nn.Module))
    optimizer = next((thing for thing in things if isinstance(thing, Optimizer)), None)
    schedule = next((thing for thing in things if isinstance(thing, DummyScheduler) or is_scheduler(thing)), None)
    return model, optimizer, schedule


def _optimizer_values(optimizer: Optimizer | None) -> dict[str, Any]:
    """The section of an optimizer, from its placeholder."""
    if not isinstance(optimizer, DummyOptim):
        return {}
    return {f"optimizer.params.{name}": optimizer.defaults[name] for name in ("lr", "weight_decay")}


def _fill(plugin: DeepSpeedPlugin, **values: Any) -> None:
    for key, value in values.items():
        if plugin.is_auto(key):
            plugin.fill_match(key, must_match=False, **{key: value})


def _micro_batch(plugin: DeepSpeedPlugin, things: Sequence[Any], divisor: int) -> int:
    """The batch size of one rank: of the configuration, or that of the loaders."""
    if not plugin.is_auto(_MICRO_BATCH):
        return int(plugin.get_value(_MICRO_BATCH, 1))
    sizes: list[Any] = [loader.batch_size for loader in things if isinstance(loader, DataLoader)]
    if not sizes or None in sizes:
        raise InvalidValueError(
            f"{_MICRO_BATCH} is auto in DeepSpeed's configuration",
            "The loaders in the call to prepare() have no batch size" if sizes else "No loader is in the call",
            f"Pass a loader with a batch_size, or write a number for {_MICRO_BATCH}",
        )
    return int(min(sizes) if plugin.is_train_batch_min else max(sizes)) // divisor


def _check_optimizer(plugin: DeepSpeedPlugin, optimizer: Optimizer | None) -> None:
    is_described = "optimizer" in plugin.deepspeed_config
    is_placeholder = isinstance(optimizer, DummyOptim)
    if optimizer is None or is_described == is_placeholder:
        return
    raise InvalidValueError(
        f"{type(optimizer).__name__} is prepared, and DeepSpeed's configuration has "
        f"{'a' if is_described else 'no'} section optimizer",
        "Only one of them can say what is stepped" if is_described else "The placeholder stands for that section",
        "Prepare a DummyOptim, or remove the section" if is_described else "Add it, or prepare an optimizer of torch",
    )


def _check_schedule(plugin: DeepSpeedPlugin, schedule: Any, optimizer: Optimizer | None) -> None:
    if schedule is None:
        return
    is_described = "scheduler" in plugin.deepspeed_config
    is_placeholder = isinstance(schedule, DummyScheduler)
    if is_described and not is_placeholder:
        raise InvalidValueError(
            f"{type(schedule).__name__} is prepared, and DeepSpeed's configuration has a section scheduler",
            "Only one of them can say what the learning rate is",
            "Prepare a DummyScheduler, or remove the section",
        )
    if is_placeholder and not is_described and schedule.lr_scheduler_callable is None:
        raise InvalidValueError(
            "A DummyScheduler is prepared, and DeepSpeed's configuration has no section scheduler",
            "The placeholder stands for that section",
            "Add it, or pass DummyScheduler(optimizer, lr_scheduler_callable=…)",
        )
    if isinstance(optimizer, DummyOptim) and not is_placeholder:
        raise InvalidValueError(
            f"{type(schedule).__name__} is prepared beside a DummyOptim",
            "It was made for the placeholder, and the engine makes the optimizer that is stepped",
            "Pass DummyScheduler(optimizer, lr_scheduler_callable=…), which makes it on the real one",
        )


def _bucket_sizes(plugin: DeepSpeedPlugin, model: nn.Module) -> dict[str, int]:
    """The sizes of DeepSpeed's buckets, from the width of the model."""
    unknown = [key for key in _BUCKETS if plugin.is_auto(key)]
    if not unknown:
        return {}
    config: Any = getattr(model, "config", None)
    if config is None:
        raise _no_width("Can't find `model.config` entry", unknown, model)
    width = getattr(config, "hidden_size", None)
    if width is None:
        widths = getattr(config, "hidden_sizes", None)
        if not widths:
            saw = "Can find neither `model.config.hidden_size` nor `model.config.hidden_sizes`"
            raise _no_width(saw, unknown, model)
        width = max(widths)
    return dict(zip(_BUCKETS, (width * width, int(0.9 * width * width), 10 * width), strict=True))


def _no_width(saw: str, unknown: list[str], model: nn.Module) -> InvalidValueError:
    return InvalidValueError(
        f"{saw} of {type(model).__name__}",
        f"{', '.join(unknown)} is auto, and follows from the width of the model",
        "Write numbers in DeepSpeed's configuration",
    )


def _fill_schedule(plugin: DeepSpeedPlugin, schedule: DummyScheduler, ranks: int) -> None:
    """Fill the section of a schedule, which counts optimizer steps; a program's number counts one for each rank."""
    prefix = "scheduler.params."
    values: dict[str, Any] = {
        "warmup_min_lr": 0,
        "warmup_max_lr": schedule.optimizer.defaults["lr"],
        # DeepSpeed refuses 0.
        "warmup_num_steps": max(1, schedule.warmup_num_steps),
    }
    if schedule.total_num_steps is not None and plugin.is_auto(f"{prefix}total_num_steps"):
        values["total_num_steps"] = math.ceil(schedule.total_num_steps / ranks)
        # What the core compares with the section.
        schedule.total_num_steps = values["total_num_steps"]
    _fill(plugin, **{f"{prefix}{name}": value for name, value in values.items()})
