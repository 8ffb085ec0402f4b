"""A DeepSpeed configuration beside the training arguments: what it contains, and where the two contradict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.config import DeepSpeedPlugin
from paceline.config.deepspeed_file.settings import AUTO, read_settings, value_at
from paceline.trainer.argument_errors import field_error, field_problem
from paceline.trainer.optim.optimizers import class_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.errors import Problem
    from paceline.trainer.arguments.arguments import TrainingArguments

__all__ = ["adam_arguments", "deepspeed_plugin", "find_conflicts"]

_WITH_EPS = {"adam", "adamw", "lamb", "muadam", "muadamw", "nadam", "radam", "adamax", "sparseadam"}
_WITH_BETAS = _WITH_EPS | {"lion"}
# DeepSpeed's schedules, and the schedules of the same shape here.
_SAME_SHAPE = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


def deepspeed_plugin(args: TrainingArguments, problems: list[Problem]) -> DeepSpeedPlugin | None:
    """The plugin for the DeepSpeed configuration of the arguments; values that contradict them become problems.

    Raises:
        ConfigError: The configuration cannot be parsed.
    """
    config: Any = args.deepspeed
    if not config or isinstance(config, DeepSpeedPlugin):
        return config or None
    settings, name, wrong = read_settings(config, Path())
    if settings is None:
        raise field_error("deepspeed", wrong or name, hint="give a mapping or a JSON file")
    for key, value in _expected(args).items():
        configured = value_at(settings, key)
        if configured not in (None, AUTO, list(value) if isinstance(value, tuple) else value):
            what = f"{configured} contradicts {value}, which follows from the other arguments"
            problems.append(field_problem(f"deepspeed.{key}", what, "one would be ignored", 'write "auto"'))
    # Preparing fills in the other "auto" values; this one would be known only to the training loop.
    return DeepSpeedPlugin(hf_ds_config={**settings, "gradient_clipping": args.max_grad_norm})


def _expected(args: TrainingArguments) -> dict[str, Any]:
    """The values that the arguments imply, by their keys in a DeepSpeed configuration."""
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


def adam_arguments(section: Mapping[str, Any], args: TrainingArguments) -> dict[str, Any]:
    """Adam's arguments, as far as the optimizer of the `optimizer` section takes them or names them itself."""
    kind, params = str(section.get("type")).lower(), section.get("params") or {}
    arguments: dict[str, Any] = {}
    if kind in _WITH_BETAS or "betas" in params:
        arguments["betas"] = (args.adam_beta1, args.adam_beta2)
    if kind in _WITH_EPS or "eps" in params:
        arguments["eps"] = args.adam_epsilon
    return arguments


def find_conflicts(args: TrainingArguments, settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield explicit arguments that the DeepSpeed configuration would override."""
    explicit = args.origins()
    optimizer, scheduler = settings.get("optimizer"), settings.get("scheduler")
    if isinstance(optimizer, dict):
        yield from _with_optimizer(args, explicit, str(optimizer.get("type")))
    if isinstance(scheduler, dict):
        yield from _with_scheduler(args, explicit, str(scheduler.get("type")))


def _with_optimizer(args: TrainingArguments, explicit: Mapping[str, str], kind: str) -> Iterator[Problem]:
    why = f"the DeepSpeed configuration sets the optimizer {kind}, and one of the two would be ignored"
    hint = "leave it out, or remove the optimizer section"
    # DeepSpeed's Adam decays weights as AdamW does, unless adam_w_mode is false.
    same = {kind.lower(), "adamw"} if kind.lower() == "adam" else {kind.lower()}
    if "optim" in explicit and class_name(args.optim).lower() not in same:
        yield field_problem("optim", repr(args.optim), why, hint)
    if args.optim_args:
        yield field_problem("optim_args", repr(args.optim_args), why, "write them into optimizer.params")


def _with_scheduler(args: TrainingArguments, explicit: Mapping[str, str], kind: str) -> Iterator[Problem]:
    why = f"the DeepSpeed configuration sets the schedule {kind}, and one of the two would be ignored"
    hint = "leave it out, or remove the scheduler section"
    if "lr_scheduler_type" in explicit and args.lr_scheduler_type != _SAME_SHAPE.get(kind):
        yield field_problem("lr_scheduler_type", repr(args.lr_scheduler_type), why, hint)
    if args.lr_scheduler_kwargs:
        what = repr(args.lr_scheduler_kwargs)
        yield field_problem("lr_scheduler_kwargs", what, why, "write them into scheduler.params")
    for name in ("warmup_steps", "warmup_ratio"):
        if getattr(args, name) and kind not in _SAME_SHAPE:
            yield field_problem(name, repr(getattr(args, name)), why, hint)
