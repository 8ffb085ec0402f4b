"""Prepares everything that a DeepSpeed engine is built from: package, configuration, model, optimizer, schedule."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import logging
import os
import re
import shutil
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from paceline.config.deepspeed_file.settings import AUTO, value_at, without_removed
from paceline.environment.logging import get_logger
from paceline.errors import PrepareError, named
from paceline.strategies.placeholders import DummyOptim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from paceline.collectives import Group
    from paceline.config import DeepSpeedPlugin
    from paceline.strategies.context import RunContext
    from paceline.strategies.deepspeed.engine import ZeroEngine

_MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
_COMPILED = {"adam", "adamw", "lamb", "lion"}
# Their updates depend on the shape of a weight or on its norm.
_NEED_WHOLE = {"adafactor", "muon", "muonadamw", "lamb", "fusedlamb", "lars", "shampoo", "soap"}
_GATHERED_BY_DEEPSPEED = {"muon"}

_LOG = get_logger(__name__)


# The package


def prepare_package() -> None:
    """Keep DeepSpeed from compiling an unneeded operation, and from logging its configuration."""
    import deepspeed

    # On a CPU its first use compiles shared-memory collectives with g++, for two minutes; gloo's are enough.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    if logger.level in (logging.NOTSET, logging.INFO):
        logger.setLevel(logging.WARNING)


def name_ranks() -> None:
    """Set the variables that DeepSpeed reads in the middle of training, in a process without a launcher.

    These are the only variables that paceline writes: DeepSpeed takes its ranks from nowhere else.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")


# Its configuration


def engine_settings(
    settings: Mapping[str, Any], stage: int, world_size: int, *, builds_optimizer: bool
) -> dict[str, Any]:
    """The configuration for the engine itself, in which paceline's part of the work is switched off."""
    config = copy.deepcopy(without_removed(settings))
    config["train_batch_size"] = config["train_micro_batch_size_per_gpu"] * world_size
    config["gradient_accumulation_steps"] = 1
    if value_at(config, "zero_optimization.offload_optimizer.device") != "nvme":
        # The backward writes gradients to NVMe, where only the engine can clip them.
        config["gradient_clipping"] = 0.0
    config.pop("scheduler", None)
    if not builds_optimizer:
        config.pop("optimizer", None)
    if stage == 0:
        # fp32 parameters under autocast, as under DDP.
        config.pop("bf16", None)
        config.pop("fp16", None)
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = stage
    accumulates = config.get("data_types", {}).get("grad_accum_dtype")
    if stage in (1, 2) and not zero.get("offload_optimizer") and accumulates is None:
        # clip_grad_norm_ computes the norm itself.
        zero.setdefault("compute_grad_norm", False)
    # The throughput timer waits for the device in every step.
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    return config


def early_settings(plugin: DeepSpeedPlugin, precision: str) -> dict[str, Any]:
    """The configuration that is known before there is a model, for building it sharded."""
    # "auto" follows from the model, and building one needs nothing of the optimizer.
    section = plugin.zero_section().items()
    zero = {key: value for key, value in section if value != AUTO and key != "offload_optimizer"} | {"stage": 3}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    exact = value_at(plugin.settings, "data_types.keep_in_fp32_modules")
    if exact is not None:
        config["data_types"] = {"keep_in_fp32_modules": exact}
    if precision in ("bf16", "fp16"):
        config[precision] = {"enabled": True}
    return config


def check_compiler(settings: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Check for a compiler before DeepSpeed compiles an optimizer.

    Raises:
        PrepareError: The configuration describes DeepSpeed's own optimizer and there is no compiler.
    """
    section = settings.get("optimizer") if isinstance(optimizer, DummyOptim) else None
    if section is None or section["params"].get("torch_adam"):
        return
    kind = section["type"]
    offloads = value_at(settings, "zero_optimization.offload_optimizer.device") in ("cpu", "nvme")
    if kind.lower() not in _COMPILED and not (kind.lower() == "adagrad" and offloads):
        return
    _check_architectures(kind)
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        raise PrepareError(
            f"The DeepSpeed configuration describes DeepSpeed's own {kind}, and {' and '.join(missing)} is not on PATH",
            "DeepSpeed compiles that optimizer when it is first used",
            'Install them, write "torch_adam": true into optimizer.params, or pass an optimizer of torch',
        )


def check_elementwise(settings: Mapping[str, Any], optimizer: Optimizer, *, refuses: bool) -> None:
    """Check that an optimizer may be given pieces of weights, as from ZeRO stage 1 on.

    Args:
        settings: DeepSpeed's configuration.
        optimizer: The script's own, or a placeholder.
        refuses: Whether one that needs whole weights is an error; else it gets a warning, as do unknown ones.

    Raises:
        PrepareError: It needs whole weights.
    """
    is_placeholder = isinstance(optimizer, DummyOptim)
    name = settings.get("optimizer", {}).get("type", "") if is_placeholder else type(optimizer).__name__
    needs_whole = name.lower() in (_NEED_WHOLE - _GATHERED_BY_DEEPSPEED if is_placeholder else _NEED_WHOLE)
    saw = f"{name} was prepared under ZeRO, which cuts weights into flat pieces"
    if needs_whole and refuses:
        raise PrepareError(
            saw,
            "It computes with the rows, columns or norm of a whole weight, so its steps would be wrong",
            "Use strategy='ddp' or 'fsdp', zero_stage 0, or an optimizer that updates each element on its own",
        )
    is_known = is_placeholder or type(optimizer).step.__module__.startswith(("torch.optim.", "deepspeed."))
    if needs_whole or not is_known:
        _LOG.warning(
            "%s: its steps are wrong if it computes with the shape or the norm of a whole weight, and right if it "
            "updates each element on its own",
            saw,
        )


def check_disk(settings: Mapping[str, Any]) -> None:
    """Check for libaio before DeepSpeed compiles the operation that reads and writes NVMe.

    Raises:
        PrepareError: The configuration offloads to NVMe, and this machine cannot compile for it.
    """
    zero = settings["zero_optimization"]
    parts = [part for part in ("optimizer", "param") if zero.get(f"offload_{part}", {}).get("device") == "nvme"]
    if not parts:
        return
    _check_architectures("async_io")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    with warnings.catch_warnings():
        # The check compiles with distutils, which warns about itself.
        warnings.simplefilter("ignore")
        fits = AsyncIOBuilder().is_compatible(verbose=False)
    if not fits:
        raise PrepareError(
            f"offload_{parts[0]}_device is nvme",
            "DeepSpeed compiles its operation async_io for that, and the headers or the library libaio are missing",
            "Install libaio-dev (Debian) or libaio-devel (Fedora), or offload to cpu",
        )


def check_activations(settings: Mapping[str, Any], device: torch.device) -> None:
    """Check that activations can be moved to host memory.

    Raises:
        PrepareError: `cpu_checkpointing` is on and the run computes on the CPU.
    """
    if device.type == "cpu" and settings.get("activation_checkpointing", {}).get("cpu_checkpointing"):
        raise PrepareError(
            "activation_checkpointing.cpu_checkpointing is true, and this run computes on the CPU",
            "DeepSpeed empties an activation once it is copied to the CPU, and here the copy is the activation itself",
            "Remove cpu_checkpointing, or run on an accelerator",
        )


def _check_architectures(operation: str) -> None:
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if torch.cuda.is_available() and re.search(r"\d[a-z]", listed):
        raise PrepareError(
            f"TORCH_CUDA_ARCH_LIST is {listed!r}, and DeepSpeed must compile {operation}",
            "DeepSpeed parses plain numbers there, and fails on an architecture with a letter",
            f"Set TORCH_CUDA_ARCH_LIST={re.sub('[a-z]', '', listed)!r} for this run, or unset it",
        )


def check_monitors(settings: Mapping[str, Any]) -> None:
    """Check on every rank for the packages of enabled monitors, which only rank 0 would import.

    Raises:
        PrepareError: Some are missing.
    """
    enabled = [kind for kind in _MONITORS if value_at(settings, f"{kind}.enabled") is True]
    missing = [kind for kind in enabled if importlib.util.find_spec(_MONITORS[kind]) is None]
    if missing:
        packages = " ".join(_MONITORS[kind] for kind in missing)
        raise PrepareError(
            f"{named(missing)} is enabled in the DeepSpeed configuration",
            f"The package {packages} is not installed",
            f"Run: pip install {packages}; or remove the section",
        )


def configure_checkpointing(settings: Mapping[str, Any]) -> None:
    """Pass the `activation_checkpointing` section on to `deepspeed.checkpointing`, which models call directly."""
    import deepspeed

    section = settings.get("activation_checkpointing")
    if section:
        deepspeed.checkpointing.configure(
            None,
            partition_activations=section.get("partition_activations"),
            contiguous_checkpointing=section.get("contiguous_memory_optimization"),
            num_checkpoints=section.get("number_checkpoints"),
            checkpoint_in_cpu=section.get("cpu_checkpointing"),
            synchronize=section.get("synchronize_checkpoint_boundary"),
            profile=section.get("profile"),
        )


# Model, optimizer and schedule


@contextmanager
def as_bytes(model: nn.Module, stage: int, group: Group) -> Iterator[None]:
    """Let the engine broadcast rank 0's values as bytes, for which tensors need a dimension and contiguous memory.

    For stage 3, parameters of shape [] get a dimension while the engine is built. For the other stages their values
    are broadcast here, under a mark that makes the engine skip them.
    """
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    scalars = [p for p in model.parameters() if p.ndim == 0 and not hasattr(p, "ds_id")]
    for parameter in scalars:
        if stage == 3:
            parameter.data = parameter.data.view(1)
        else:
            group.broadcast(parameter.detach())
            parameter.ds_optim_param = True  # type: ignore[attr-defined]
    yield
    for parameter in scalars:
        if stage == 3:
            parameter.ds_shape = torch.Size(())  # type: ignore[attr-defined]
        else:
            del parameter.ds_optim_param  # type: ignore[attr-defined]


def check_dtypes(model: nn.Module) -> None:
    """Refuse dtypes that DeepSpeed cannot train.

    Raises:
        PrepareError: Parameters are complex; it names them.
    """
    complex_ones = [name for name, p in model.named_parameters() if p.is_complex()]
    if complex_ones:
        raise PrepareError(
            f"{named(complex_ones)} of {type(model).__name__} {'is' if len(complex_ones) == 1 else 'are'} complex",
            "DeepSpeed casts all parameters to one real dtype and flattens them into one tensor",
            "Make the parameter real, of shape [..., 2], and use torch.view_as_complex() in the forward, or train "
            "with strategy='ddp'",
        )


def mark_leaves(model: nn.Module, names: Sequence[str]) -> None:
    """Have mixture-of-experts blocks gathered as a whole, since ranks route through different experts.

    Raises:
        PrepareError: The model has no module of such a class.
    """
    classes = {type(module).__name__: type(module) for module in model.modules()}
    missing = [name for name in names if name not in classes]
    if missing:
        raise PrepareError(
            f"deepspeed_moe_layer_cls_names names {named(missing)}",
            f"{type(model).__name__} has no module of that class",
            f"Its classes are {named(sorted(classes), 20)}",
        )
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, [classes[name] for name in names])


def exact_values(model: nn.Module, dtype: torch.dtype | None, *, is_main: bool) -> dict[int, Tensor] | None:
    """Rank 0's fp32 values, which the engine will round to 16 bits; None if nothing is rounded, {} on other ranks."""
    if dtype is None or any(hasattr(p, "ds_id") for p in model.parameters()):
        return None
    if not is_main:
        return {}
    return {id(p): p.detach().cpu() for p in model.parameters() if p.dtype == torch.float32}


@torch.no_grad()
def restore_exact(zero: ZeroEngine, exact: Mapping[int, Tensor] | None, context: RunContext) -> None:
    """Set the optimizer's fp32 values to the model's own, since the engine has initialized them from rounded ones.

    One parameter at a time is whole on the device. Collective: every rank must call it.
    """
    if exact is None:
        return
    device = context.device
    for parameter in zero.model.parameters():
        if zero.dtypes[id(parameter)] != torch.float32 or zero.partitions.slice_of(parameter) is None:
            continue
        shard = zero.partitions.value(parameter)
        known = exact.get(id(parameter))
        whole = torch.empty(shard.numel, device=device) if known is None else known.reshape(-1).to(device)
        context.group.broadcast(whole)
        shard.values.copy_(whole[shard.start : shard.stop])
    zero.partitions.write_back()


@contextmanager
def keeping_adagrad() -> Iterator[None]:
    """Let ZeRO step its own Adagrad, which schedules and checkpoints hold, and not one that it makes in its place.

    Adagrad has a state from the beginning, so DeepSpeed makes another one for its flat tensors: of one group, with the
    default options, whose learning rate nobody changes.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    classes = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    originals = [each.initialize_optimizer_states for each in classes]

    def keeping(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def initialize(zero: Any) -> None:
            own = zero.optimizer
            original(zero)
            if zero.optimizer is not own:
                _move_sums(zero, own)

        return initialize

    for each, original in zip(classes, originals, strict=True):
        each.initialize_optimizer_states = keeping(original)
    try:
        yield
    finally:
        for each, original in zip(classes, originals, strict=True):
            each.initialize_optimizer_states = original


def _move_sums(zero: Any, own: Optimizer) -> None:
    made, zero.optimizer = zero.optimizer, own
    own.state.clear()
    own.state.update(made.state)


def cast_inputs(value: Any, dtype: torch.dtype) -> Any:
    """Cast floating-point tensors in nested inputs to `dtype`; leave everything else unchanged."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(cast_inputs(item, dtype) for item in value)
    if type(value) is dict:
        return {key: cast_inputs(item, dtype) for key, item in value.items()}
    return value


def parameters_in(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def updates_any_of(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer updates any parameter of a model."""
    own = {id(p) for p in model.parameters()}
    return any(id(p) in own for p in parameters_in(optimizer))


def updates_only(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer updates parameters of a model and no others."""
    return {id(p) for p in parameters_in(optimizer)} <= {id(p) for p in model.parameters()}


def as_groups(placeholder: DummyOptim) -> list[dict[str, Any]]:
    """A placeholder's groups with their explicit options; the configuration decides the others."""
    return [
        {"params": group["params"], **explicit}
        for group, explicit in zip(placeholder.param_groups, placeholder.explicit_by_group, strict=True)
    ]


def make_scheduler(section: Mapping[str, Any], optimizer: Optimizer) -> Any:
    """Build the scheduler that a section describes, one of DeepSpeed's or of torch's.

    Raises:
        PrepareError: Its class or one of its arguments is unknown.
    """
    from deepspeed.runtime import lr_schedules

    kind = section["type"]
    scheduler_class = getattr(lr_schedules, kind, None) or getattr(torch.optim.lr_scheduler, kind, None)
    if scheduler_class is None:
        raise PrepareError(
            f"scheduler.type={kind!r} in the DeepSpeed configuration",
            "Neither DeepSpeed nor torch has such a scheduler",
            f"Choose one of {', '.join(lr_schedules.VALID_LR_SCHEDULES)}",
        )
    parameters = section.get("params") or {}
    accepted = list(inspect.signature(scheduler_class).parameters)[1:]
    unknown = [name for name in parameters if name not in accepted]
    if unknown:
        raise PrepareError(
            f"scheduler.params in the DeepSpeed configuration has {named(unknown)}",
            f"{kind} has no such argument",
            f"It takes {named(accepted, 20)}",
        )
    return scheduler_class(optimizer, **parameters)
