"""Optimizers by the names that transformers uses, and which parameters decay."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from paceline.errors import ConfigError, MissingExtraError, Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.trainer.arguments.arguments import TrainingArguments

__all__ = [
    "WARMING",
    "build_optimizer",
    "class_name",
    "decaying_names",
    "differences",
    "known_optimizers",
    "optimizer_class",
    "parameter_groups",
    "read_arguments",
    "settings_of",
]

WHERE = "TrainingArguments(…)"
# Those that raise the rate themselves.
WARMING = ("schedule_free_adamw", "schedule_free_sgd")
# Keys of an optimizer's groups; a schedule keeps the rate that was asked for under the first.
_FROM_ARGUMENTS = {"initial_lr": "learning_rate", "weight_decay": "weight_decay", "betas": "betas", "eps": "eps"}
_NORM = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


class _Made(NamedTuple):
    """Where an optimizer comes from, and what it is told besides the rate and the decay."""

    module: str
    name: str
    adam: bool = False
    lion: bool = False
    slow: tuple[float, ...] = ()
    extra: dict[str, Any] = {}


# The third beta of AdEMAMix, for which the arguments have no name.
_SLOW = 0.9999
_BITS = "bitsandbytes.optim"
_FREE = "schedulefree"
_TABLE: dict[str, _Made] = {
    "adamw_torch": _Made("torch.optim", "AdamW", adam=True, extra={"fused": False}),
    "adamw_torch_fused": _Made("torch.optim", "AdamW", adam=True),
    "adam": _Made("torch.optim", "Adam", adam=True),
    "adafactor": _Made("torch.optim", "Adafactor"),
    "sgd": _Made("torch.optim", "SGD"),
    "adagrad": _Made("torch.optim", "Adagrad"),
    "rmsprop": _Made("torch.optim", "RMSprop"),
    "radam": _Made("torch.optim", "RAdam", adam=True),
    "nadam": _Made("torch.optim", "NAdam", adam=True),
    "adamax": _Made("torch.optim", "Adamax", adam=True),
    "adadelta": _Made("torch.optim", "Adadelta"),
    "muon": _Made("torch.optim", "Muon"),
    "adamw_bnb_8bit": _Made(_BITS, "AdamW8bit", adam=True),
    "adamw_8bit": _Made(_BITS, "AdamW8bit", adam=True),
    "paged_adamw_32bit": _Made(_BITS, "PagedAdamW32bit", adam=True),
    "paged_adamw_8bit": _Made(_BITS, "PagedAdamW8bit", adam=True),
    "ademamix": _Made(_BITS, "AdEMAMix", adam=True, slow=(_SLOW,)),
    "ademamix_8bit": _Made(_BITS, "AdEMAMix8bit", adam=True, slow=(_SLOW,)),
    "paged_ademamix_32bit": _Made(_BITS, "PagedAdEMAMix32bit", adam=True, slow=(_SLOW,)),
    "paged_ademamix_8bit": _Made(_BITS, "PagedAdEMAMix8bit", adam=True, slow=(_SLOW,)),
    "lion_8bit": _Made(_BITS, "Lion8bit", lion=True),
    "lion_32bit": _Made(_BITS, "Lion", lion=True),
    "paged_lion_32bit": _Made(_BITS, "PagedLion32bit", lion=True),
    "paged_lion_8bit": _Made(_BITS, "PagedLion8bit", lion=True),
    "rmsprop_bnb": _Made(_BITS, "RMSprop"),
    "rmsprop_bnb_8bit": _Made(_BITS, "RMSprop8bit"),
    "rmsprop_bnb_32bit": _Made(_BITS, "RMSprop32bit"),
    "schedule_free_adamw": _Made(_FREE, "AdamWScheduleFree", adam=True),
    "schedule_free_radam": _Made(_FREE, "RAdamScheduleFree", adam=True),
    "schedule_free_sgd": _Made(_FREE, "SGDScheduleFree"),
    "adamw_torch_8bit": _Made("torchao.optim", "AdamW8bit", adam=True),
    "adamw_torch_4bit": _Made("torchao.optim", "AdamW4bit", adam=True),
}
_PURPOSES = {"bitsandbytes": "bitsandbytes", "schedulefree": "schedulefree", "torchao": "torchao"}


def known_optimizers() -> Iterator[str]:
    """The names that `optim` may have."""
    yield from _TABLE


def class_name(optim: str) -> str:
    """The name of the class behind a name of `optim`."""
    return _TABLE[optim].name


def optimizer_class(args: TrainingArguments, device: torch.device) -> tuple[type[Any], dict[str, Any]]:
    """The class of the optimizer and its arguments but the parameters.

    Raises:
        MissingExtraError: The package that holds it is not installed.
        ConfigError: `optim_args` cannot be read.
    """
    made = _TABLE[args.optim]
    cls = _load(made, args.optim)
    said: dict[str, Any] = {"lr": args.learning_rate}
    if args.optim != "muon":
        said["weight_decay"] = args.weight_decay
    if made.adam or made.lion:
        said["betas"] = (args.adam_beta1, args.adam_beta2, *made.slow)
    if made.adam:
        said["eps"] = args.adam_epsilon
    if args.optim == "adamw_torch_fused":
        said["fused"] = device.type in ("cpu", "cuda", "mps", "xpu")
    if args.optim in WARMING:
        said["warmup_steps"] = args.get_warmup_steps(max(1, args.max_steps))
    return cls, {**said, **made.extra, **read_arguments(args.optim_args)}


def build_optimizer(cls: type[Any], groups: list[dict[str, Any]], said: dict[str, Any], args: TrainingArguments) -> Any:
    """Make the optimizer.

    Raises:
        ConfigError: `optim_args` names something that it does not take.
    """
    taken = inspect.signature(cls).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    unknown = [name for name in read_arguments(args.optim_args) if name not in taken and not open_ended]
    if unknown:
        what = f"{cls.__name__} takes no "
        raise ConfigError(Problem(WHERE, "optim_args", what + name, hint=did_you_mean(name, taken)) for name in unknown)
    return cls(groups, **said)


def _load(made: _Made, name: str) -> type[Any]:
    package = made.module.partition(".")[0]
    try:
        module = import_module(made.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(package, _PURPOSES[package], f"optim={name!r}") from error
    found = getattr(module, made.name, None)
    if found is None:
        what = f"{name!r} is not in {package} {getattr(import_module(package), '__version__', '')}"
        raise ConfigError([Problem(WHERE, "optim", what, hint="install a newer release")])
    cls: type[Any] = found
    return cls


def read_arguments(text: str | None) -> dict[str, Any]:
    """Read `key=value` pairs with commas between; numbers and booleans are understood.

    Raises:
        ConfigError: A part is no such pair.
    """
    if not text:
        return {}
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals:
            what = f"{part.strip()!r} is no key=value"
            raise ConfigError([Problem(WHERE, "optim_args", what)])
        found[key.strip()] = _literal(value.strip())
    return found


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def decaying_names(model: nn.Module) -> list[str]:
    """The names of the parameters that decay: neither in a norm, nor called bias or norm."""
    norms = tuple(kind for name in ("LayerNorm", "RMSNorm", "GroupNorm") if (kind := getattr(nn, name, None)))
    still = {
        f"{where}.{name}" if where else name
        for where, module in model.named_modules()
        if isinstance(module, norms)
        for name, _ in module.named_parameters(recurse=False)
    }
    return [name for name, _ in model.named_parameters() if name not in still and not _NORM.search(name.lower())]


def parameter_groups(model: nn.Module, names: list[str], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, one that decays and one that does not; empty ones are left out."""
    decaying = set(names)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in decaying], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """What the groups of an optimizer have from the arguments, by the arguments' names or torch's."""
    groups = optimizer.param_groups
    return [{name: group[key] for key, name in _FROM_ARGUMENTS.items() if key in group} for group in groups]


def differences(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """Settings that two lists of groups have with different values."""
    return {
        name: (mine[name], theirs[name])
        for mine, theirs in zip(one, other, strict=False)
        for name in sorted(mine.keys() & theirs.keys())
        if np.not_equal(mine[name], theirs[name]).any()
    }
