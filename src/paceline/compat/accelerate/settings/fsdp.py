"""The plugin of FSDP, with torch's own objects as values."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from paceline.compat.accelerate.settings.errors import InvalidValueError
from paceline.compat.accelerate.settings.variables import parse_choice_from_env, parse_flag_from_env, str_to_bool

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["FullyShardedDataParallelPlugin", "get_module_class_from_name"]

_LOG = logging.getLogger("accelerate.utils.dataclasses")  # where programs look for these messages
_PREFIX = "FSDP_"
_POLICIES = ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")
_PRECISIONS = {"fp8": "bfloat16", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass
class FullyShardedDataParallelPlugin:
    """How FSDP shards parameters, gradients and optimizer state.

    Fields that are not set come from `FSDP_*`. Names and numbers are replaced by torch's objects: a
    `ShardingStrategy` (version 1), a `StateDictType`, a wrapping function, an offload policy, a precision policy.
    """

    fsdp_version: int | None = None
    sharding_strategy: Any = None
    reshard_after_forward: Any = None
    backward_prefetch: Any = None
    mixed_precision_policy: Any = None
    auto_wrap_policy: Callable[..., Any] | Literal[
        "transformer_based_wrap", "size_based_wrap", "no_wrap"
    ] | None = None  # fmt: skip
    cpu_offload: Any = None
    ignored_modules: Iterable[nn.Module] | str | None = None
    state_dict_type: Any = None
    state_dict_config: Any = None
    optim_state_dict_config: Any = None
    limit_all_gathers: bool = True
    use_orig_params: bool | None = None
    param_init_fn: Callable[[nn.Module], Any] | None = None
    sync_module_states: bool | None = None
    forward_prefetch: bool | None = None
    activation_checkpointing: bool | None = None
    activation_checkpointing_offload: bool | None = None
    cpu_ram_efficient_loading: bool | None = None
    transformer_cls_names_to_wrap: list[str] | None = None
    min_num_params: int | None = None

    def __post_init__(self) -> None:
        if self.fsdp_version is None:
            self.fsdp_version = int(os.environ.get(f"{_PREFIX}VERSION", 1))
        self._read_sharding()
        self._read_offload()
        self._read_prefetch()
        self.set_state_dict_type()
        self._read_wrapping()
        self._read_version_1_flags()
        self._read_checkpointing()
        if self.ignored_modules is None:
            self.ignored_modules = os.environ.get(f"{_PREFIX}IGNORED_MODULES")
        self._read_loading()
        if isinstance(self.mixed_precision_policy, str | dict):
            self.set_mixed_precision(self.mixed_precision_policy, override=True)
        if self.mixed_precision_policy is not None:
            self.validate_mixed_precision_policy()

    # What each field may be, and what it becomes.

    def _read_sharding(self) -> None:
        if self.fsdp_version == 2:
            self._read_resharding()
            return
        if self.sharding_strategy is None:
            self.sharding_strategy = self.reshard_after_forward or os.environ.get(f"{_PREFIX}SHARDING_STRATEGY")
        if self.sharding_strategy is None:
            self.sharding_strategy = parse_choice_from_env(f"{_PREFIX}RESHARD_AFTER_FORWARD", "FULL_SHARD")
        if isinstance(self.sharding_strategy, bool) or isinstance(self.reshard_after_forward, bool):
            raise InvalidValueError(
                f"reshard_after_forward is {self.reshard_after_forward!r} for version 1 of FSDP",
                "Version 1 has named strategies",
                "Set fsdp_version=2, or name a strategy such as FULL_SHARD",
            )
        from torch.distributed.fsdp import ShardingStrategy

        self.sharding_strategy = _member(ShardingStrategy, self.sharding_strategy, "sharding_strategy")
        if isinstance(self.reshard_after_forward, str):
            self.reshard_after_forward = _member(ShardingStrategy, self.reshard_after_forward, "reshard_after_forward")

    def _read_resharding(self) -> None:
        if self.sharding_strategy is not None:
            _LOG.warning("FSDP2 has no sharding_strategy: use reshard_after_forward.")
        if self.reshard_after_forward is None and self.sharding_strategy is None:
            self.reshard_after_forward = parse_choice_from_env(f"{_PREFIX}RESHARD_AFTER_FORWARD", "true")
        if isinstance(self.reshard_after_forward, str):
            self.reshard_after_forward = str_to_bool(self.reshard_after_forward, to_bool=True)
        if not isinstance(self.reshard_after_forward, bool):
            raise InvalidValueError(
                f"reshard_after_forward is {self.reshard_after_forward!r} for FSDP2",
                "FSDP2 frees parameters after forward or keeps them",
                "Pass True or False",
            )

    def _read_offload(self) -> None:
        if self.cpu_offload is None:
            self.cpu_offload = parse_flag_from_env(f"{_PREFIX}OFFLOAD_PARAMS")
        self.set_cpu_offload()
        self.validate_cpu_offload()

    def _read_prefetch(self) -> None:
        if self.backward_prefetch is None:
            self.backward_prefetch = os.environ.get(f"{_PREFIX}BACKWARD_PREFETCH")
        if isinstance(self.backward_prefetch, str) and self.backward_prefetch.upper() == "NO_PREFETCH":
            self.backward_prefetch = None
        if self.backward_prefetch is None:
            return
        if self.fsdp_version == 2:
            _LOG.warning("backward_prefetch has no effect: FSDP2 always prefetches.")
            self.backward_prefetch = None
            return
        from torch.distributed.fsdp import BackwardPrefetch

        self.backward_prefetch = _member(BackwardPrefetch, self.backward_prefetch, "backward_prefetch")

    def _read_wrapping(self) -> None:
        if self.auto_wrap_policy is None:
            self.auto_wrap_policy = parse_choice_from_env(f"{_PREFIX}AUTO_WRAP_POLICY", "NO_WRAP")  # type: ignore[assignment]
        if not isinstance(self.auto_wrap_policy, str):
            return
        from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

        policy = self.auto_wrap_policy.upper()
        if policy == "TRANSFORMER_BASED_WRAP":
            self.auto_wrap_policy = transformer_auto_wrap_policy
            names: Any = self.transformer_cls_names_to_wrap or os.environ.get(f"{_PREFIX}TRANSFORMER_CLS_TO_WRAP")
            self.transformer_cls_names_to_wrap = names.split(",") if isinstance(names, str) else names
        elif policy == "SIZE_BASED_WRAP":
            self.auto_wrap_policy = size_based_auto_wrap_policy
            self._read_min_num_params()
        elif policy == "NO_WRAP":
            self.auto_wrap_policy = None
        else:
            raise InvalidValueError(
                f"auto_wrap_policy is {policy!r}", "There is no such policy", f"Use one of {', '.join(_POLICIES)}"
            )

    def _read_min_num_params(self) -> None:
        if self.min_num_params is None:
            self.min_num_params = int(os.environ.get(f"{_PREFIX}MIN_NUM_PARAMS", 0))
        if not isinstance(self.min_num_params, int):
            raise InvalidValueError(f"min_num_params is {self.min_num_params!r}", "It is a number", "Pass an int")

    def _read_version_1_flags(self) -> None:
        names = ("use_orig_params", "sync_module_states", "forward_prefetch")
        if self.fsdp_version == 1:
            for name in names:
                if getattr(self, name) is None:
                    setattr(self, name, parse_flag_from_env(f"{_PREFIX}{name.upper()}"))
            return
        given = [name for name in names if getattr(self, name) is not None]
        if "forward_prefetch" in given:
            raise InvalidValueError(
                f"forward_prefetch is {self.forward_prefetch} for FSDP2", "FSDP2 has no such switch", "Leave it out"
            )
        if given:
            _LOG.warning("FSDP2 has no %s: the value is ignored.", " and no ".join(given))
        self.use_orig_params = self.sync_module_states = None

    def _read_checkpointing(self) -> None:
        for name in ("activation_checkpointing", "activation_checkpointing_offload"):
            if getattr(self, name) is None:
                setattr(self, name, parse_flag_from_env(f"{_PREFIX}{name.upper()}"))
        if not self.activation_checkpointing_offload:
            return
        if not self.activation_checkpointing or self.fsdp_version != 2:
            raise InvalidValueError(
                f"activation_checkpointing_offload with activation_checkpointing={self.activation_checkpointing} and "
                f"fsdp_version={self.fsdp_version}",
                "It offloads what activation checkpointing stores, under FSDP2",
                "Set activation_checkpointing=True and fsdp_version=2",
            )

    def _read_loading(self) -> None:
        variable = f"{_PREFIX}CPU_RAM_EFFICIENT_LOADING"
        if self.cpu_ram_efficient_loading is None:
            self.cpu_ram_efficient_loading = parse_flag_from_env(variable)
        else:
            # transformers reads it when it loads a model.
            os.environ[variable] = str(self.cpu_ram_efficient_loading)
        if self.fsdp_version == 1 and self.cpu_ram_efficient_loading and not self.sync_module_states:
            _LOG.warning("sync_module_states is switched on, because cpu_ram_efficient_loading needs it.")
            self.sync_module_states = True
        if self.sync_module_states and self.param_init_fn is None:
            import torch

            device = torch.accelerator.current_accelerator() or torch.device("cpu")
            self.param_init_fn = lambda module: module.to_empty(device=device, recurse=False)

    # What programs call.

    def set_state_dict_type(self, state_dict_type: Any = None) -> None:
        """Choose between whole and sharded checkpoints.

        Args:
            state_dict_type: A `StateDictType` or its name; None keeps the present one.
        """
        from torch.distributed.fsdp import (
            FullOptimStateDictConfig,
            FullStateDictConfig,
            ShardedOptimStateDictConfig,
            ShardedStateDictConfig,
            StateDictType,
        )

        chosen = self.state_dict_type if state_dict_type is None else state_dict_type
        if chosen is None:
            default = "FULL_STATE_DICT" if self.fsdp_version == 1 else "SHARDED_STATE_DICT"
            chosen = parse_choice_from_env(f"{_PREFIX}STATE_DICT_TYPE", default)
        self.state_dict_type = _member(StateDictType, chosen, "state_dict_type")
        if self.state_dict_type == StateDictType.FULL_STATE_DICT:
            self.state_dict_config = self.state_dict_config or FullStateDictConfig(offload_to_cpu=True, rank0_only=True)
            self.optim_state_dict_config = self.optim_state_dict_config or FullOptimStateDictConfig(
                offload_to_cpu=True, rank0_only=True
            )
        elif self.state_dict_type == StateDictType.SHARDED_STATE_DICT:
            self.state_dict_config = self.state_dict_config or ShardedStateDictConfig(offload_to_cpu=True)
            self.optim_state_dict_config = self.optim_state_dict_config or ShardedOptimStateDictConfig(
                offload_to_cpu=True
            )
        elif self.fsdp_version == 2:
            raise InvalidValueError(
                "state_dict_type is LOCAL_STATE_DICT for FSDP2",
                "FSDP2 has no local state dicts",
                "Use SHARDED_STATE_DICT or FULL_STATE_DICT",
            )

    def set_auto_wrap_policy(self, model: nn.Module) -> None:
        """Bind the wrapping function to the classes of a model, or to the least size."""
        from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

        if self.auto_wrap_policy == transformer_auto_wrap_policy:
            if self.transformer_cls_names_to_wrap is None:
                self.transformer_cls_names_to_wrap = list(getattr(model, "_no_split_modules", None) or ())
            classes = {_required_class(model, name) for name in self.transformer_cls_names_to_wrap}
            self.auto_wrap_policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
        elif self.auto_wrap_policy == size_based_auto_wrap_policy:
            least = self.min_num_params
            self.auto_wrap_policy = (
                functools.partial(size_based_auto_wrap_policy, min_num_params=least) if least else None
            )

    def set_mixed_precision(
        self,
        mixed_precision: str | torch.dtype | dict[str, Any],
        buffer_autocast: bool = False,
        override: bool = False,
    ) -> None:
        """Set the precision policy, unless there is one.

        Args:
            mixed_precision: fp16, bf16, fp8 (computed in bf16), fp32, a dtype, or the policy's arguments.
            buffer_autocast: Keep buffers in fp32, under version 1.
            override: Replace a policy that is there.
        """
        present = self.mixed_precision_policy
        last = "buffer_dtype" if self.fsdp_version == 1 else "output_dtype"
        if isinstance(mixed_precision, dict) or (isinstance(present, dict) and not override):
            given = mixed_precision if isinstance(mixed_precision, dict) else present
            self.mixed_precision_policy = self._policy_class()(**_checked_dtypes(given, last))
        elif override or present is None:
            dtype = _dtype(mixed_precision)
            import torch

            buffers = torch.float32 if buffer_autocast and last == "buffer_dtype" else dtype
            self.mixed_precision_policy = self._policy_class()(
                **{"param_dtype": dtype, "reduce_dtype": dtype, last: buffers}
            )

    def validate_mixed_precision_policy(self) -> None:
        """Raise `InvalidValueError` unless the precision policy is one of this version."""
        expected = self._policy_class()
        if not isinstance(self.mixed_precision_policy, expected):
            raise InvalidValueError(
                f"mixed_precision_policy is {self.mixed_precision_policy!r}",
                f"Version {self.fsdp_version} of FSDP takes torch.distributed.fsdp.{expected.__name__}",
                "Pass that, or the name of a precision",
            )

    def set_cpu_offload(self) -> None:
        """Replace True and False by torch's policy."""
        from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, OffloadPolicy

        if not isinstance(self.cpu_offload, bool):
            return
        if self.fsdp_version == 1:
            self.cpu_offload = CPUOffload(offload_params=self.cpu_offload)
        else:
            self.cpu_offload = CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy()

    def validate_cpu_offload(self) -> None:
        """Raise `InvalidValueError` unless the offload policy is one of this version."""
        from torch.distributed.fsdp import CPUOffload, OffloadPolicy

        expected: type = CPUOffload if self.fsdp_version == 1 else OffloadPolicy
        if not isinstance(self.cpu_offload, expected):
            raise InvalidValueError(
                f"cpu_offload is {self.cpu_offload!r}",
                f"Version {self.fsdp_version} of FSDP takes torch.distributed.fsdp.{expected.__name__}",
                "Pass that, True or False",
            )

    def _policy_class(self) -> Any:
        from torch.distributed import fsdp

        return fsdp.MixedPrecision if self.fsdp_version == 1 else fsdp.MixedPrecisionPolicy


def _member(kind: Any, value: Any, field: str) -> Any:
    """Return a member of torch's enumeration by itself, its name, or its number as an int or text."""
    if isinstance(value, kind):
        return value
    text = str(value).upper()
    for name in (text, f"_{text}"):  # torch calls one strategy _HYBRID_SHARD_ZERO2
        if name in kind.__members__:
            return kind[name]
    if text.isdigit() and 1 <= int(text) <= len(kind.__members__):
        return kind(int(text))
    raise InvalidValueError(
        f"{field} is {value!r}", f"It is no {kind.__name__}", f"Use one of {', '.join(kind.__members__)}"
    )


def _dtype(precision: str | torch.dtype) -> torch.dtype:
    import torch

    known = {name: getattr(torch, dtype) for name, dtype in _PRECISIONS.items()}
    dtype = known.get(precision) if isinstance(precision, str) else precision
    if dtype not in known.values():
        raise InvalidValueError(
            f"mixed_precision is {precision!r}", "It is no precision of FSDP", f"Use one of {', '.join(known)}"
        )
    assert isinstance(dtype, torch.dtype)
    return dtype


def _checked_dtypes(given: dict[str, Any], last: str) -> dict[str, Any]:
    keys = ("param_dtype", "reduce_dtype", last)
    dtypes = {name: _dtype(value) for name, value in given.items()}
    if missing := [key for key in keys if key not in dtypes]:
        raise InvalidValueError(
            f"mixed_precision_policy has {', '.join(given) or 'no keys'}", f"It lacks {', '.join(missing)}", "Add them"
        )
    return dtypes


def _required_class(model: nn.Module, name: str) -> type[nn.Module]:
    found = get_module_class_from_name(model, name)
    if found is None:
        present = sorted({type(module).__name__ for module in model.modules()})
        raise InvalidValueError(
            f"transformer_cls_names_to_wrap has {name!r}",
            f"{type(model).__name__} contains no module of that class",
            f"Its classes are {', '.join(present)}",
        )
    return found


def get_module_class_from_name(module: nn.Module, name: str) -> type[nn.Module] | None:
    """Return the class of that name in a model, or None.

    Args:
        module: The model.
        name: The name of the class.
    """
    return next((type(each) for each in module.modules() if type(each).__name__ == name), None)
