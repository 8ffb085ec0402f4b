"""What a script may say to the constructor, checked before anything is built."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.config import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
)
from paceline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from paceline.config import GradientAccumulationPlugin

_HANDLERS = (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
)


@dataclass(frozen=True, slots=True)
class Handlers:
    """What a script says in objects rather than in a file: at most one of each kind."""

    autocast: AutocastKwargs
    scaler: GradScalerKwargs
    process_group: InitProcessGroupKwargs
    profile: ProfileKwargs
    ddp: DistributedDataParallelKwargs | None

    @classmethod
    def sort(cls, handlers: Iterable[object]) -> Handlers:
        """Sort handlers by their kind.

        Raises:
            ConfigError: Something that is no handler, or two of one kind.
        """
        found: dict[type, Any] = {}
        problems: list[Problem] = []
        for handler in handlers:
            kind = next((known for known in _HANDLERS if isinstance(handler, known)), None)
            if kind is None or kind in found:
                problems.append(_handler_problem(handler, repeated=kind is not None))
            else:
                found[kind] = handler
        if problems:
            raise ConfigError(problems)
        return cls(
            autocast=found.get(AutocastKwargs) or AutocastKwargs(),
            scaler=found.get(GradScalerKwargs) or GradScalerKwargs(),
            process_group=found.get(InitProcessGroupKwargs) or InitProcessGroupKwargs(),
            profile=found.get(ProfileKwargs) or ProfileKwargs(),
            ddp=found.get(DistributedDataParallelKwargs),
        )


def _handler_problem(handler: object, *, repeated: bool) -> Problem:
    name = type(handler).__name__
    if repeated:
        return Problem("Accelerator(…)", "kwargs_handlers", f"two {name}", hint="keep one of them")
    known = ", ".join(kind.__name__ for kind in _HANDLERS)
    return Problem("Accelerator(…)", "kwargs_handlers", f"a {name}", hint=f"handlers are {known}")


def compile_settings(plugin: TorchDynamoPlugin | None, backend: str | None) -> TorchDynamoPlugin | None:
    """The settings of torch.compile, however they were given."""
    if plugin is not None and backend is not None:
        _refuse_both("dynamo_plugin", "dynamo_backend")
    if backend is None:
        return plugin
    return TorchDynamoPlugin(backend=str(backend).lower())  # type: ignore[arg-type]


def accumulation_steps(plugin: GradientAccumulationPlugin | None, steps: int | None) -> int | None:
    """Micro-batches to an optimizer step, however they were given; None if they were not."""
    if plugin is None:
        return steps
    if steps not in (None, plugin.num_steps):
        _refuse_both("gradient_accumulation_steps", "gradient_accumulation_plugin")
    return plugin.num_steps


def refuse_scaler(handlers: Handlers, strategy: str) -> None:
    """Refuse settings of a gradient scaler where the strategy's engine scales the loss itself.

    Raises:
        ConfigError: They were given.
    """
    if handlers.scaler != GradScalerKwargs():
        hint = "write initial_scale_power and loss_scale_window into the fp16 section of its configuration"
        why = f"the engine of {strategy} scales the loss itself"
        raise ConfigError([Problem("Accelerator(…)", "kwargs_handlers", "GradScalerKwargs is not used", why, hint)])


def _refuse_both(one: str, other: str) -> None:
    raise ConfigError([Problem("Accelerator(…)", one, f"given together with {other}", hint="give one of them")])


def check_rng_types(rng_types: Sequence[str] | None) -> None:
    """Refuse to copy generators between ranks.

    Raises:
        ConfigError: It was asked for.
    """
    extra = [kind for kind in rng_types or () if str(kind) != "generator"]
    if extra:
        raise ConfigError(
            [
                Problem(
                    "Accelerator(…)",
                    "rng_types",
                    f"{extra} cannot be synchronised",
                    "copying a rank's generator to all makes their dropout the same",
                    "leave rng_types out: the order of samples is the same on all ranks by construction",
                )
            ]
        )


def project_settings(
    project_dir: str | os.PathLike[str] | None, project_config: ProjectConfiguration | None
) -> ProjectConfiguration:
    """Where a run keeps its files, however it was given."""
    folder = None if project_dir is None else os.path.expanduser(os.fspath(project_dir))  # noqa: PTH111
    if project_config is None:
        return ProjectConfiguration(project_dir=folder)
    if folder is not None and project_config.project_dir not in (None, folder):
        _refuse_both("project_dir", "project_config")
    made = project_config if folder is None else project_config.changed(project_dir=folder)
    if made.automatic_checkpoint_naming and made.project_dir is None:
        raise ConfigError(
            [
                Problem(
                    "ProjectConfiguration(…)",
                    "automatic_checkpoint_naming",
                    "true without project_dir",
                    "there is no folder to number in",
                    "set project_dir",
                )
            ]
        )
    return made
