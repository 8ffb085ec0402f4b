"""The plugin of DeepSpeed: an `HfDeepSpeedConfig`, and the fields that it is made of."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from paceline.compat.accelerate.settings.deepspeed_file import HfDeepSpeedConfig
from paceline.compat.accelerate.settings.errors import InvalidValueError, UnsupportedError
from paceline.compat.accelerate.settings.fsdp import get_module_class_from_name
from paceline.compat.accelerate.settings.variables import parse_choice_from_env, parse_flag_from_env

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DeepSpeedPlugin"]

_PREFIX = "ACCELERATE_DEEPSPEED_"
# Fields of the plugin, and what they are called in DeepSpeed's configuration.
_KEYS = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
    "zero_stage": "zero_optimization.stage",
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_param_device": "zero_optimization.offload_param.device",
    "offload_param_nvme_path": "zero_optimization.offload_param.nvme_path",
    "offload_optimizer_nvme_path": "zero_optimization.offload_optimizer.nvme_path",
    "zero3_save_16bit_model": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
}
# What a launcher must not set beside a DeepSpeed file, as ACCELERATE_CONFIG_DS_FIELDS lists it.
_SET_BY_FILE = frozenset({*_KEYS, "mixed_precision"})


@dataclass
class DeepSpeedPlugin:
    """How DeepSpeed's ZeRO shards and offloads.

    Fields that are not set come from `ACCELERATE_DEEPSPEED_*`; what `hf_ds_config` sets goes before them.
    """

    hf_ds_config: Any = None
    gradient_accumulation_steps: int | str | None = None
    gradient_clipping: float | str | None = None
    zero_stage: int | None = None
    is_train_batch_min: bool = True
    offload_optimizer_device: str | None = None
    offload_param_device: str | None = None
    offload_optimizer_nvme_path: str | None = None
    offload_param_nvme_path: str | None = None
    zero3_init_flag: bool | None = None
    zero3_save_16bit_model: bool | None = None
    transformer_moe_cls_names: str | None = None
    enable_msamp: bool | None = None
    msamp_opt_level: Literal["O1", "O2"] | None = None

    def __post_init__(self) -> None:
        self._selected = False
        self.dschf: Any = None
        if self.enable_msamp:
            raise UnsupportedError(
                "enable_msamp is set", "paceline does not drive MS-AMP", "Use mixed_precision='bf16'"
            )
        self._read_environment()
        if self.hf_ds_config is None:
            self.hf_ds_config = parse_choice_from_env(f"{_PREFIX}CONFIG_FILE", "none")
        if self.hf_ds_config == "none":
            self.hf_ds_config = HfDeepSpeedConfig(self._own_config())
        else:
            self._merge_file()
        self.deepspeed_config: dict[str, Any] = self.hf_ds_config.config
        # Keeps DeepSpeed from printing its own progress.
        self.deepspeed_config["steps_per_print"] = float("inf")
        is_sharded = self.hf_ds_config.is_zero3()
        if self.zero3_init_flag is None:
            self.zero3_init_flag = parse_flag_from_env(f"{_PREFIX}ZERO3_INIT", is_sharded)
        if self.zero3_init_flag and not is_sharded:
            warnings.warn("zero3_init_flag is switched off: it needs ZeRO stage 3", stacklevel=3)
            self.zero3_init_flag = False

    def _read_environment(self) -> None:
        if self.gradient_accumulation_steps is None:
            steps = parse_choice_from_env("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
            self.gradient_accumulation_steps = int(steps) if steps.isdigit() else steps
        if self.gradient_clipping is None:
            clipping = parse_choice_from_env("ACCELERATE_GRADIENT_CLIPPING", "auto")
            self.gradient_clipping = clipping if clipping == "auto" else float(clipping)
        if self.zero_stage is None:
            self.zero_stage = int(os.environ.get(f"{_PREFIX}ZERO_STAGE", 2))
        for part in ("optimizer", "param"):
            for what in ("device", "nvme_path"):
                name = f"offload_{part}_{what}"
                if getattr(self, name) is None:
                    setattr(self, name, parse_choice_from_env(f"{_PREFIX}{name.upper()}", "none"))
        if self.zero3_save_16bit_model is None:
            self.zero3_save_16bit_model = parse_flag_from_env(f"{_PREFIX}ZERO3_SAVE_16BIT_MODEL")
        self.enable_msamp = False
        self.msamp_opt_level = self.msamp_opt_level or "O1"

    def _own_config(self) -> dict[str, Any]:
        """Return the configuration that the fields amount to, without a file."""
        section: dict[str, Any] = {"stage": self.zero_stage}
        for part in ("optimizer", "param"):
            device = getattr(self, f"offload_{part}_device")
            path = getattr(self, f"offload_{part}_nvme_path") if device == "nvme" else None
            section[f"offload_{part}"] = {"device": device, "nvme_path": path}
        section["stage3_gather_16bit_weights_on_model_save"] = self.zero3_save_16bit_model
        config: dict[str, Any] = {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "zero_optimization": section,
        }
        if self.gradient_clipping:
            config["gradient_clipping"] = self.gradient_clipping
        return config

    def _merge_file(self) -> None:
        """Fill each `auto` of the file from the fields, and set the fields from what the file says."""
        if not isinstance(self.hf_ds_config, HfDeepSpeedConfig):
            self.hf_ds_config = HfDeepSpeedConfig(self.hf_ds_config)
        config = self.hf_ds_config.config
        config.setdefault("gradient_accumulation_steps", 1)
        if "zero_optimization" not in config:
            raise InvalidValueError(
                "DeepSpeed's configuration has no section zero_optimization",
                "It says how the state is sharded",
                'Add it, for example {"zero_optimization": {"stage": 2}}',
            )
        self._check_launcher()
        values = {key: getattr(self, field) for field, key in _KEYS.items() if getattr(self, field) is not None}
        for key in values:
            self.fill_match(key, must_match=False, **values)
        self.hf_ds_config.set_stage_and_offload()
        for field, key in _KEYS.items():
            value = self.hf_ds_config.get_value(key)
            if value not in (None, "auto"):
                setattr(self, field, value)

    @staticmethod
    def _check_launcher() -> None:
        given = set(os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(","))
        if both := sorted(given & _SET_BY_FILE):
            raise InvalidValueError(
                f"The launcher's configuration sets {', '.join(both)} beside a DeepSpeed file",
                "The file alone decides these",
                "Set them in DeepSpeed's file, and remove them from the other",
            )

    def fill_match(
        self, ds_key_long: str, mismatches: list[str] | None = None, must_match: bool = True, **kwargs: Any
    ) -> None:
        """Replace an `auto` of the configuration, or compare a value with the argument.

        Args:
            ds_key_long: The dotted key.
            mismatches: Gets a line for a value that differs.
            must_match: Whether to compare.
            **kwargs: Values by dotted key.

        Raises:
            InvalidValueError: The key is `auto`, and there is no value for it.
        """
        node, key = self.hf_ds_config.find_config_node(ds_key_long)
        if node is None:
            return
        present = node.get(key)
        if present == "auto":
            if ds_key_long not in kwargs:
                raise InvalidValueError(
                    f"{ds_key_long} is auto in DeepSpeed's configuration",
                    "Nothing here says what it should be",
                    "Write a value in its place, or pass it",
                )
            node[key] = kwargs[ds_key_long]
        elif must_match and mismatches is not None and present not in (None, kwargs.get(ds_key_long, present)):
            mismatches.append(f"{ds_key_long}: {present} in the file, {kwargs[ds_key_long]} in the script")

    def is_auto(self, ds_key_long: str) -> bool:
        """Whether a dotted key is `auto`."""
        return bool(self.get_value(ds_key_long) == "auto")

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """Return the value of a dotted key, or the default."""
        return self.hf_ds_config.get_value(ds_key_long, default)

    def deepspeed_config_process(
        self,
        prefix: str = "",
        mismatches: list[str] | None = None,
        config: dict[str, Any] | None = None,
        must_match: bool = True,
        **kwargs: Any,
    ) -> None:
        """Fill every `auto` of the configuration, and compare the rest.

        Args:
            prefix: Where `config` lies, as a dotted key with a dot at the end.
            mismatches: Gets a line for each value that differs.
            config: The section to process; None for all of it.
            must_match: Whether to compare.
            **kwargs: Values by dotted key.

        Raises:
            InvalidValueError: Values differ, or an `auto` has no value.
        """
        found = [] if mismatches is None else mismatches
        for key, value in list((self.deepspeed_config if config is None else config).items()):
            if isinstance(value, dict):
                self.deepspeed_config_process(f"{prefix}{key}.", found, value, must_match, **kwargs)
            else:
                self.fill_match(f"{prefix}{key}", found, must_match=must_match, **kwargs)
        if found and not prefix:
            raise InvalidValueError(
                f"DeepSpeed's configuration contradicts the script: {'; '.join(found)}",
                "Both cannot hold",
                "Change one of them, or write auto in the configuration",
            )

    def set_mixed_precision(self, mixed_precision: str) -> None:
        """Switch on DeepSpeed's fp16 or bf16, where the configuration leaves it open.

        Raises:
            InvalidValueError: The configuration switches on the other one.
        """
        config = self.deepspeed_config
        chosen = {"fp16": "fp16", "bf16": "bf16", "fp8": "bf16"}.get(mixed_precision)
        if chosen is not None:
            other = "bf16" if chosen == "fp16" else "fp16"
            if str(config.get(other, {}).get("enabled")).lower() == "true":
                raise InvalidValueError(
                    f"mixed_precision is {mixed_precision}, and DeepSpeed's configuration enables {other}",
                    "A run has one precision",
                    "Remove one of them",
                )
            config.setdefault(chosen, {"enabled": True, **({"auto_cast": True} if chosen == "fp16" else {})})
        for dtype in ("fp16", "bf16"):
            config.setdefault(dtype, {"enabled": False})
            value: dict[str, Any] = {f"{dtype}.enabled": dtype == chosen}
            self.fill_match(f"{dtype}.enabled", must_match=False, **value)

    def set_deepspeed_weakref(self) -> None:
        """Tell transformers of the configuration, so that it builds models sharded under ZeRO 3."""
        if find_spec("transformers") is None:
            return
        registry: Any = import_module("transformers.integrations")

        config = copy.deepcopy(self.deepspeed_config)
        for key in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
            if config.get(key, "auto") == "auto":
                config[key] = 1
        if config.get("train_batch_size") == "auto":
            del config["train_batch_size"]
        registry.unset_hf_deepspeed_config()
        # transformers keeps a weak reference only.
        self.dschf = registry.HfDeepSpeedConfig(config)

    def is_zero3_init_enabled(self) -> bool:
        """Whether models are sharded while they are built."""
        return bool(self.zero3_init_flag)

    @contextmanager
    def zero3_init_context_manager(self, enable: bool = False) -> Iterator[None]:
        """Build models sharded, or whole, within the block."""
        before = self.zero3_init_flag
        if before == enable:
            yield
            return
        self._switch_zero3_init(enable)
        try:
            yield
        finally:
            self._switch_zero3_init(bool(before))

    def _switch_zero3_init(self, enable: bool) -> None:
        self.zero3_init_flag = enable
        self.dschf = None
        self.set_deepspeed_weakref()

    def set_moe_leaf_modules(self, model: nn.Module) -> None:
        """Let ZeRO 3 gather each mixture of experts as a whole.

        Raises:
            InvalidValueError: The model has no module of such a class.
        """
        if self.transformer_moe_cls_names is None:
            self.transformer_moe_cls_names = os.environ.get(f"{_PREFIX}MOE_LAYER_CLS_NAMES")
        if self.transformer_moe_cls_names is None:
            return
        from deepspeed.utils import set_z3_leaf_modules

        found = {name: get_module_class_from_name(model, name) for name in self.transformer_moe_cls_names.split(",")}
        if missing := [name for name, kind in found.items() if kind is None]:
            raise InvalidValueError(
                f"transformer_moe_cls_names has {', '.join(missing)}",
                f"{type(model).__name__} contains no module of that class",
                "Check the names",
            )
        set_z3_leaf_modules(model, list(found.values()))

    def select(self, _from_accelerator_state: bool = False) -> None:
        """Make this plugin the active one; `AcceleratorState.select_deepspeed_plugin` calls it.

        Raises:
            InvalidValueError: Somebody else calls it.
        """
        if not _from_accelerator_state:
            raise InvalidValueError(
                "DeepSpeedPlugin.select() was called",
                "The other plugins must be deactivated, too",
                "Call accelerator.state.select_deepspeed_plugin(name)",
            )
        self.set_deepspeed_weakref()
        self._selected = True

    def _unselect(self) -> None:
        self._selected = False

    @property
    def selected(self) -> bool:
        """Whether this plugin is the active one.

        Raises:
            UnsupportedError: It is set directly.
        """
        return self._selected

    @selected.setter
    def selected(self, value: bool) -> None:
        raise UnsupportedError(
            f"selected was set to {value}",
            "The other plugins must be deactivated, too",
            "Call accelerator.state.select_deepspeed_plugin(name)",
        )
