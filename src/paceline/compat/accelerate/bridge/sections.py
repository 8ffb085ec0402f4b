"""Settings of Accelerate's kind, as the core's frozen sections."""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Any

from paceline import config
from paceline.compat.accelerate.settings.enums import DynamoBackend
from paceline.compat.accelerate.settings.errors import InvalidValueError, UnsupportedError, WrongTypeError
from paceline.compat.accelerate.settings.handlers import (
    AORecipeKwargs,
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
    ProfileKwargs,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from paceline.compat.accelerate.parallelism_config import ParallelismConfig
    from paceline.compat.accelerate.settings.deepspeed import DeepSpeedPlugin
    from paceline.compat.accelerate.settings.fsdp import FullyShardedDataParallelPlugin
    from paceline.compat.accelerate.settings.plugins import GradientAccumulationPlugin, TorchDynamoPlugin

__all__ = [
    "accumulation_section",
    "autocast_section",
    "by_kind",
    "core_handlers",
    "deepspeed_section",
    "dynamo_section",
    "fsdp_section",
    "mesh_section",
]

_LOG = logging.getLogger("accelerate.accelerator")
_KINDS = (
    AORecipeKwargs,
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
)


def by_kind(handlers: Iterable[Any] | None) -> dict[type, Any]:
    """Sort `kwargs_handlers` by their kind.

    Raises:
        WrongTypeError: An object that is no handler.
        InvalidValueError: Two of one kind.
    """
    sorted_: dict[type, Any] = {}
    for handler in handlers or ():
        kind = next((known for known in _KINDS if isinstance(handler, known)), None)
        if kind is None:
            wrong = "a handler of another feature" if isinstance(handler, KwargsHandler) else "no handler"
            raise WrongTypeError(
                f"kwargs_handlers has a {type(handler).__name__}",
                f"It is {wrong}",
                f"Pass objects of {', '.join(known.__name__ for known in _KINDS)}",
            )
        if kind in sorted_:
            raise InvalidValueError(
                f"kwargs_handlers has two {kind.__name__}", "Only one of them could be used", "Keep one"
            )
        sorted_[kind] = handler
    return sorted_


def core_handlers(handlers: dict[type, Any], strategy: str) -> Iterator[object]:
    """Yield the core's handlers. The process group is open, and the profiler is made when it is used.

    Args:
        handlers: By their class.
        strategy: The core's.
    """
    ddp = handlers.get(DistributedDataParallelKwargs)
    if ddp is not None:
        values = {name: value for name, value in vars(ddp).items() if not name.startswith("_")}
        values["comm_hook"], values["comm_wrapper"] = str(ddp.comm_hook), str(ddp.comm_wrapper)
        yield config.DistributedDataParallelKwargs(**values)
    elif strategy == "ddp":
        # Accelerate's default: a program may keep gradients over a step.
        yield config.DistributedDataParallelKwargs(gradient_as_bucket_view=False)
    scaler = handlers.get(GradScalerKwargs)
    if scaler is not None:
        yield config.GradScalerKwargs(**vars(scaler))
    autocast = handlers.get(AutocastKwargs)
    if autocast is not None:
        yield autocast_section(autocast)


def autocast_section(handler: AutocastKwargs) -> config.AutocastKwargs:
    """The settings of autocast."""
    return config.AutocastKwargs(**vars(handler))


def accumulation_section(plugin: GradientAccumulationPlugin | None) -> config.GradientAccumulationPlugin | None:
    """The settings of accumulation; whether schedulers count micro-batches is the scheduler's."""
    if plugin is None:
        return None
    return config.GradientAccumulationPlugin(
        num_steps=plugin.num_steps or 1,
        sync_with_dataloader=plugin.sync_with_dataloader,
        sync_each_batch=plugin.sync_each_batch,
    )


def dynamo_section(plugin: TorchDynamoPlugin | None) -> config.TorchDynamoPlugin | None:
    """The settings of torch.compile; None where those of the launcher's configuration hold.

    Without any, nothing is compiled, as Accelerate does it: paceline's own default compiles on a GPU.
    """
    if plugin is None or plugin.backend == DynamoBackend.NO:
        configured = config.worker_config(os.environ).origin("dynamo_config.dynamo_backend").is_explicit
        return None if configured else config.TorchDynamoPlugin(backend="no")
    values = {name: value for name, value in vars(plugin).items() if value is not None}
    return config.TorchDynamoPlugin(**{**values, "backend": plugin.backend.value.lower()})


def check_sequences(sizes: ParallelismConfig | None, strategy: str) -> None:
    """Check that the run can divide sequences over ranks, if it is to.

    Args:
        sizes: Of the mesh.
        strategy: The core's.

    Raises:
        UnsupportedError: It cannot.
    """
    if sizes is None:
        return
    if sizes.cp_size > 1:
        raise UnsupportedError(
            f"cp_size is {sizes.cp_size}",
            "Ring attention is not supported through the switch",
            "Set cp_size to 1; DeepSpeed divides sequences with sp_size",
        )
    if sizes.sp_size > 1 and strategy != "deepspeed":
        raise UnsupportedError(
            f"sp_size is {sizes.sp_size}, and the run does not use DeepSpeed",
            "Ulysses attention is DeepSpeed's",
            "Set sp_size to 1, or train with DeepSpeed",
        )


def mesh_section(sizes: ParallelismConfig | None) -> config.ParallelismConfig | None:
    """The sizes of the mesh over which the core shards; None where a model brings its own placement."""
    if sizes is None or sizes.tp_size > 1:
        return None
    return config.ParallelismConfig(dp_replicate_size=sizes.dp_replicate_size, dp_shard_size=sizes.dp_shard_size)


# DeepSpeed


def deepspeed_section(plugin: DeepSpeedPlugin) -> config.DeepSpeedPlugin:
    """The settings of DeepSpeed: its configuration as the plugin holds it now."""
    settings = _without_open_ends(plugin.deepspeed_config)
    _mend_stage(settings.get("zero_optimization", {}))
    # The run's own: the launcher's or the program's number of micro-batches, and no progress of DeepSpeed's.
    for key in ("gradient_accumulation_steps", "steps_per_print"):
        settings.pop(key, None)
    section: dict[str, Any] = {"hf_ds_config": settings}
    if settings.get("zero_optimization", {}).get("stage") == 3:
        section["zero3_init_flag"] = bool(plugin.zero3_init_flag)
    if plugin.transformer_moe_cls_names:
        section["transformer_moe_cls_names"] = tuple(plugin.transformer_moe_cls_names.split(","))
    return config.DeepSpeedPlugin(**section)


def _mend_stage(zero: dict[str, Any]) -> None:
    """Read a stage that is written as text, and leave out what it does not have."""
    stage = str(zero.get("stage", "")).removeprefix("zero")
    if stage.isdigit():
        zero["stage"] = int(stage)
    if zero.get("stage") in (0, 1, 2) and zero.pop("offload_param", None) is not None:
        _LOG.warning("offload_param_device has no effect: ZeRO stage %s keeps whole parameters.", stage)


def _without_open_ends(settings: Any) -> Any:
    """A copy without values that stand for "not set"."""
    if not isinstance(settings, dict):
        return settings
    copied = {key: _without_open_ends(value) for key, value in settings.items() if value is not None}
    zero = copied.get("zero_optimization")
    if isinstance(zero, dict):
        for part in ("offload_optimizer", "offload_param"):
            if isinstance(zero.get(part), dict) and zero[part].get("device") in (None, "none"):
                del zero[part]
    return copied


# FSDP


def fsdp_section(
    plugin: FullyShardedDataParallelPlugin, model: nn.Module | None = None
) -> config.FullyShardedDataParallelPlugin:
    """The settings of FSDP2, also for a plugin of version 1, whose meaning version 2 has other names for.

    Args:
        plugin: As it is now: programs change it after they made the Accelerator.
        model: What is about to be prepared, for settings that name its modules; None while there is none.

    Raises:
        UnsupportedError: Version 2 has nothing like it.
    """
    values: dict[str, Any] = {
        "reshard_after_forward": _resharding(plugin),
        "cpu_offload": _offloads(plugin.cpu_offload),
        "state_dict_type": plugin.state_dict_type.name,
        "cpu_ram_efficient_loading": True,
        "activation_checkpointing": bool(plugin.activation_checkpointing),
        "activation_checkpointing_offload": bool(plugin.activation_checkpointing_offload),
        **_wrapping(plugin, model),
        **_dtypes(plugin.mixed_precision_policy),
    }
    pattern = _ignored(plugin.ignored_modules, model)
    if pattern is not None:
        values["ignored_modules"] = pattern
    return config.FullyShardedDataParallelPlugin(**values)


def _resharding(plugin: FullyShardedDataParallelPlugin) -> bool:
    if plugin.fsdp_version == 2:
        return plugin.reshard_after_forward is not False
    name = getattr(plugin.sharding_strategy, "name", str(plugin.sharding_strategy))
    if name not in ("FULL_SHARD", "SHARD_GRAD_OP"):
        raise UnsupportedError(
            f"sharding_strategy is {name}",
            "paceline shards with FSDP2, which has no such strategy",
            "Use FULL_SHARD or SHARD_GRAD_OP; for replicas of shards pass a ParallelismConfig; or train with DDP",
        )
    return name == "FULL_SHARD"


def _offloads(policy: Any) -> bool:
    if hasattr(policy, "offload_params"):
        return bool(policy.offload_params)
    return type(policy).__name__ == "CPUOffloadPolicy"


def _dtypes(policy: Any) -> dict[str, str]:
    """The dtypes of parameters and of the reduction. That of the output is left to the forward, as under autocast."""
    from paceline.strategies.precision import short_dtype

    names = {"param_dtype": getattr(policy, "param_dtype", None), "reduce_dtype": getattr(policy, "reduce_dtype", None)}
    return {name: short_dtype(dtype) for name, dtype in names.items() if dtype is not None}


def _wrapping(plugin: FullyShardedDataParallelPlugin, model: nn.Module | None) -> dict[str, Any]:
    """Which modules become units: classes by name, or a size."""
    policy = plugin.auto_wrap_policy
    if policy is None:
        return {"auto_wrap_policy": "NO_WRAP"}
    function = getattr(policy, "func", policy)
    if getattr(function, "__name__", "") == "size_based_auto_wrap_policy":
        least = getattr(policy, "keywords", {}).get("min_num_params", plugin.min_num_params)
        return {"auto_wrap_policy": "SIZE_BASED_WRAP", **({"min_num_params": least} if least else {})}
    names = sorted(cls.__name__ for cls in _wrapped_classes(policy)) or list(plugin.transformer_cls_names_to_wrap or ())
    if model is not None:
        names = _present_classes(names, model)
    if not names:
        return {}
    return {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_cls_names_to_wrap": tuple(names)}


def _present_classes(names: list[str], model: nn.Module) -> list[str]:
    """The classes, or those that the model names itself; a family may name some that this one does not have."""
    names = names or list(getattr(model, "_no_split_modules", None) or ())
    present = {type(module).__name__ for module in model.modules()}
    return [name for name in names if name in present] or names


def _wrapped_classes(policy: Any) -> set[type]:
    """The classes in a policy of torch, which may be made of several."""
    keywords = getattr(policy, "keywords", {})
    found = set(keywords.get("transformer_layer_cls", ()))
    for part in keywords.get("policies", ()):
        found |= _wrapped_classes(part)
    return found


def _ignored(modules: Any, model: nn.Module | None) -> str | None:
    """A pattern for the modules that stay whole."""
    if modules is None or isinstance(modules, str):
        return modules
    if model is None:
        return None
    wanted = {id(module) for module in modules}
    names = [re.escape(name) for name, module in model.named_modules() if id(module) in wanted]
    return "|".join(names) if names else None
