"""Checks the arguments of `Accelerator`, and merges those with the same meaning."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.config import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    FP8Config,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
)
from paceline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from paceline.config import DeepSpeedPlugin, RunConfig

_HANDLERS = (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    FP8Config,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
)


@dataclass(frozen=True, slots=True)
class Handlers:
    """The `kwargs_handlers`, sorted by kind; defaults where the script passed none."""

    autocast: AutocastKwargs
    scaler: GradScalerKwargs
    process_group: InitProcessGroupKwargs
    profile: ProfileKwargs
    ddp: DistributedDataParallelKwargs | None
    fp8: FP8Config | None

    @classmethod
    def sort(cls, handlers: Iterable[object]) -> Handlers:
        """Sort handlers by their kind.

        Raises:
            ConfigError: An object is not a handler, or two are of one kind.
        """
        by_kind: dict[type, Any] = {}
        problems: list[Problem] = []
        if isinstance(handlers, _HANDLERS):
            raise ConfigError([_single_handler(handlers)])
        for handler in handlers:
            kind = next((known for known in _HANDLERS if isinstance(handler, known)), None)
            if kind is None or kind in by_kind:
                problems.append(_handler_problem(handler, repeated=kind is not None))
            else:
                by_kind[kind] = handler
        if problems:
            raise ConfigError(problems)
        return cls(
            autocast=by_kind.get(AutocastKwargs) or AutocastKwargs(),
            scaler=by_kind.get(GradScalerKwargs) or GradScalerKwargs(),
            process_group=by_kind.get(InitProcessGroupKwargs) or InitProcessGroupKwargs(),
            profile=by_kind.get(ProfileKwargs) or ProfileKwargs(),
            ddp=by_kind.get(DistributedDataParallelKwargs),
            fp8=by_kind.get(FP8Config),
        )


def _handler_problem(handler: object, *, repeated: bool) -> Problem:
    name = type(handler).__name__
    if repeated:
        return Problem("Accelerator(…)", "kwargs_handlers", f"two {name}", hint="keep one of them")
    if handler in _HANDLERS:
        kind = getattr(handler, "__name__", "")
        return Problem("Accelerator(…)", "kwargs_handlers", f"the class {kind}", hint=f"pass an instance, {kind}(…)")
    known = ", ".join(kind.__name__ for kind in _HANDLERS)
    return Problem("Accelerator(…)", "kwargs_handlers", f"a {name}", hint=f"handlers are {known}")


def _single_handler(handler: object) -> Problem:
    name = type(handler).__name__
    return Problem("Accelerator(…)", "kwargs_handlers", f"a {name} and not a list", hint=f"write [{name}(…)]")


def compile_settings(plugin: TorchDynamoPlugin | None, backend: str | None) -> TorchDynamoPlugin | None:
    """The settings of torch.compile from either argument.

    Raises:
        ConfigError: Both were given.
    """
    if plugin is not None and backend is not None:
        _refuse_both("dynamo_plugin", "dynamo_backend")
    if backend is None:
        return plugin
    return TorchDynamoPlugin(backend=str(backend).lower())  # type: ignore[arg-type]


def accumulation_steps(plugin: GradientAccumulationPlugin | None, steps: int | None) -> int | None:
    """Micro-batches to an optimizer step from either argument; None without one.

    Raises:
        ConfigError: Both were given, with different values.
    """
    if plugin is None:
        return steps
    if steps not in (None, plugin.num_steps):
        _refuse_both("gradient_accumulation_steps", "gradient_accumulation_plugin")
    return plugin.num_steps


def accumulation_settings(plugin: GradientAccumulationPlugin | None, config: RunConfig) -> GradientAccumulationPlugin:
    """The settings of gradient accumulation: the script's own, else the configured number of micro-batches."""
    return plugin or GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps)


def first_plugin(one: DeepSpeedPlugin | None, several: Mapping[str, DeepSpeedPlugin] | None) -> DeepSpeedPlugin | None:
    """The settings of DeepSpeed to begin with.

    Raises:
        ConfigError: Both were given.
    """
    if not several:
        return one
    if one is not None:
        _refuse_both("deepspeed_plugin", "deepspeed_plugins")
    return next(iter(several.values()))


def named_plugin(plugins: Mapping[str, DeepSpeedPlugin], name: str) -> DeepSpeedPlugin:
    """One of several settings of DeepSpeed.

    Raises:
        ConfigError: There is none of that name.
    """
    if name in plugins:
        return plugins[name]
    hint = f"choose one of {', '.join(plugins)}" if plugins else "pass deepspeed_plugins={name: DeepSpeedPlugin(…)}"
    raise ConfigError([Problem("select_deepspeed_plugin(…)", name, "no plugin of that name was passed", hint=hint)])


def _refuse_both(one: str, other: str) -> None:
    raise ConfigError([Problem("Accelerator(…)", one, f"given together with {other}", hint="give one of them")])


def check_rng_types(rng_types: Sequence[str] | None) -> None:
    """Refuse to copy random generators between ranks.

    Raises:
        ConfigError: Something else than `generator` was requested.
    """
    extra = [kind for kind in rng_types or () if str(kind) != "generator"]
    if extra:
        raise ConfigError(
            [
                Problem(
                    "Accelerator(…)",
                    "rng_types",
                    f"{extra} cannot be synchronised",
                    "copying one rank's generator to all would give them the same dropout",
                    "leave rng_types out: the order of samples is the same on all ranks without it",
                )
            ]
        )


def project_settings(
    project_dir: str | os.PathLike[str] | None, project_config: ProjectConfiguration | None
) -> ProjectConfiguration:
    """Where a run keeps its files, from either argument.

    Raises:
        ConfigError: Both were given and differ, or checkpoints are numbered without a folder.
    """
    folder = None if project_dir is None else os.path.expanduser(os.fspath(project_dir))  # noqa: PTH111
    if project_config is None:
        return ProjectConfiguration(project_dir=folder)
    if folder is not None and project_config.project_dir not in (None, folder):
        _refuse_both("project_dir", "project_config")
    settings = project_config if folder is None else project_config.changed(project_dir=folder)
    if settings.automatic_checkpoint_naming and settings.project_dir is None:
        raise ConfigError(
            [
                Problem(
                    "ProjectConfiguration(…)",
                    "automatic_checkpoint_naming",
                    "true without project_dir",
                    "checkpoints are numbered in that folder",
                    "set project_dir",
                )
            ]
        )
    return settings
