"""Checks of what a Trainer is constructed with against its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paceline.environment.logging import get_logger
from paceline.errors import PrepareError, Problem
from paceline.trainer.argument_errors import field_problem
from paceline.trainer.arguments.arguments import TrainingArguments
from paceline.trainer.arguments.deepspeed import find_conflicts
from paceline.trainer.optim.schedules import follows_metric

__all__ = ["check_constructor", "require_own_arguments", "warn_of_unused_overrides"]

logger = get_logger(__name__)

_OWN_LOADERS = "override get_train_dataloader or get_eval_dataloader"
_BY_CALLBACK = "set control.should_log, should_evaluate or should_save in a callback"
# Methods that transformers' Trainer calls and this one does not, with what to override instead.
_NOT_CALLED = {
    "_clip_grad_norm": "set max_grad_norm=0, and clip in a callback's on_pre_optimizer_step",
    "_determine_best_metric": "compute metric_for_best_model in compute_metrics",
    "_evaluate": "override evaluate",
    "_get_collator_with_removed_columns": _OWN_LOADERS,
    "_get_dataloader": _OWN_LOADERS,
    "_get_eval_sampler": _OWN_LOADERS,
    "_get_learning_rate": "override log",
    "_get_num_items_in_batch": "override compute_loss",
    "_inner_training_loop": "override training_step or train, or use callbacks",
    "_load_best_model": "load after train",
    "_load_from_checkpoint": "override train",
    "_load_optimizer_and_scheduler": "give the object state_dict and load_state_dict",
    "_load_rng_state": "give the object state_dict and load_state_dict",
    "_maybe_log_save_evaluate": _BY_CALLBACK,
    "_move_model_to_device": "override create_accelerator_and_postprocess",
    "_prepare_for_training": "override create_optimizer_and_scheduler",
    "_prepare_input": "override _prepare_inputs",
    "_remove_unused_columns": "set remove_unused_columns=False, and remove columns from the data set",
    "_run_epoch": "override training_step, or use callbacks",
    "_save": "override save_model and save_checkpoint",
    "_save_checkpoint": "override save_checkpoint",
    "_save_optimizer_and_scheduler": "override save_checkpoint",
    "_save_rng_state": "override save_checkpoint",
    "_wrap_model": "wrap the model before the Trainer gets it",
    "autocast_smart_context_manager": "enter the context in compute_loss",
    "compute_loss_context_manager": "enter the context in compute_loss",
    "get_batch_samples": "override get_train_dataloader, or _prepare_inputs",
}


def require_own_arguments(args: Any) -> TrainingArguments:
    """The arguments of a Trainer, with their type checked.

    Raises:
        PrepareError: They are of another class, for example transformers'.
    """
    if args is None:
        return TrainingArguments()
    if isinstance(args, TrainingArguments):
        return args
    module, kind = type(args).__module__, type(args).__name__
    saw = f"Trainer got {module}.{kind} as args"
    packages = [base.__module__.partition(".")[0] for base in type(args).__mro__]
    if "transformers" in packages:
        why = "That class is for transformers' Trainer; this Trainer has its own"
        raise PrepareError(saw, why, "Write from paceline import TrainingArguments: its fields have the same names")
    hint = "Write TrainingArguments(output_dir=…)"
    if isinstance(args, Mapping):
        hint = "Write TrainingArguments(**args)"
    raise PrepareError(saw, "It is not a TrainingArguments", hint)


def warn_of_unused_overrides(cls: type[Any], base: type[Any], args: TrainingArguments) -> None:
    """Warn of methods that a subclass overrides, as transformers' Trainer calls them, and that are not called here.

    Args:
        cls: The class of the Trainer.
        base: The Trainer itself.
        args: Decide what writes checkpoints.
    """
    own = {name for part in cls.__mro__ if part not in base.__mro__ for name in vars(part)}
    hints = {name: hint for name, hint in _NOT_CALLED.items() if name in own}
    if "save_model" in own and "save_checkpoint" not in own and args.save_strategy != "no" and not args.save_only_model:
        hints["save_model"] = "override save_checkpoint as well, or set save_only_model"
    for name, hint in hints.items():
        who = "a checkpoint" if name == "save_model" else "this Trainer"
        logger.warning("%s.%s is not called by %s: %s.", cls.__name__, name, who, hint)


def check_constructor(
    args: TrainingArguments,
    *,
    eval_dataset: Any,
    optimizer: Any,
    scheduler: Any,
    optimizer_class: Any,
    compute_metrics: Any,
    compute_loss_func: Any,
    data_collator: Any,
    takes: frozenset[str] | None,
    deepspeed: Mapping[str, Any] | None,
) -> None:
    """Compare the arguments with what else a Trainer was given.

    Args:
        args: The arguments.
        eval_dataset: As given to the Trainer, like the others; None if not given.
        optimizer: An optimizer.
        scheduler: A scheduler.
        optimizer_class: `optimizer_cls_and_kwargs`.
        compute_metrics: A function or metric.
        compute_loss_func: A loss function.
        data_collator: A collator.
        takes: The columns that the model takes; None if it takes any.
        deepspeed: The DeepSpeed configuration of the run, if it has one.

    Raises:
        ConfigError: All contradictions at once.
    """
    exists = "the optimizer or schedule given to the Trainer is used unchanged"
    conflicts = (
        (
            args.eval_strategy != "no" and eval_dataset is None,
            field_problem(
                "eval_strategy", f"{args.eval_strategy!r} without an eval_dataset", hint="give one to the Trainer"
            ),
        ),
        (
            optimizer_class is not None and optimizer is not None,
            Problem(
                "Trainer(…)", "optimizers", "given together with optimizer_cls_and_kwargs", hint="give one of them"
            ),
        ),
        (
            args.optim_args and (optimizer or optimizer_class) is not None,
            field_problem("optim_args", "given together with an optimizer", exists, "leave it out"),
        ),
        (
            args.lr_scheduler_kwargs and scheduler is not None,
            field_problem("lr_scheduler_kwargs", "given together with a scheduler", exists, "leave it out"),
        ),
        (
            compute_metrics is not None and args.prediction_loss_only,
            field_problem(
                "prediction_loss_only",
                "given together with compute_metrics",
                "no predictions are kept to compute metrics from",
                "give one of them",
            ),
        ),
        (
            compute_loss_func is not None and args.label_smoothing_factor > 0,
            field_problem(
                "label_smoothing_factor",
                "given together with compute_loss_func",
                "that function computes the whole loss",
                "give one of them",
            ),
        ),
    )
    problems = [problem for applies, problem in conflicts if applies]
    problems += _schedule_problems(args, scheduler)
    problems += _packing_problems(args, data_collator, compute_loss_func, takes)
    if deepspeed is not None:
        problems += find_conflicts(args, deepspeed)
        problems += _muon_problems(args, optimizer, optimizer_class)
    if problems:
        raise args.config_error(problems)


def _schedule_problems(args: TrainingArguments, scheduler: Any) -> Iterator[Problem]:
    if args.eval_strategy == "no" and follows_metric(scheduler):
        yield field_problem(
            "eval_strategy",
            f"'no' with a {type(scheduler).__name__}",
            "that schedule steps on a metric of the evaluation",
            "write steps or epoch",
        )


def _muon_problems(args: TrainingArguments, optimizer: Any, optimizer_class: Any) -> Iterator[Problem]:
    if args.optim == "muon" and (optimizer or optimizer_class) is None:
        yield field_problem(
            "optim",
            "'muon' under DeepSpeed",
            "ZeRO cuts weights into flat pieces, and Muon needs whole matrices",
            "use fsdp, or another optimizer",
        )


def _packing_problems(
    args: TrainingArguments, data_collator: Any, compute_loss_func: Any, takes: frozenset[str] | None
) -> Iterator[Problem]:
    """What keeps sequences from being packed."""
    if not args.packing:
        return
    if data_collator is not None:
        why = "packed rows are collated with their positions, so it would not be called"
        yield field_problem("packing", "given together with a data_collator", why, "leave one of them out")
    if compute_loss_func is not None:
        why = "whether sequences see each other is checked by the model's own loss"
        yield field_problem("packing", "given together with compute_loss_func", why, "leave one of them out")
    if takes is not None and "position_ids" not in takes:
        why = "it cannot tell the sequences of a row apart"
        yield field_problem("packing", "given for a model whose forward takes no position_ids", why, "leave it out")
