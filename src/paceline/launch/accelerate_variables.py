"""What Accelerate's own clients read from the environment, written from the resolved configuration.

The Trainer of transformers and scripts that import `accelerate` do not read PACELINE_CONFIG. They read about a hundred
variables, which `accelerate launch` would set. The workers get those that their Accelerate understands; what no
variable says is a problem, and is reported where such a script would use it.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from paceline.config import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from paceline.config.schema.base import settings_of
from paceline.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.config import Resolved
    from paceline.config.schema.base import Section

__all__ = ["Target", "accelerate_variables", "installed_target", "not_carried", "not_sharded"]

_DISTRIBUTION: Final = "accelerate"
_SWITCH: Final = "--as_accelerate"

# Python name in the section: variable. What is missing here has no variable.
_FSDP: Final = {
    "reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD",
    "cpu_offload": "FSDP_OFFLOAD_PARAMS",
    "auto_wrap_policy": "FSDP_AUTO_WRAP_POLICY",
    "transformer_cls_names_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP",
    "min_num_params": "FSDP_MIN_NUM_PARAMS",
    "state_dict_type": "FSDP_STATE_DICT_TYPE",
    "cpu_ram_efficient_loading": "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING",
    "activation_checkpointing_offload": "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD",
    "ignored_modules": "FSDP_IGNORED_MODULES",
    "fsdp_version": "FSDP_VERSION",
}
_DEEPSPEED: Final = {
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "offload_optimizer_nvme_path": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH",
    "offload_param_nvme_path": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    "zero3_init_flag": "ACCELERATE_DEEPSPEED_ZERO3_INIT",
    "zero3_save_16bit_model": "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    "transformer_moe_cls_names": "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES",
}
_DYNAMO: Final = {
    "backend": "ACCELERATE_DYNAMO_BACKEND",
    "mode": "ACCELERATE_DYNAMO_MODE",
    "fullgraph": "ACCELERATE_DYNAMO_USE_FULLGRAPH",
    "dynamic": "ACCELERATE_DYNAMO_USE_DYNAMIC",
    "use_regional_compilation": "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION",
}
_FP8: Final = {
    "backend": "ACCELERATE_FP8_BACKEND",
    "enable_fsdp_float8_all_gather": "ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER",
    "pad_inner_dim": "ACCELERATE_FP8_PAD_INNER_DIM",
}
_SINCE: Final = {
    "FSDP_VERSION": (1, 6),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (1, 15),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": (1, 7),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (1, 10),
}
"""The first version of Accelerate that reads a variable, where it is not an old one."""

# The launcher reads them itself, whatever the script uses.
_BY_THE_LAUNCHER: Final = {
    "deepspeed_config": (
        "deepspeed_multinode_launcher",
        "deepspeed_hostfile",
        "deepspeed_exclusion_filter",
        "deepspeed_inclusion_filter",
    ),
}
_SWITCHES: Final = {
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_USE_DEEPSPEED": "false",
    "ACCELERATE_USE_MEGATRON_LM": "false",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "false",
    "ACCELERATE_USE_CPU": "false",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
}
"""Variables that turn something on, with the value that turns it off."""


@dataclass(frozen=True, slots=True)
class Target:
    """What reads the variables.

    Attributes:
        version: The version of the installed Accelerate; None if there is none.
        has_device: Whether the ranks train on an accelerator.
        world_size: The number of ranks.
    """

    version: str | None
    has_device: bool
    world_size: int

    def reads(self, variable: str) -> bool:
        """Whether the installed version knows a variable."""
        numbers = tuple(int(part) for part in re.findall(r"\d+", self.version or "")[:2])
        return numbers >= _SINCE.get(variable, (0, 0))


def installed_target(resolved: Resolved, world_size: int, device_type: str | None) -> Target:
    """Describe what reads the variables on this machine.

    Args:
        resolved: The configuration.
        world_size: The number of ranks.
        device_type: torch's name of the accelerator of this machine; None without one.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version(_DISTRIBUTION)
    except PackageNotFoundError:
        installed = None
    return Target(installed, device_type is not None and not resolved.config.use_cpu, world_size)


def accelerate_variables(resolved: Resolved, target: Target, env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for Accelerate's clients; paceline itself reads none of them.

    Args:
        resolved: The configuration.
        target: What reads them.
        env: The environment that the ranks inherit: what it turns on and the configuration does not is turned off.
    """
    if target.version is None and not resolved.config.as_accelerate:
        return {}
    variables = {**_plain_variables(resolved, target), **_strategy_variables(resolved, target)}
    off = {name: value for name, value in _SWITCHES.items() if name in env and name not in variables}
    return {**off, **variables}


def not_carried(resolved: Resolved, target: Target) -> list[Problem]:
    """List the explicit settings that Accelerate would not learn about; none where paceline takes its place."""
    if resolved.config.as_accelerate:
        return []
    return [
        *_unknown_values(resolved),
        *_unknown_sections(resolved),
        *_deepspeed_problems(resolved, target),
        *_too_old(resolved, target),
    ]


def not_sharded(resolved: Resolved, target: Target) -> bool:
    """Whether Accelerate trains whole replicas where the configuration says FSDP: it shards on accelerators only."""
    config = resolved.config
    return config.strategy == "fsdp" and not target.has_device and not config.as_accelerate


def _plain_variables(resolved: Resolved, target: Target) -> dict[str, str]:
    """What does not depend on the strategy."""
    config = resolved.config
    variables: dict[str, str] = {}
    if config.mixed_precision != "no":
        variables["ACCELERATE_MIXED_PRECISION"] = config.mixed_precision
    if config.mixed_precision == "fp8" and config.fp8_config is not None:
        variables.update(_of_section(config.fp8_config, _FP8))
    if resolved.origin("gradient_accumulation_steps").is_explicit:
        variables["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(config.gradient_accumulation_steps)
    if config.debug:
        variables["ACCELERATE_DEBUG_MODE"] = "true"
    # Without it several ranks on a machine without a device would each train on their own, all on the same samples.
    # Under DeepSpeed it would turn DeepSpeed off.
    is_engine = config.strategy == "deepspeed" and not config.as_accelerate
    if not target.has_device and not is_engine and (config.use_cpu or target.world_size > 1):
        variables["ACCELERATE_USE_CPU"] = "true"
    # By default Accelerate compiles nothing.
    if config.dynamo_config.backend not in ("no", "auto"):
        variables.update(_of_section(config.dynamo_config, _DYNAMO))
        variables["ACCELERATE_DYNAMO_BACKEND"] = config.dynamo_config.backend.upper()
    return variables


def _strategy_variables(resolved: Resolved, target: Target) -> dict[str, str]:
    config = resolved.config
    if config.strategy == "deepspeed":
        return _deepspeed_variables(resolved)
    if config.strategy == "fsdp" and not not_sharded(resolved, target):
        return _fsdp_variables(resolved, target)
    return {}


def _fsdp_variables(resolved: Resolved, target: Target) -> dict[str, str]:
    config = resolved.config
    plugin = config.fsdp_config or FullyShardedDataParallelPlugin()
    variables = {"ACCELERATE_USE_FSDP": "true", **_of_section(plugin, _FSDP)}
    # Here an open policy finds the repeated blocks, there it would wrap nothing.
    variables.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if variables["FSDP_AUTO_WRAP_POLICY"] != "SIZE_BASED_WRAP":
        del variables["FSDP_MIN_NUM_PARAMS"]
    if not target.reads("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"):
        del variables["FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"]
    if config.parallelism_config is not None:
        copies = config.parallelism_config.dp_replicate_size
        variables["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        variables["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] = str(copies)
        variables["PARALLELISM_CONFIG_DP_SHARD_SIZE"] = str(max(1, target.world_size // copies))
    return variables


def _deepspeed_variables(resolved: Resolved) -> dict[str, str]:
    config = resolved.config
    plugin = config.deepspeed_config or DeepSpeedPlugin()
    variables = {"ACCELERATE_USE_DEEPSPEED": "true"}
    if isinstance(plugin.gradient_accumulation_steps, int):
        variables["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(plugin.gradient_accumulation_steps)
    settings = plugin.settings
    if not settings:
        return {**variables, **_of_section(plugin, _DEEPSPEED)}
    settings["zero_optimization"] = plugin.zero_section()
    settings.setdefault("gradient_accumulation_steps", plugin.gradient_accumulation_steps)
    if plugin.gradient_clipping != "auto":
        settings["gradient_clipping"] = plugin.gradient_clipping
    encoded = base64.urlsafe_b64encode(json.dumps(settings).encode()).decode()
    rest = _of_section(plugin, {name: _DEEPSPEED[name] for name in ("zero3_init_flag", "transformer_moe_cls_names")})
    return {**variables, "ACCELERATE_DEEPSPEED_CONFIG_FILE": encoded, **rest}


def _of_section(section: Section, names: Mapping[str, str]) -> dict[str, str]:
    """The variables of a section's values; a value that is open has none."""
    values = {variable: getattr(section, field) for field, variable in names.items()}
    return {variable: _text(value) for variable, value in values.items() if value not in (None, (), "auto")}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _problem(resolved: Resolved, key: str, value: object, why: str, instead: str) -> Problem:
    what = f"{value} does not reach a script that uses Accelerate's own Accelerator, or the Trainer of transformers"
    todo = f"{instead}, or start with {_SWITCH}, so that paceline takes Accelerate's place"
    return Problem(resolved.origin(key).where, key, what, why, todo)


def _unknown_values(resolved: Resolved) -> Iterator[Problem]:
    config = resolved.config
    if resolved.origin("strategy").is_explicit and config.strategy == "auto":
        why = "Accelerate does not choose a strategy by the memory"
        yield _problem(resolved, "strategy", "auto", why, "write ddp or fsdp")
    if resolved.origin("timeout").is_explicit and config.timeout is not None:
        why = "Accelerate reads no variable for it"
        instead = "remove it and pass InitProcessGroupKwargs(timeout=…), or TrainingArguments(ddp_timeout=…)"
        yield _problem(resolved, "timeout", config.timeout, why, instead)


def _unknown_sections(resolved: Resolved) -> Iterator[Problem]:
    """Explicit values of sections that no variable carries."""
    config = resolved.config
    sections: list[tuple[str, Section | None, Mapping[str, str]]] = [
        ("ddp_config", config.ddp_config, {}),
        ("dynamo_config", config.dynamo_config, _DYNAMO),
    ]
    if config.strategy == "fsdp":
        sections.append(("fsdp_config", config.fsdp_config, _FSDP))
    if config.strategy == "deepspeed":
        known = {**_DEEPSPEED, "hf_ds_config": "", "gradient_accumulation_steps": ""}
        sections += [("deepspeed_config", config.deepspeed_config, known)]
        sections += [("parallelism_config", config.parallelism_config, {})]
    for name, section, carried in sections:
        if section is not None:
            yield from _unknown_in_section(resolved, name, section, carried)
    plugin = config.fsdp_config
    if config.strategy == "fsdp" and plugin is not None and not isinstance(plugin.reshard_after_forward, bool):
        why = "Accelerate reads only true and false there"
        key = "fsdp_config.fsdp_reshard_after_forward"
        yield _problem(resolved, key, plugin.reshard_after_forward, why, "write true or false")


def _unknown_in_section(resolved: Resolved, name: str, section: Section, known: Mapping[str, str]) -> Iterator[Problem]:
    for setting in settings_of(type(section)):
        key, value = f"{name}.{setting.key}", getattr(section, setting.field)
        is_used = resolved.origin(key).is_explicit and value != setting.default
        if is_used and setting.field not in (*known, *_BY_THE_LAUNCHER.get(name, ())):
            why = "Accelerate reads no variable for it"
            yield _problem(resolved, key, value, why, f"remove it and set {setting.field} in the script")


def _deepspeed_problems(resolved: Resolved, target: Target) -> Iterator[Problem]:
    config = resolved.config
    if config.strategy != "deepspeed" or target.has_device:
        return
    if target.world_size > 1:
        why = "without an accelerator each process of Accelerate counts itself as the only one under DeepSpeed, so "
        why += f"that all {target.world_size} ranks would train on the same samples"
        yield _problem(resolved, "strategy", "deepspeed", why, "write strategy: ddp")
    elif config.use_cpu:
        yield _problem(resolved, "use_cpu", "true", "Accelerate's ACCELERATE_USE_CPU turns DeepSpeed off", "remove it")


def _too_old(resolved: Resolved, target: Target) -> Iterator[Problem]:
    for variable in accelerate_variables(resolved, target, {}):
        if not target.reads(variable):
            first = ".".join(map(str, _SINCE[variable]))
            why = f"Accelerate {target.version} is installed, and reads {variable} from {first} on"
            yield _problem(resolved, "strategy", resolved.config.strategy, why, f"pip install 'accelerate>={first}'")
