"""Conversion of training arguments to the arguments of an `Accelerator`."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from paceline.accelerator.accelerator import Accelerator
from paceline.config import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ParallelismConfig,
    TorchDynamoPlugin,
    resolve,
)
from paceline.errors import ConfigError, did_you_mean
from paceline.trainer.argument_errors import WHERE, field_problem
from paceline.trainer.arguments.checks import setting
from paceline.trainer.arguments.deepspeed import deepspeed_plugin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.errors import Problem
    from paceline.trainer.arguments.arguments import TrainingArguments

__all__ = ["accelerator_arguments", "build_accelerator"]

T = TypeVar("T")
_DDP_FIELDS = ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers", "static_graph")
_LOADER_KEYS = (
    "split_batches",
    "dispatch_batches",
    "even_batches",
    "use_seedable_sampler",
    "non_blocking",
    "streams_are_sharded",
)
_ACCELERATOR_KEYS = (*_LOADER_KEYS, "gradient_accumulation_kwargs", "use_configured_state")
_FSDP_MODES: dict[str, dict[str, Any]] = {
    "full_shard": {},
    "shard_grad_op": {"reshard_after_forward": False},
    "offload": {"cpu_offload": True},
    "auto_wrap": {},
}


def accelerator_arguments(args: TrainingArguments, *, accumulation: int) -> dict[str, Any]:
    """Keyword arguments for `Accelerator`; what the arguments leave open is left to the launcher's configuration.

    Raises:
        ConfigError: All problems with nested settings at once.
    """
    problems: list[Problem] = []
    arguments: dict[str, Any] = {
        "mixed_precision": _precision(args),
        "cpu": True if args.use_cpu else None,
        "strategy": args.strategy or _section_of_strategy(args),
        "fsdp_plugin": _fsdp(args, problems),
        "deepspeed_plugin": deepspeed_plugin(args, problems),
        "dynamo_plugin": _compile(args, problems),
        "parallelism_config": _mesh(args, problems),
        "dataloader_config": _loading(args, problems),
        "kwargs_handlers": [*_handlers(args)],
        "project_dir": args.output_dir,
        "log_with": _trackers(args),
        **_accumulation(args, accumulation, problems),
    }
    if problems:
        raise args.config_error(problems)
    return {name: value for name, value in arguments.items() if value is not None}


def build_accelerator(args: TrainingArguments, *, accumulation: int) -> Accelerator:
    """Build the Accelerator from the arguments, with the launcher's configuration for what they leave open.

    Raises:
        ConfigError: All problems; where arguments and configuration disagree, both sources are named.
    """
    arguments = accelerator_arguments(args, accumulation=accumulation)
    try:
        return Accelerator(**arguments)
    except ConfigError as error:
        raise args.config_error(_as_argument(args, problem) for problem in error.problems) from None


def _as_argument(args: TrainingArguments, problem: Problem) -> Problem:
    """Name the training argument where a problem names an argument of the Accelerator."""
    if not problem.where.startswith("Accelerator("):
        return problem
    if problem.key == "log_with":
        return replace(problem, where=WHERE, key="report_to")
    if problem.key == "strategy":
        return replace(problem, where=f"TrainingArguments({_section_of_strategy(args) or 'strategy'}=…)")
    return replace(problem, where=problem.where.replace("Accelerator(", "TrainingArguments -> Accelerator("))


def _section_of_strategy(args: TrainingArguments) -> str | None:
    """The argument with a strategy's own settings, whose presence chooses the strategy."""
    if args.fsdp:
        return "fsdp"
    return "deepspeed" if args.deepspeed else None


def _precision(args: TrainingArguments) -> str | None:
    if args.bf16:
        return "bf16"
    return "fp16" if args.fp16 else None


def _trackers(args: TrainingArguments) -> list[str]:
    """The trackers to report to; "console" is accepted and dropped, because the console always gets the log."""
    names = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or [])
    return [name for name in names if name != "console"]


def _handlers(args: TrainingArguments) -> list[object]:
    opening = InitProcessGroupKwargs(backend=args.ddp_backend, timeout=timedelta(seconds=args.ddp_timeout))
    options = {name: getattr(args, f"ddp_{name}") for name in _DDP_FIELDS}
    options = {name: value for name, value in options.items() if value is not None}
    if options:
        return [opening, DistributedDataParallelKwargs(**options)]
    return [opening]


def _section(kind: Callable[..., T], values: dict[str, Any], problems: list[Problem], prefix: str) -> T | None:
    """Make a section, or add its problems under the training argument that it comes from."""
    try:
        return kind(**values)
    except ConfigError as error:
        problems.extend(replace(problem, where=WHERE, key=f"{prefix}{problem.key}") for problem in error.problems)
        return None


def _compile(args: TrainingArguments, problems: list[Problem]) -> TorchDynamoPlugin | None:
    if not args.torch_compile:
        return None
    options: dict[str, Any] = {"backend": args.torch_compile_backend or "inductor", "use_regional_compilation": True}
    if args.torch_compile_mode:
        options["mode"] = args.torch_compile_mode
    return _section(TorchDynamoPlugin, options, problems, "torch_compile_")


def _mesh(args: TrainingArguments, problems: list[Problem]) -> ParallelismConfig | None:
    config: Any = args.parallelism_config
    if not isinstance(config, dict):
        return config  # type: ignore[no-any-return]
    return _section(ParallelismConfig, config, problems, "parallelism_config.")


def _fsdp(args: TrainingArguments, problems: list[Problem]) -> FullyShardedDataParallelPlugin | None:
    """The settings of FSDP2; keys may have the prefix `fsdp_` or not, and FSDP 1 settings are translated."""
    config: Any = args.fsdp_config
    if isinstance(config, FullyShardedDataParallelPlugin):
        return config
    if not args.fsdp and not config:
        return None
    flags = _fsdp_flags({**_from_modes(args, problems), **dict(config or {})}, problems)
    if args.activation_checkpointing:
        if flags.get("fsdp_activation_checkpointing"):
            what = "given together with fsdp_config.activation_checkpointing"
            problems.append(field_problem("activation_checkpointing", what, hint="give one of them"))
        flags["fsdp_activation_checkpointing"] = True
    try:
        return resolve(flags=flags, env={}, file=None).config.fsdp_config
    except ConfigError as error:
        problems.extend(_as_fsdp_key(problem) for problem in error.problems)
        return None


def _fsdp_flags(keys: dict[str, Any], problems: list[Problem]) -> dict[str, object]:
    """The keys of `fsdp_config` as flags of the launcher."""
    flags: dict[str, object] = {"use_fsdp": True}
    for key, value in keys.items():
        name = key
        if not key.startswith("fsdp_"):
            name = f"fsdp_{key}"
        if name.startswith("fsdp_xla"):
            if value:
                why = "paceline does not run on TPUs"
                problems.append(field_problem(f"fsdp_config.{key}", "is not supported", why))
        elif flags.get(name, value) != value:
            what = f"{value!r}, and {flags[name]!r} under its other spelling"
            problems.append(field_problem(f"fsdp_config.{key}", what, "one would be ignored", "keep one of them"))
        # transformers writes 0 for "not set".
        elif name != "fsdp_min_num_params" or value:
            flags[name] = ",".join(value) if isinstance(value, list | tuple) else value
    return flags


def _as_fsdp_key(problem: Problem) -> Problem:
    """Name the key of `fsdp_config` where a problem names the launcher's flag."""
    key = problem.where.removeprefix("--fsdp_")
    if key == problem.where:
        return problem
    return replace(problem, where=WHERE, key=f"fsdp_config.{key}", what=problem.what.replace("flag", "key"))


def _from_modes(args: TrainingArguments, problems: list[Problem]) -> dict[str, Any]:
    """The settings that the words in `fsdp` stand for."""
    value: Any = args.fsdp
    settings: dict[str, Any] = {}
    if isinstance(value, bool) or value is None:
        return settings
    words = value
    if not isinstance(value, list):
        words = str(value).replace(",", " ").split()
    for word in words:
        if word not in _FSDP_MODES:
            hint = did_you_mean(word, _FSDP_MODES) or "write fsdp=True and put the settings into fsdp_config"
            problems.append(field_problem("fsdp", f"{word!r} is not supported", "FSDP2 has no such mode", hint))
        settings |= _FSDP_MODES.get(word, {})
    return settings


def _loading(args: TrainingArguments, problems: list[Problem]) -> DataLoaderConfiguration:
    """How loaders are prepared, from `accelerator_config` and the seeds."""
    config: Any = args.accelerator_config
    problems.extend(_config_problems(config))
    options = {}
    if config is not None:
        options = {key: setting(config, key) for key in _LOADER_KEYS}
    options = {key: value for key, value in options.items() if value is not None}
    seed: int | None = args.seed if args.data_seed is None else args.data_seed
    if options.get("use_seedable_sampler") is False:
        # The order is then drawn from torch's global generator, which `seed` has seeded.
        seed = None
        if args.data_seed is not None:
            what = f"{args.data_seed} with accelerator_config.use_seedable_sampler=False"
            problems.append(field_problem("data_seed", what, "samplers are not seeded then", "give one of them"))
    config = _section(DataLoaderConfiguration, {"data_seed": seed, **options}, problems, "accelerator_config.")
    return config or DataLoaderConfiguration(data_seed=seed)


def _config_problems(config: Any) -> Iterator[Problem]:
    """What is wrong with `accelerator_config` apart from its values."""
    for key in config if isinstance(config, dict) else ():
        if key not in _ACCELERATOR_KEYS:
            hint = did_you_mean(key, _ACCELERATOR_KEYS)
            yield field_problem(f"accelerator_config.{key}", "unknown key", hint=hint)
    if setting(config, "use_configured_state") and not torch.distributed.is_initialized():
        yield field_problem(
            "accelerator_config.use_configured_state",
            "True, but no process group is open",
            "there is no state that could have been configured",
            "leave it out: an open process group is always used",
        )


def _accumulation(args: TrainingArguments, steps: int, problems: list[Problem]) -> dict[str, Any]:
    options = dict(setting(args.accelerator_config, "gradient_accumulation_kwargs") or {})
    if "num_steps" in options and steps != 1 and options["num_steps"] != steps:
        key = "accelerator_config.gradient_accumulation_kwargs.num_steps"
        what = f"{options['num_steps']} contradicts gradient_accumulation_steps={steps}"
        problems.append(field_problem(key, what, hint="give one of them"))
    prefix = "accelerator_config.gradient_accumulation_kwargs."
    plugin = _section(GradientAccumulationPlugin, {"num_steps": steps, **options}, problems, prefix)
    return {} if plugin is None else {"gradient_accumulation_plugin": plugin}
