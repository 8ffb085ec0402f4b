"""Checks of training arguments against each other, and the values that follow from others."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paceline.config.deepspeed_file.settings import read_settings
from paceline.config.schema.shapes import FALSE_WORDS, TRUE_WORDS
from paceline.errors import ConfigError, did_you_mean
from paceline.trainer.argument_errors import field_problem
from paceline.trainer.arguments.parsing import read_mapping, read_window
from paceline.trainer.optim.optimizers import SELF_WARMING, known_optimizers, read_arguments
from paceline.trainer.optim.schedules import SCHEDULES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.errors import Problem
    from paceline.trainer.arguments.fields import AllFields

__all__ = ["fill_dependent_values", "find_problems", "read_short_forms", "setting"]

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
    "packing_length": 1,
}
_UNSUPPORTED_OPTIMIZERS = ("galore_", "apollo_", "lomo", "adalomo", "grokadamw", "stable_adamw", "adamw_anyprecision")
_OF_WORKERS = ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context")
_MAPPINGS = (
    "lr_scheduler_kwargs",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
    "fsdp_config",
    "accelerator_config",
    "parallelism_config",
)


class _Conflict(NamedTuple):
    """Values that cannot be combined.

    Attributes:
        field: The argument to name.
        applies: Whether the arguments have the conflict.
        what: What was seen; `{args.NAME}` is filled in.
        why: Why it cannot work.
        hint: What to do.
    """

    field: str
    applies: Callable[[AllFields], Any]
    what: str
    why: str = ""
    hint: str = "leave it out"


def _exclusive(one: str, other: str, why: str) -> _Conflict:
    return _Conflict(
        one,
        lambda args: getattr(args, one) and getattr(args, other),
        f"given together with {other}",
        why,
        "give one of them",
    )


def _other_strategy(field: str) -> _Conflict:
    return _Conflict(
        field,
        lambda args: getattr(args, field) and args.strategy not in (None, field),
        "given together with strategy={args.strategy!r}",
        "both choose the strategy",
        "give one of them",
    )


def _useless_warmup(field: str) -> tuple[_Conflict, ...]:
    """The cases where a warmup has no effect."""
    schedule = f"{{args.{field}}} with lr_scheduler_type={{args.lr_scheduler_type!r}}"
    return (
        _Conflict(
            field,
            lambda args: (
                getattr(args, field) and args.lr_scheduler_type == "constant" and args.optim not in SELF_WARMING
            ),
            schedule,
            "that schedule has no warmup",
            "write constant_with_warmup, or leave it out",
        ),
        _Conflict(
            field,
            lambda args: getattr(args, field) and args.lr_scheduler_type == "reduce_lr_on_plateau",
            schedule,
            "that schedule has no warmup",
        ),
        _Conflict(
            field,
            lambda args: (
                getattr(args, field)
                and args.optim == "schedule_free_radam"
                and args.lr_scheduler_type not in ("constant", "reduce_lr_on_plateau")
            ),
            f"{{args.{field}}} with optim={{args.optim!r}}",
            "that optimizer needs no warmup",
        ),
    )


def _unused_kwargs(field: str) -> _Conflict:
    return _Conflict(
        f"{field}_kwargs",
        lambda args: (
            getattr(args, f"{field}_kwargs") and not (args.activation_checkpointing or args.gradient_checkpointing)
        ),
        f"given without {field}",
        "no activations are recomputed",
        f"write {field}=True, or leave it out",
    )


def _kwargs_differ(args: AllFields) -> bool:
    new, old = args.activation_checkpointing_kwargs, args.gradient_checkpointing_kwargs
    return new is not None and old is not None and new != old


_CONFLICTS = (
    _exclusive("bf16", "fp16", "a run has one precision"),
    _exclusive("bf16_full_eval", "fp16_full_eval", "an evaluation has one precision"),
    _exclusive("fsdp", "deepspeed", "both choose the strategy"),
    _exclusive("warmup_steps", "warmup_ratio", "both set the length of the warmup"),
    _other_strategy("fsdp"),
    _other_strategy("deepspeed"),
    *_useless_warmup("warmup_steps"),
    *_useless_warmup("warmup_ratio"),
    _Conflict(
        "lr_scheduler_type",
        lambda args: args.optim.startswith("schedule_free") and args.lr_scheduler_type not in ("linear", "constant"),
        "{args.lr_scheduler_type!r} with optim={args.optim!r}",
        "that optimizer needs no schedule and keeps the peak rate",
    ),
    _Conflict(
        "include_num_input_tokens_seen",
        lambda args: args.max_tokens is not None and args.include_num_input_tokens_seen == "non_padding",
        "'non_padding' with max_tokens",
        "max_tokens counts padding, and there is only one counter",
        "write all, or leave one of them out",
    ),
    _Conflict(
        "length_column_name",
        lambda args: args.length_column_name != "length" and args.train_sampling_strategy != "group_by_length",
        "given without group_by_length",
        "it would be ignored",
        "write train_sampling_strategy='group_by_length', or leave it out",
    ),
    _Conflict(
        "gradient_checkpointing",
        lambda args: args.gradient_checkpointing and args.activation_checkpointing is False,
        "True with activation_checkpointing=False",
        "they are the same setting",
        "give one of them",
    ),
    _Conflict(
        "gradient_checkpointing_kwargs",
        _kwargs_differ,
        "given together with activation_checkpointing_kwargs",
        "they are the same setting",
        "give one of them",
    ),
    _unused_kwargs("activation_checkpointing"),
    _unused_kwargs("gradient_checkpointing"),
    _Conflict(
        "eval_strategy",
        lambda args: args.lr_scheduler_type == "reduce_lr_on_plateau" and args.eval_strategy == "no",
        "'no' with lr_scheduler_type='reduce_lr_on_plateau'",
        "that schedule steps on a metric of the evaluation",
        "write steps or epoch",
    ),
    _Conflict(
        "gradient_accumulation_steps",
        lambda args: args.global_batch_size and args.gradient_accumulation_steps != 1,
        "{args.gradient_accumulation_steps} with global_batch_size={args.global_batch_size}",
        "it is derived from global_batch_size",
    ),
    _Conflict(
        "save_only_model",
        lambda args: args.save_only_model and args.load_best_model_at_end and args.deepspeed,
        "given together with load_best_model_at_end under DeepSpeed",
        "the engine cannot load a checkpoint of weights only",
    ),
    _Conflict(
        "push_to_hub",
        lambda args: args.push_to_hub,
        "is not supported",
        "paceline uploads nothing",
        "use huggingface_hub on output_dir",
    ),
    _Conflict(
        "packing_length",
        lambda args: args.packing_length is not None and not args.packing,
        "{args.packing_length} without packing",
        "nothing is packed",
        "write packing=True, or leave it out",
    ),
    _Conflict(
        "packing",
        lambda args: args.packing and args.train_sampling_strategy == "group_by_length",
        "given together with train_sampling_strategy='group_by_length'",
        "all packed rows have one length",
        "give one of them",
    ),
    _Conflict(
        "batch_eval_metrics",
        lambda args: args.batch_eval_metrics and args.prediction_loss_only,
        "given together with prediction_loss_only",
        "no predictions are kept to compute metrics from",
        "give one of them",
    ),
    _Conflict(
        "metric_for_best_model",
        lambda args: args.save_strategy == "best" and not args.metric_for_best_model,
        "is missing with save_strategy='best'",
        "nothing decides which checkpoint is the best",
        "name a metric",
    ),
)


def read_short_forms(args: AllFields) -> list[Problem]:
    """Replace what may be written in a shorter way by what it stands for, in place.

    Text becomes the mapping that it describes, a yes or no in a field of words the word, and in `fsdp` a bool.

    Returns:
        What cannot be read; such values stay as they are.
    """
    counted: str | bool = args.include_num_input_tokens_seen
    if isinstance(counted, bool):
        args.include_num_input_tokens_seen = "all" if counted else "no"
    if str(args.fsdp).lower() in TRUE_WORDS | FALSE_WORDS:
        args.fsdp = True if str(args.fsdp).lower() in TRUE_WORDS else None  # type: ignore[assignment]
    problems = []
    for name in _MAPPINGS:
        value = getattr(args, name)
        if isinstance(value, str | dict):
            try:
                setattr(args, name, read_mapping(value))
            except ValueError as error:
                hint = "give a mapping, JSON text, or the path of a JSON file"
                problems.append(field_problem(name, str(error), hint=hint))
    return problems


def find_problems(args: AllFields) -> Iterator[Problem]:
    """Yield all problems between values, and change none.

    Args:
        args: Each value has the type of its field, and its long form (`read_short_forms`).
    """
    yield from _ranges(args)
    yield from _intervals(args)
    yield from _names(args)
    for conflict in _CONFLICTS:
        if conflict.applies(args):
            yield field_problem(conflict.field, conflict.what.format(args=args), conflict.why, conflict.hint)
    yield from _loaders(args)
    yield from _best(args)
    yield from _plateau(args)
    yield from _texts(args)


def _ranges(args: AllFields) -> Iterator[Problem]:
    for name, least in _AT_LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            yield field_problem(name, f"{value} is out of range", f"it must be at least {least}")
    for name in ("label_smoothing_factor", "warmup_ratio", "adam_beta1", "adam_beta2"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            yield field_problem(name, f"{value} is out of range", "it must be at least 0 and below 1")
    if not args.max_steps > 0 and not args.num_train_epochs > 0:
        yield field_problem("num_train_epochs", "0 without max_steps", "nothing would be trained")


def _intervals(args: AllFields) -> Iterator[Problem]:
    for kind in ("logging", "eval", "save"):
        value, strategy = getattr(args, f"{kind}_steps"), getattr(args, f"{kind}_strategy")
        if value is not None and value > 1 and value != int(value):
            why = "from 1 on it is a number of steps; below 1 it is a fraction of all steps"
            yield field_problem(f"{kind}_steps", f"{value} is not a whole number", why)
        if value == 0 and strategy == "steps":
            hint = f"give a number of steps, or write {kind}_strategy='no'"
            yield field_problem(f"{kind}_steps", f"0 with {kind}_strategy='steps'", "an interval is at least 1", hint)


def _names(args: AllFields) -> Iterator[Problem]:
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
        if value is not None and value not in known:
            hint = did_you_mean(str(value), known) or f"the names are {', '.join(known)}"
            if name == "optim" and str(value).startswith(_UNSUPPORTED_OPTIMIZERS):
                hint = "it is not supported; give the Trainer optimizer_cls_and_kwargs"
            yield field_problem(name, f"{value!r} is unknown", hint=hint)


def _loaders(args: AllFields) -> Iterator[Problem]:
    if args.dataloader_num_workers == 0:
        for name in _OF_WORKERS:
            if getattr(args, name):
                what = f"{getattr(args, name)} with dataloader_num_workers=0"
                yield field_problem(name, what, "only worker processes use it", "set dataloader_num_workers")
    extra = [name for name in args.include_for_metrics if name not in ("inputs", "loss")]
    if extra:
        yield field_problem("include_for_metrics", f"{extra[0]!r} is unknown", hint="the names are inputs, loss")


def _best(args: AllFields) -> Iterator[Problem]:
    """What keeps `load_best_model_at_end` from having a saved checkpoint for each evaluation."""
    if not args.load_best_model_at_end:
        return
    if args.eval_strategy == "no":
        what = "'no' with load_best_model_at_end"
        yield field_problem("eval_strategy", what, "nothing decides which checkpoint is best", "write steps or epoch")
    elif args.save_strategy not in (args.eval_strategy, "best"):
        what = f"{args.save_strategy!r} differs from eval_strategy {args.eval_strategy!r}"
        why = "load_best_model_at_end needs a checkpoint for every evaluation"
        yield field_problem("save_strategy", what, why, "make them equal, or write best")
    elif args.save_strategy == "steps":
        interval = args.logging_steps if args.eval_steps is None else args.eval_steps
        if interval and not _is_multiple(args.save_steps, interval):
            what = f"{args.save_steps} is not a multiple of the {interval} steps between evaluations"
            why = "load_best_model_at_end needs an evaluation of every checkpoint"
            yield field_problem("save_steps", what, why, f"write {interval} or a multiple of it")


def _is_multiple(value: float, of: float) -> bool:
    ratio = value / of
    return abs(ratio - round(ratio)) < 1e-9


def _plateau(args: AllFields) -> Iterator[Problem]:
    """Whether it is known in which direction the metric of `reduce_lr_on_plateau` improves."""
    if args.lr_scheduler_type != "reduce_lr_on_plateau":
        return
    mode, name, greater = plateau_mode(args), args.metric_for_best_model, args.greater_is_better
    if mode is None and greater is None and name is not None and not name.endswith("loss"):
        what = f"is missing with lr_scheduler_type='reduce_lr_on_plateau' and metric_for_best_model={name!r}"
        yield field_problem("greater_is_better", what, "the rate falls when the metric no longer improves", "set it")
    if mode is not None and greater is not None and greater != (mode == "max"):
        why = "the rate would fall while the metric improves"
        yield field_problem("greater_is_better", f"{greater} with mode={mode!r} in lr_scheduler_kwargs", why)


def plateau_mode(args: AllFields) -> str | None:
    """The `mode` in `lr_scheduler_kwargs` of `reduce_lr_on_plateau`; None if it is not given."""
    if args.lr_scheduler_type != "reduce_lr_on_plateau" or not isinstance(args.lr_scheduler_kwargs, dict):
        return None
    return args.lr_scheduler_kwargs.get("mode")


def _texts(args: AllFields) -> Iterator[Problem]:
    """Check text that has a syntax of its own."""
    if args.optim_args:
        yield from _problems_in(read_arguments, args.optim_args)
    if args.profile_steps:
        yield from _problems_in(read_window, args.profile_steps)
    if isinstance(args.deepspeed, str):
        settings, name, wrong = read_settings(args.deepspeed, Path())
        if settings is None:
            yield field_problem("deepspeed", wrong or name, hint="give a mapping or a JSON file")


def _problems_in(read: Callable[[str], object], text: str) -> Iterator[Problem]:
    try:
        read(text)
    except ConfigError as error:
        yield from error.problems


def fill_dependent_values(args: AllFields) -> None:
    """Set values that follow from others; warn of one that has no effect."""
    if args.output_dir.startswith("~"):
        args.output_dir = str(Path(args.output_dir).expanduser())
    if args.gradient_checkpointing and args.activation_checkpointing is None:
        args.activation_checkpointing = True
    if args.activation_checkpointing_kwargs is None:
        args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs
    if args.torch_compile_backend or args.torch_compile_mode:
        args.torch_compile = True
    _fill_best(args)
    if setting(args.accelerator_config, "non_blocking") and not args.dataloader_pin_memory:
        warnings.warn(
            "accelerator_config sets non_blocking, but dataloader_pin_memory is False: copies from memory that is not "
            "pinned block anyway. Leave dataloader_pin_memory on.",
            UserWarning,
            stacklevel=4,
        )


def _fill_best(args: AllFields) -> None:
    if args.load_best_model_at_end and args.metric_for_best_model is None:
        args.metric_for_best_model = "loss"
    if args.metric_for_best_model is not None and args.greater_is_better is None:
        mode = plateau_mode(args)
        args.greater_is_better = not args.metric_for_best_model.endswith("loss") if mode is None else mode == "max"


def setting(config: Any, name: str) -> Any:
    """One value of `accelerator_config`, which may be a mapping or an object; None if it is not set."""
    if isinstance(config, dict):
        return config.get(name)
    return getattr(config, name, None)
