"""DeepSpeed's dictionary, as far as the configuration determines it before a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from paceline.config.deepspeed_file.settings import AUTO, walk

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.config.schema.deepspeed import DeepSpeedPlugin
    from paceline.config.schema.run import RunConfig

__all__ = ["decided_settings", "left_open", "printable_settings"]

_QUIET_STEPS: Final = 2**31 - 1
_MICRO: Final = "train_micro_batch_size_per_gpu"
_WIDTH: Final = "the model's hidden size; DeepSpeed's own default where the model has none"
_FILLED_FROM: Final[Mapping[str, str]] = {
    _MICRO: "the batch size of the prepared loader",
    "train_batch_size": f"{_MICRO} x gradient_accumulation_steps x number of ranks",
    "gradient_clipping": "the norm that the script passes to clip_grad_norm_",
    "zero_optimization.reduce_bucket_size": _WIDTH,
    "zero_optimization.stage3_prefetch_bucket_size": _WIDTH,
    "zero_optimization.stage3_param_persistence_threshold": _WIDTH,
    "optimizer.": "the arguments of DummyOptim in the script",
    "scheduler.": "the arguments of DummyScheduler in the script",
}
"""What the run fills an "auto" from, by path or by the beginning of paths."""


def decided_settings(plugin: DeepSpeedPlugin, config: RunConfig) -> dict[str, Any]:
    """Return the dictionary with the values of the configuration; `"auto"` stays where only the run knows."""
    settings = {key: value for key, value in plugin.settings.items() if value is not None}
    zero = settings["zero_optimization"] = plugin.zero_section()
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part) is not None and zero[part].get("device", "none") == "none":
            del zero[part]
    settings["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    for kind in ("bf16", "fp16"):
        if config.mixed_precision == kind or kind in settings:
            section = {}
            if isinstance(settings.get(kind), dict):
                section = settings[kind]
            settings[kind] = {**section, "enabled": config.mixed_precision == kind}
    if plugin.gradient_clipping == AUTO:
        # The script clips at each step, to a norm of its own.
        settings.pop("gradient_clipping", None)
    else:
        settings["gradient_clipping"] = plugin.gradient_clipping
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    settings.setdefault("steps_per_print", _QUIET_STEPS)
    settings.setdefault("wall_clock_breakdown", False)
    return settings


def printable_settings(plugin: DeepSpeedPlugin, config: RunConfig) -> dict[str, Any]:
    """Return the dictionary to show before a run; keys that the run adds are `"auto"`."""
    settings = decided_settings(plugin, config)
    for key in (_MICRO, "train_batch_size", "gradient_clipping"):
        settings.setdefault(key, AUTO)
    if settings["train_batch_size"] == AUTO and settings[_MICRO] != AUTO and config.num_processes is not None:
        settings["train_batch_size"] = settings[_MICRO] * config.gradient_accumulation_steps * config.num_processes
    return settings


def left_open(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the path of each `"auto"` with its source in the run; an empty text where there is none."""
    for path, value in walk(settings):
        if value == AUTO:
            yield path, next((text for name, text in _FILLED_FROM.items() if _is_under(path, name)), "")


def _is_under(path: str, name: str) -> bool:
    return path == name or (name.endswith(".") and path.startswith(name))
