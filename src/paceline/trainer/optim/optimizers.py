"""Optimizers by the names that transformers uses, and which parameters get weight decay."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from paceline.errors import ConfigError, MissingExtraError, did_you_mean
from paceline.trainer.argument_errors import field_error, field_problem

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "SELF_WARMING",
    "OptimizerSettings",
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

# These warm the learning rate up by themselves.
SELF_WARMING = ("schedule_free_adamw", "schedule_free_sgd")
# Keys of parameter groups that come from the arguments; schedulers store the configured rate as `initial_lr`.
_FROM_ARGUMENTS = {"initial_lr": "learning_rate", "weight_decay": "weight_decay", "betas": "betas", "eps": "eps"}
_NORM = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


class OptimizerSettings(Protocol):
    """The fields of `TrainingArguments` that describe an optimizer."""

    optim: str
    optim_args: str | None
    learning_rate: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_steps: int

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """The steps of the warmup, out of all steps of the training."""
        ...


class _OptimizerSpec(NamedTuple):
    """Where an optimizer class is, and what its constructor takes besides the learning rate and weight decay."""

    module: str
    name: str
    adam: bool = False
    lion: bool = False
    extra_betas: tuple[float, ...] = ()
    extra: dict[str, Any] = {}


# The third beta of AdEMAMix, for which TrainingArguments has no field.
_BETA3 = 0.9999
_BNB = "bitsandbytes.optim"
_SCHEDULE_FREE = "schedulefree"
_TABLE: dict[str, _OptimizerSpec] = {
    "adamw_torch": _OptimizerSpec("torch.optim", "AdamW", adam=True, extra={"fused": False}),
    "adamw_torch_fused": _OptimizerSpec("torch.optim", "AdamW", adam=True),
    "adam": _OptimizerSpec("torch.optim", "Adam", adam=True),
    "adafactor": _OptimizerSpec("torch.optim", "Adafactor"),
    "sgd": _OptimizerSpec("torch.optim", "SGD"),
    "adagrad": _OptimizerSpec("torch.optim", "Adagrad"),
    "rmsprop": _OptimizerSpec("torch.optim", "RMSprop"),
    "radam": _OptimizerSpec("torch.optim", "RAdam", adam=True),
    "nadam": _OptimizerSpec("torch.optim", "NAdam", adam=True),
    "adamax": _OptimizerSpec("torch.optim", "Adamax", adam=True),
    "adadelta": _OptimizerSpec("torch.optim", "Adadelta"),
    "muon": _OptimizerSpec("paceline.trainer.optim.muon", "MuonAdamW", adam=True),
    "adamw_bnb_8bit": _OptimizerSpec(_BNB, "AdamW8bit", adam=True),
    "adamw_8bit": _OptimizerSpec(_BNB, "AdamW8bit", adam=True),
    "paged_adamw_32bit": _OptimizerSpec(_BNB, "PagedAdamW32bit", adam=True),
    "paged_adamw_8bit": _OptimizerSpec(_BNB, "PagedAdamW8bit", adam=True),
    "ademamix": _OptimizerSpec(_BNB, "AdEMAMix", adam=True, extra_betas=(_BETA3,)),
    "ademamix_8bit": _OptimizerSpec(_BNB, "AdEMAMix8bit", adam=True, extra_betas=(_BETA3,)),
    "paged_ademamix_32bit": _OptimizerSpec(_BNB, "PagedAdEMAMix32bit", adam=True, extra_betas=(_BETA3,)),
    "paged_ademamix_8bit": _OptimizerSpec(_BNB, "PagedAdEMAMix8bit", adam=True, extra_betas=(_BETA3,)),
    "lion_8bit": _OptimizerSpec(_BNB, "Lion8bit", lion=True),
    "lion_32bit": _OptimizerSpec(_BNB, "Lion", lion=True),
    "paged_lion_32bit": _OptimizerSpec(_BNB, "PagedLion32bit", lion=True),
    "paged_lion_8bit": _OptimizerSpec(_BNB, "PagedLion8bit", lion=True),
    "rmsprop_bnb": _OptimizerSpec(_BNB, "RMSprop"),
    "rmsprop_bnb_8bit": _OptimizerSpec(_BNB, "RMSprop8bit"),
    "rmsprop_bnb_32bit": _OptimizerSpec(_BNB, "RMSprop32bit"),
    "schedule_free_adamw": _OptimizerSpec(_SCHEDULE_FREE, "AdamWScheduleFree", adam=True),
    "schedule_free_radam": _OptimizerSpec(_SCHEDULE_FREE, "RAdamScheduleFree", adam=True),
    "schedule_free_sgd": _OptimizerSpec(_SCHEDULE_FREE, "SGDScheduleFree"),
    "adamw_torch_8bit": _OptimizerSpec("torchao.optim", "AdamW8bit", adam=True),
    "adamw_torch_4bit": _OptimizerSpec("torchao.optim", "AdamW4bit", adam=True),
    "adamw_torch_fp8": _OptimizerSpec("torchao.optim", "AdamWFp8", adam=True),
}
_PURPOSES = {"bitsandbytes": "bitsandbytes", "schedulefree": "schedulefree", "torchao": "torchao"}


def known_optimizers() -> Iterator[str]:
    """The values that `optim` may have."""
    yield from _TABLE


def class_name(optim: str) -> str:
    """The name of the class that a value of `optim` stands for."""
    return _TABLE[optim].name


def optimizer_class(args: OptimizerSettings, device: torch.device) -> tuple[type[Any], dict[str, Any]]:
    """The optimizer's class and its keyword arguments, without the parameters.

    Raises:
        MissingExtraError: The package that provides it is not installed.
        ConfigError: `optim_args` cannot be parsed.
    """
    spec = _TABLE[args.optim]
    cls = _load(spec, args.optim)
    arguments: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if spec.adam or spec.lion:
        arguments["betas"] = (args.adam_beta1, args.adam_beta2, *spec.extra_betas)
    if spec.adam:
        arguments["eps"] = args.adam_epsilon
    if args.optim == "adamw_torch_fused":
        arguments["fused"] = device.type in ("cpu", "cuda", "mps", "xpu")
    if args.optim in SELF_WARMING:
        arguments["warmup_steps"] = args.get_warmup_steps(max(1, args.max_steps))
    return cls, {**arguments, **spec.extra, **read_arguments(args.optim_args)}


def build_optimizer(
    cls: type[Any], groups: list[dict[str, Any]], arguments: dict[str, Any], args: OptimizerSettings
) -> Any:
    """Construct the optimizer.

    Raises:
        ConfigError: `optim_args` names a parameter that the class does not have.
    """
    parameters = inspect.signature(cls).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in read_arguments(args.optim_args) if name not in parameters and not takes_any]
    if unknown:
        raise ConfigError(
            field_problem("optim_args", f"{cls.__name__} has no argument {name}", hint=did_you_mean(name, parameters))
            for name in unknown
        )
    return cls(groups, **arguments)


def _load(spec: _OptimizerSpec, name: str) -> type[Any]:
    package = spec.module.partition(".")[0]
    try:
        module = import_module(spec.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(package, _PURPOSES[package], f"optim={name!r}") from error
    cls: type[Any] | None = getattr(module, spec.name, None)
    if cls is None:
        version = getattr(import_module(package), "__version__", "")
        raise field_error("optim", f"{name!r} is not in {package} {version}", hint="install a newer release")
    return cls


def read_arguments(text: str | None) -> dict[str, Any]:
    """Parse comma-separated `key=value` pairs; numbers and booleans are converted.

    Raises:
        ConfigError: A part is not such a pair.
    """
    if not text:
        return {}
    arguments: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals:
            raise field_error("optim_args", f"{part.strip()!r} is not key=value")
        arguments[key.strip()] = _literal(value.strip())
    return arguments


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
    """Names of the parameters that get weight decay: not in a norm layer, and not called bias or norm."""
    norms = tuple(getattr(nn, name) for name in ("LayerNorm", "RMSNorm", "GroupNorm") if hasattr(nn, name))
    in_norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, norms)
        for name, _ in module.named_parameters(recurse=False)
    }
    names = (name for name, _ in model.named_parameters())
    return [name for name in names if name not in in_norms and not _NORM.search(name.lower())]


def parameter_groups(model: nn.Module, names: list[str], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay; an empty one is left out."""
    decaying = set(names)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in decaying], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """For each parameter group, its settings that come from the arguments, under the arguments' names."""
    groups = optimizer.param_groups
    return [{name: group[key] for key, name in _FROM_ARGUMENTS.items() if key in group} for group in groups]


def differences(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """Settings whose values differ between two lists of groups, as (before, after)."""
    return {
        name: (old[name], new[name])
        for old, new in zip(before, after, strict=False)
        for name in sorted(old.keys() & new.keys())
        if np.not_equal(old[name], new[name]).any()
    }
