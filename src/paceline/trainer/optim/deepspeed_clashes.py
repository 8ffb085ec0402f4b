"""An optimizer and a schedule that DeepSpeed's configuration describes, beside arguments that describe them too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.errors import Problem
from paceline.trainer.optim.optimizers import class_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.trainer.arguments.arguments import TrainingArguments

__all__ = ["adam_arguments", "find_clashes"]

_WHERE = "TrainingArguments(…)"
_WITH_EPS = {"adam", "adamw", "lamb", "muadam", "muadamw", "nadam", "radam", "adamax", "sparseadam"}
_WITH_BETAS = _WITH_EPS | {"lion"}
# The course that each schedule of DeepSpeed's takes, by its name here.
_COURSES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


def adam_arguments(section: Mapping[str, Any], args: TrainingArguments) -> dict[str, Any]:
    """What the arguments say of Adam, as far as the described optimizer takes it or asks for it by name."""
    kind, asked = str(section.get("type")).lower(), section.get("params") or {}
    said: dict[str, Any] = {}
    if kind in _WITH_BETAS or "betas" in asked:
        said["betas"] = (args.adam_beta1, args.adam_beta2)
    if kind in _WITH_EPS or "eps" in asked:
        said["eps"] = args.adam_epsilon
    return said


def find_clashes(args: TrainingArguments, settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield arguments that were given and would lose to a section of DeepSpeed's configuration."""
    given = args.origins()
    optimizer, scheduler = settings.get("optimizer"), settings.get("scheduler")
    if isinstance(optimizer, dict):
        yield from _of_optimizer(args, given, str(optimizer.get("type")))
    if isinstance(scheduler, dict):
        yield from _of_schedule(args, given, str(scheduler.get("type")))


def _of_optimizer(args: TrainingArguments, given: Mapping[str, str], kind: str) -> Iterator[Problem]:
    why = f"the DeepSpeed configuration describes {kind}, and one of the two would silently lose"
    hint = "leave it out, or remove the optimizer section"
    # DeepSpeed's Adam decays as AdamW does, unless it is told otherwise.
    same = {kind.lower(), "adamw"} if kind.lower() == "adam" else {kind.lower()}
    if "optim" in given and class_name(args.optim).lower() not in same:
        yield Problem(_WHERE, "optim", repr(args.optim), why, hint)
    if args.optim_args:
        yield Problem(_WHERE, "optim_args", repr(args.optim_args), why, "write them into optimizer.params")


def _of_schedule(args: TrainingArguments, given: Mapping[str, str], kind: str) -> Iterator[Problem]:
    why = f"the DeepSpeed configuration describes {kind}, and one of the two would silently lose"
    hint = "leave it out, or remove the scheduler section"
    if "lr_scheduler_type" in given and args.lr_scheduler_type != _COURSES.get(kind):
        yield Problem(_WHERE, "lr_scheduler_type", repr(args.lr_scheduler_type), why, hint)
    if args.lr_scheduler_kwargs:
        what = repr(args.lr_scheduler_kwargs)
        yield Problem(_WHERE, "lr_scheduler_kwargs", what, why, "write them into scheduler.params")
    for name in ("warmup_steps", "warmup_ratio"):
        if getattr(args, name) and kind not in _COURSES:
            yield Problem(_WHERE, name, repr(getattr(args, name)), why, hint)
