"""From training arguments to the arguments of an `Accelerator`."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paceline.accelerator.accelerator import Accelerator
from paceline.config import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ParallelismConfig,
    TorchDynamoPlugin,
    resolve,
)
from paceline.config.deepspeed_file.settings import AUTO, read_settings, value_at
from paceline.errors import ConfigError, Problem, did_you_mean
from paceline.trainer.arguments.checks import setting

if TYPE_CHECKING:
    from paceline.trainer.arguments.arguments import TrainingArguments

__all__ = ["accelerator_arguments", "build_accelerator", "deepspeed_settings"]

WHERE = "TrainingArguments(…)"
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
_FSDP_WORDS: dict[str, dict[str, Any]] = {
    "full_shard": {},
    "shard_grad_op": {"reshard_after_forward": False},
    "offload": {"cpu_offload": True},
    "auto_wrap": {},
}


def accelerator_arguments(args: TrainingArguments, *, accumulation: int) -> dict[str, Any]:
    """What to call `Accelerator` with; only what the arguments really say, so that the launcher fills the rest.

    Raises:
        ConfigError: Everything that is wrong with nested settings, at once.
    """
    problems: list[Problem] = []
    said: dict[str, Any] = {
        "mixed_precision": "bf16" if args.bf16 else "fp16" if args.fp16 else None,
        "cpu": True if args.use_cpu else None,
        "strategy": _strategy(args),
        "fsdp_plugin": _fsdp(args, problems),
        "deepspeed_plugin": _deepspeed(args, problems),
        "dynamo_plugin": _compile(args, problems),
        "parallelism_config": _mesh(args, problems),
        "dataloader_config": _loading(args, problems),
        "kwargs_handlers": [*_handlers(args)],
        "project_dir": args.output_dir,
        "log_with": _reporting(args),
        **_accumulation(args, accumulation, problems),
    }
    if problems:
        raise ConfigError(problems)
    return {name: value for name, value in said.items() if value is not None}


def build_accelerator(args: TrainingArguments, *, accumulation: int) -> Accelerator:
    """An Accelerator as the arguments ask, and the launcher's configuration where they ask nothing.

    Raises:
        ConfigError: With everything that is wrong; what the two sources say differently names both.
    """
    said = accelerator_arguments(args, accumulation=accumulation)
    try:
        return Accelerator(**said)
    except ConfigError as error:
        raise ConfigError(_ours(args, problem) for problem in error.problems) from None


def _ours(args: TrainingArguments, problem: Problem) -> Problem:
    """Say the arguments' names where the Accelerator's own are spoken of."""
    named = "fsdp" if args.fsdp else "deepspeed" if args.deepspeed else "strategy"
    if not problem.where.startswith("Accelerator("):
        return problem
    if problem.key == "log_with":
        return replace(problem, where=WHERE, key="report_to")
    if problem.key == "strategy":
        return replace(problem, where=f"TrainingArguments({named}=…)")
    return replace(problem, where=problem.where.replace("Accelerator(", "TrainingArguments -> Accelerator("))


def _strategy(args: TrainingArguments) -> str | None:
    if args.strategy is not None:
        return args.strategy
    return "fsdp" if args.fsdp else "deepspeed" if args.deepspeed else None


def _reporting(args: TrainingArguments) -> list[str]:
    """The trackers; the console is no tracker, and always told."""
    asked = args.report_to
    listed = [asked] if isinstance(asked, str) else list(asked or [])
    return [name for name in listed if name != "console"]


def _handlers(args: TrainingArguments) -> list[object]:
    opening = InitProcessGroupKwargs(backend=args.ddp_backend, timeout=timedelta(seconds=args.ddp_timeout))
    said = {name: getattr(args, f"ddp_{name}") for name in _DDP_FIELDS}
    said = {name: value for name, value in said.items() if value is not None}
    return [opening, DistributedDataParallelKwargs(**said)] if said else [opening]


def _compile(args: TrainingArguments, problems: list[Problem]) -> TorchDynamoPlugin | None:
    if not args.torch_compile:
        return None
    said: dict[str, Any] = {"backend": args.torch_compile_backend or "inductor", "use_regional_compilation": True}
    if args.torch_compile_mode:
        said["mode"] = args.torch_compile_mode
    try:
        return TorchDynamoPlugin(**said)
    except ConfigError as error:
        problems.extend(replace(p, where=WHERE, key=f"torch_compile_{p.key}") for p in error.problems)
        return None


def _mesh(args: TrainingArguments, problems: list[Problem]) -> ParallelismConfig | None:
    config: Any = args.parallelism_config
    if not isinstance(config, dict):
        return config  # type: ignore[no-any-return]
    try:
        return ParallelismConfig(**config)
    except ConfigError as error:
        problems.extend(replace(p, where=WHERE, key=f"parallelism_config.{p.key}") for p in error.problems)
        return None


def _fsdp(args: TrainingArguments, problems: list[Problem]) -> FullyShardedDataParallelPlugin | None:
    """The settings of FSDP2; keys may have their prefix or not, and version 1 is translated."""
    config: Any = args.fsdp_config
    if isinstance(config, FullyShardedDataParallelPlugin):
        return config
    if not args.fsdp and not config:
        return None
    keys = {**_from_words(args, problems), **dict(config or {})}
    flags: dict[str, object] = {"use_fsdp": True}
    for key, value in keys.items():
        name = key if key.startswith("fsdp_") else f"fsdp_{key}"
        if name.startswith("fsdp_xla"):
            if value:
                problems.append(Problem(WHERE, f"fsdp_config.{key}", "is not carried out", "there is no TPU here"))
        elif flags.get(name, value) != value:
            what, hint = f"{value!r}, and {flags[name]!r} under its other spelling", "keep one of them"
            problems.append(Problem(WHERE, f"fsdp_config.{key}", what, "one would silently lose", hint))
        elif not (name == "fsdp_min_num_params" and not value):
            flags[name] = ",".join(value) if isinstance(value, list | tuple) else value
    if args.activation_checkpointing:
        if flags.get("fsdp_activation_checkpointing"):
            what = "given together with fsdp_config.activation_checkpointing"
            problems.append(Problem(WHERE, "activation_checkpointing", what, hint="give one of them"))
        flags["fsdp_activation_checkpointing"] = True
    try:
        return resolve(flags=flags, env={}, file=None).config.fsdp_config
    except ConfigError as error:
        problems.extend(_in_our_words(problem) for problem in error.problems)
        return None


def _in_our_words(problem: Problem) -> Problem:
    """Say the arguments' names where the configuration speaks of flags."""
    key = problem.where.removeprefix("--fsdp_")
    if key == problem.where:
        return problem
    return replace(problem, where=WHERE, key=f"fsdp_config.{key}", what=problem.what.replace("flag", "key"))


def _from_words(args: TrainingArguments, problems: list[Problem]) -> dict[str, Any]:
    words: Any = args.fsdp
    found: dict[str, Any] = {}
    if isinstance(words, bool) or words is None:
        return found
    listed = words if isinstance(words, list) else str(words).replace(",", " ").split()
    for word in listed:
        if word not in _FSDP_WORDS:
            hint = did_you_mean(word, _FSDP_WORDS) or "give fsdp=True and the rest as fsdp_config"
            problems.append(Problem(WHERE, "fsdp", f"{word!r} is not carried out", "FSDP2 has no such mode", hint))
        found |= _FSDP_WORDS.get(word, {})
    return found


def deepspeed_settings(args: TrainingArguments) -> dict[str, Any] | None:
    """DeepSpeed's own configuration, if the arguments hold one.

    Raises:
        ConfigError: It cannot be read.
    """
    config: Any = args.deepspeed
    if isinstance(config, DeepSpeedPlugin):
        config = config.hf_ds_config
    if config is None:
        return None
    settings, name, wrong = read_settings(config, Path())
    if settings is None:
        raise ConfigError([Problem(WHERE, "deepspeed", wrong or name, hint="give a mapping or a JSON file")])
    return settings


def _deepspeed(args: TrainingArguments, problems: list[Problem]) -> DeepSpeedPlugin | None:
    config: Any = args.deepspeed
    if not config or isinstance(config, DeepSpeedPlugin):
        return config or None
    settings = deepspeed_settings(args)
    assert settings is not None
    for key, value in _expected(args).items():
        said = value_at(settings, key)
        if said not in (None, AUTO, list(value) if isinstance(value, tuple) else value):
            what = f"{said} contradicts {value}, which the other arguments make"
            problems.append(Problem(WHERE, f"deepspeed.{key}", what, "one would silently lose", 'write "auto"'))
    # The run fills the rest of what is "auto"; this one only the loop would know.
    return DeepSpeedPlugin(hf_ds_config={**settings, "gradient_clipping": args.max_grad_norm})


def _expected(args: TrainingArguments) -> dict[str, Any]:
    """What the arguments make of values that DeepSpeed's configuration may hold as well."""
    ranks = args.world_size
    micro, accumulation = args.batch_plan(ranks)
    expected: dict[str, Any] = {
        "gradient_clipping": args.max_grad_norm,
        "gradient_accumulation_steps": accumulation,
        "train_micro_batch_size_per_gpu": micro,
        "train_batch_size": micro * accumulation * ranks,
        "optimizer.params.lr": args.learning_rate,
        "optimizer.params.betas": (args.adam_beta1, args.adam_beta2),
        "optimizer.params.eps": args.adam_epsilon,
        "optimizer.params.weight_decay": args.weight_decay,
        "scheduler.params.warmup_max_lr": args.learning_rate,
    }
    if args.max_steps > 0:
        expected["scheduler.params.total_num_steps"] = args.max_steps
        expected["scheduler.params.warmup_num_steps"] = max(1, args.get_warmup_steps(args.max_steps))
    if args.bf16 or args.fp16:
        expected |= {"bf16.enabled": args.bf16, "fp16.enabled": args.fp16}
    return expected


def _loading(args: TrainingArguments, problems: list[Problem]) -> DataLoaderConfiguration:
    config: Any = args.accelerator_config
    seed: int | None = args.seed if args.data_seed is None else args.data_seed
    if isinstance(config, dict):
        for key in config:
            if key not in _ACCELERATOR_KEYS:
                hint = did_you_mean(key, _ACCELERATOR_KEYS)
                problems.append(Problem(WHERE, f"accelerator_config.{key}", "unknown key", hint=hint))
    if setting(config, "use_configured_state") and not torch.distributed.is_initialized():
        what, hint = "True, and no process group was opened before", "leave it out: one that is open is always used"
        key = "accelerator_config.use_configured_state"
        problems.append(Problem(WHERE, key, what, "there is nothing else that could be configured before", hint))
    said = {key: setting(config, key) for key in _LOADER_KEYS} if config is not None else {}
    if said.get("use_seedable_sampler") is False:
        # The order is drawn when the loader is prepared, from generators that `seed` has set.
        seed = None
        if args.data_seed is not None:
            what, why = f"{args.data_seed} with accelerator_config.use_seedable_sampler=False", "one says not to seed"
            problems.append(Problem(WHERE, "data_seed", what, why, "give one of them"))
    try:
        return DataLoaderConfiguration(
            data_seed=seed, **{key: value for key, value in said.items() if value is not None}
        )
    except ConfigError as error:
        problems.extend(replace(p, where=WHERE, key=f"accelerator_config.{p.key}") for p in error.problems)
        return DataLoaderConfiguration(data_seed=seed)


def _accumulation(args: TrainingArguments, steps: int, problems: list[Problem]) -> dict[str, Any]:
    more = dict(setting(args.accelerator_config, "gradient_accumulation_kwargs") or {})
    if "num_steps" in more and steps != 1 and more["num_steps"] != steps:
        key = "accelerator_config.gradient_accumulation_kwargs.num_steps"
        what = f"{more['num_steps']} contradicts gradient_accumulation_steps={steps}"
        problems.append(Problem(WHERE, key, what, hint="give one of them"))
    try:
        return {"gradient_accumulation_plugin": GradientAccumulationPlugin(**{"num_steps": steps, **more})}
    except ConfigError as error:
        where = "accelerator_config.gradient_accumulation_kwargs"
        problems.extend(replace(p, where=WHERE, key=f"{where}.{p.key}") for p in error.problems)
        return {}
