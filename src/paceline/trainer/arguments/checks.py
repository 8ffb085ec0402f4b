"""What arguments contradict each other, and what follows from those that do not."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.config.deepspeed_file.settings import read_settings
from paceline.config.schema.shapes import FALSE_WORDS, TRUE_WORDS
from paceline.errors import ConfigError, Problem, did_you_mean
from paceline.trainer.arguments.parsing import read_mapping
from paceline.trainer.callbacks.profiling import read_window
from paceline.trainer.optim.optimizers import WARMING, known_optimizers, read_arguments
from paceline.trainer.optim.schedules import SCHEDULES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.trainer.arguments.arguments import TrainingArguments

__all__ = ["find_problems", "settle"]

WHERE = "TrainingArguments(…)"
_LEVELS = ("debug", "info", "warning", "error", "critical", "passive")
_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "global_batch_size": 1,
    "max_tokens": 1,
    "num_train_epochs": 0,
    "weight_decay": 0,
    "adam_epsilon": 0,
    "learning_rate": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "logging_steps": 0,
    "eval_steps": 0,
    "eval_delay": 0,
    "save_steps": 0,
    "save_total_limit": 1,
    "eval_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
    "seed": 0,
    "ddp_timeout": 1,
    "torch_empty_cache_steps": 1,
}
_OTHER_OPTIMIZERS = ("galore_", "apollo_", "lomo", "adalomo", "grokadamw", "stable_adamw", "adamw_anyprecision")
_OF_READERS = ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context")
_MAPPINGS = (
    "lr_scheduler_kwargs",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
    "fsdp_config",
    "accelerator_config",
    "parallelism_config",
)


def find_problems(args: TrainingArguments) -> Iterator[Problem]:
    """Yield everything that is wrong; each value by itself has its type already."""
    yield from _ranges(args)
    yield from _intervals(args)
    yield from _names(args)
    yield from _pairs(args)
    yield from _loaders(args)
    yield from _best(args)
    yield from _mappings(args)
    yield from _texts(args)


def _ranges(args: TrainingArguments) -> Iterator[Problem]:
    for name, least in _AT_LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            yield Problem(WHERE, name, f"{value} is out of range", f"it must be at least {least}")
    for name in ("label_smoothing_factor", "warmup_ratio", "adam_beta1", "adam_beta2"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            yield Problem(WHERE, name, f"{value} is out of range", "it must be at least 0 and below 1")
    if not args.max_steps > 0 and not args.num_train_epochs > 0:
        yield Problem(WHERE, "num_train_epochs", "0 without max_steps", "nothing would be trained")


def _intervals(args: TrainingArguments) -> Iterator[Problem]:
    for kind in ("logging", "eval", "save"):
        value, strategy = getattr(args, f"{kind}_steps"), getattr(args, f"{kind}_strategy")
        if value is not None and value > 1 and value != int(value):
            why = "from 1 on it counts steps, below it is a share of all"
            yield Problem(WHERE, f"{kind}_steps", f"{value} is no whole number", why)
        if value == 0 and strategy == "steps":
            hint = f"say how many, or write {kind}_strategy='no'"
            yield Problem(WHERE, f"{kind}_steps", f"0 with {kind}_strategy='steps'", "there is no such step", hint)


def _names(args: TrainingArguments) -> Iterator[Problem]:
    choices: dict[str, tuple[str, ...]] = {
        "optim": tuple(known_optimizers()),
        "lr_scheduler_type": tuple(SCHEDULES),
        "log_level": _LEVELS,
        "log_level_replica": _LEVELS,
        "include_num_input_tokens_seen": ("no", "all", "non_padding"),
        "strategy": ("auto", "single", "ddp", "fsdp", "deepspeed"),
    }
    for name, known in choices.items():
        value = getattr(args, name)
        if isinstance(value, bool):
            value = "all" if value else "no"
            setattr(args, name, value)
        if value is not None and value not in known:
            remote_request = name == "optim" and str(value).startswith(_OTHER_OPTIMIZERS)
            hint = did_you_mean(str(value), known) or f"the names are {', '.join(known)}"
            hint = "it is not there; give the Trainer optimizer_cls_and_kwargs" if remote_request else hint
            yield Problem(WHERE, name, f"{value!r} is unknown", hint=hint)


def _pairs(args: TrainingArguments) -> Iterator[Problem]:
    def both(one: str, other: str, why: str) -> Iterator[Problem]:
        if getattr(args, one) and getattr(args, other):
            yield Problem(WHERE, one, f"given together with {other}", why, "give one of them")

    yield from both("bf16", "fp16", "they exclude each other")
    yield from both("bf16_full_eval", "fp16_full_eval", "they exclude each other")
    yield from both("fsdp", "deepspeed", "each of them is a strategy")
    yield from both("warmup_steps", "warmup_ratio", "both say how long the rate rises")
    for strategy in ("fsdp", "deepspeed"):
        if getattr(args, strategy) and args.strategy not in (None, strategy):
            what = f"given together with strategy={args.strategy!r}"
            yield Problem(WHERE, strategy, what, "each of them names the strategy", "give one of them")
    yield from _unused(args)
    if args.lr_scheduler_type == "reduce_lr_on_plateau" and args.eval_strategy == "no":
        what = "'no' with lr_scheduler_type='reduce_lr_on_plateau'"
        yield Problem(WHERE, "eval_strategy", what, "the rate follows what is evaluated", "write steps or epoch")
    if args.global_batch_size and args.gradient_accumulation_steps != 1:
        what = f"{args.gradient_accumulation_steps} beside global_batch_size={args.global_batch_size}"
        yield Problem(WHERE, "gradient_accumulation_steps", what, "it is derived from that", "leave it out")
    if args.save_only_model and args.load_best_model_at_end and args.deepspeed:
        what = "given with load_best_model_at_end under DeepSpeed"
        yield Problem(WHERE, "save_only_model", what, "the engine cannot load weights alone", "leave it out")
    if args.push_to_hub:
        yield Problem(
            WHERE, "push_to_hub", "is not there", "paceline uploads nothing", "use huggingface_hub on output_dir"
        )
    if args.batch_eval_metrics and args.prediction_loss_only:
        yield Problem(WHERE, "batch_eval_metrics", "given with prediction_loss_only", "there is nothing to measure")


def _unused(args: TrainingArguments) -> Iterator[Problem]:
    """What would have no effect beside other values."""
    level = args.lr_scheduler_type
    for name in ("warmup_steps", "warmup_ratio"):
        said = f"{getattr(args, name)} with "
        if getattr(args, name) and level in ("constant", "reduce_lr_on_plateau"):
            hint = "write constant_with_warmup, or leave it out" if level == "constant" else "leave it out"
            # Schedule-free optimizers have a warmup of their own beside the constant rate.
            if not (level == "constant" and args.optim in WARMING):
                yield Problem(WHERE, name, f"{said}lr_scheduler_type={level!r}", "it has none", hint)
        elif getattr(args, name) and args.optim == "schedule_free_radam":
            yield Problem(WHERE, name, f"{said}optim={args.optim!r}", "it needs none", "leave it out")
    if args.optim.startswith("schedule_free") and level not in ("linear", "constant"):
        what, why = f"{level!r} with optim={args.optim!r}", "it needs no schedule, and keeps the highest rate"
        yield Problem(WHERE, "lr_scheduler_type", what, why, "leave it out")
    if args.max_tokens is not None and args.include_num_input_tokens_seen == "non_padding":
        what, why = "'non_padding' with max_tokens", "that counts padding, and there is one count"
        yield Problem(WHERE, "include_num_input_tokens_seen", what, why, "write all, or leave one of them out")
    if args.length_column_name != "length" and args.train_sampling_strategy != "group_by_length":
        hint = "write train_sampling_strategy='group_by_length', or leave it out"
        yield Problem(WHERE, "length_column_name", "given without group_by_length", "nothing looks at it", hint)
    if args.gradient_checkpointing and args.activation_checkpointing is False:
        what, why = "True with activation_checkpointing=False", "they are one setting"
        yield Problem(WHERE, "gradient_checkpointing", what, why, "give one of them")
    new, old = args.activation_checkpointing_kwargs, args.gradient_checkpointing_kwargs
    if new is not None and old is not None and new != old:
        what, why = "given together with activation_checkpointing_kwargs", "they are one setting"
        yield Problem(WHERE, "gradient_checkpointing_kwargs", what, why, "give one of them")
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, f"{name}_kwargs") and not (args.activation_checkpointing or args.gradient_checkpointing):
            hint = f"write {name}=True, or leave it out"
            yield Problem(WHERE, f"{name}_kwargs", f"given without {name}", "nothing is computed again", hint)


def _loaders(args: TrainingArguments) -> Iterator[Problem]:
    if args.dataloader_num_workers == 0:
        for name in _OF_READERS:
            if getattr(args, name):
                what = f"{getattr(args, name)} without readers"
                hint = "set dataloader_num_workers, or leave it out"
                yield Problem(WHERE, name, what, "only readers in processes of their own use it", hint)
    extra = [name for name in args.include_for_metrics if name not in ("inputs", "loss")]
    if extra:
        yield Problem(WHERE, "include_for_metrics", f"{extra[0]!r} is unknown", hint="the names are inputs, loss")


def _best(args: TrainingArguments) -> Iterator[Problem]:
    needs_metric = args.save_strategy == "best"
    if needs_metric and not args.metric_for_best_model:
        what = "is missing with save_strategy='best'"
        yield Problem(WHERE, "metric_for_best_model", what, "something must say what is best", "name a metric")
    if not args.load_best_model_at_end:
        return
    if args.eval_strategy == "no":
        what = "'no' with load_best_model_at_end"
        yield Problem(WHERE, "eval_strategy", what, "nothing would say what is best", "write steps or epoch")
    elif args.save_strategy not in (args.eval_strategy, "best"):
        what = f"{args.save_strategy!r} differs from eval_strategy {args.eval_strategy!r}"
        why = "load_best_model_at_end needs a checkpoint wherever it evaluates"
        yield Problem(WHERE, "save_strategy", what, why, "make them equal, or write best")
    elif args.save_strategy == "steps":
        evaluated = args.logging_steps if args.eval_steps is None else args.eval_steps
        if evaluated and not _is_multiple(args.save_steps, evaluated):
            what = f"{args.save_steps} is no multiple of the {evaluated} steps between evaluations"
            why = "load_best_model_at_end saves only what was evaluated"
            yield Problem(WHERE, "save_steps", what, why, f"write {evaluated} or a multiple of it")


def _is_multiple(value: float, of: float) -> bool:
    rest = value / of
    return abs(rest - round(rest)) < 1e-9


def _mappings(args: TrainingArguments) -> Iterator[Problem]:
    """Turn text into the mapping that it stands for."""
    for name in _MAPPINGS:
        value = getattr(args, name)
        if isinstance(value, str | dict):
            try:
                setattr(args, name, read_mapping(value))
            except ValueError as error:
                yield Problem(WHERE, name, str(error), hint="give a mapping, JSON text, or the path of a JSON file")


def _texts(args: TrainingArguments) -> Iterator[Problem]:
    """Read what is text with a form of its own."""
    if args.optim_args:
        yield from _raised(read_arguments, args.optim_args)
    if args.profile_steps:
        yield from _raised(read_window, args.profile_steps)
    if isinstance(args.deepspeed, str):
        settings, name, wrong = read_settings(args.deepspeed, Path())
        if settings is None:
            yield Problem(WHERE, "deepspeed", wrong or name, hint="give a mapping or a JSON file")
    if str(args.fsdp).lower() in TRUE_WORDS | FALSE_WORDS:
        args.fsdp = True if str(args.fsdp).lower() in TRUE_WORDS else None  # type: ignore[assignment]


def _raised(read: Callable[[str], object], text: str) -> Iterator[Problem]:
    try:
        read(text)
    except ConfigError as error:
        yield from error.problems


def settle(args: TrainingArguments) -> None:
    """Set what follows from other arguments; say what has little effect."""
    if args.output_dir.startswith("~"):
        args.output_dir = str(Path(args.output_dir).expanduser())
    if args.gradient_checkpointing and args.activation_checkpointing is None:
        args.activation_checkpointing = True
    if args.gradient_checkpointing_kwargs is not None and args.activation_checkpointing_kwargs is None:
        args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs
    if args.torch_compile_backend or args.torch_compile_mode:
        args.torch_compile = True
    if args.load_best_model_at_end and args.metric_for_best_model is None:
        args.metric_for_best_model = "loss"
    if args.metric_for_best_model is not None and args.greater_is_better is None:
        args.greater_is_better = not args.metric_for_best_model.endswith("loss")
    if setting(args.accelerator_config, "non_blocking") and not args.dataloader_pin_memory:
        warnings.warn(
            "accelerator_config has non_blocking without dataloader_pin_memory. A copy from memory that is not "
            "pinned waits all the same. Leave dataloader_pin_memory on.",
            UserWarning,
            stacklevel=4,
        )
    set_log_level(args)


def setting(config: Any, name: str) -> Any:
    """One value of `accelerator_config`, which may be a mapping or an object."""
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def set_log_level(args: TrainingArguments) -> None:
    """Set the level of paceline's messages, where one was asked for."""
    level = args.log_level if args.should_log else args.log_level_replica
    is_asked = args.log_level != "passive" or (not args.should_log and level != "warning")
    if level != "passive" and is_asked:
        logging.getLogger("paceline").setLevel(level.upper())
