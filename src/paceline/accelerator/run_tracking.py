"""The part of the facade that tells experiment trackers what a run does."""

from __future__ import annotations

import os
import platform
import sys
from typing import TYPE_CHECKING, Any

from paceline.environment.peaks import peak_flops
from paceline.environment.profiling import peak_memory
from paceline.errors import ConfigError, Problem, did_you_mean
from paceline.stepping import steps_taken
from paceline.tracking import TRACKERS
from paceline.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from paceline.accelerator.assembly import RunComponents
    from paceline.data import PreparedDataLoader
    from paceline.stepping import AcceleratedOptimizer, Window
    from paceline.strategies import Strategy
    from paceline.tracking import GeneralTracker, Trackers

__all__ = ["Reporting"]


class Reporting:
    """Trackers: opened once, told what is logged, closed however the script ends."""

    _tracking: Trackers
    _components: RunComponents
    _window: Window
    _models: list[nn.Module]
    _optimizers: list[AcceleratedOptimizer]
    _dataloaders: list[PreparedDataLoader]
    _is_described = True

    if TYPE_CHECKING:

        @property
        def strategy(self) -> Strategy:
            """How the model is spread over ranks; the Accelerator decides it."""

        def describe(self) -> str:
            """What was detected and decided; the Accelerator says it."""

    @property
    def trackers(self) -> Sequence[Any]:
        """The trackers that are open on this rank."""
        return tuple(self._tracking.active)

    @property
    def log_with(self) -> Sequence[str | GeneralTracker]:
        """The trackers that were asked for."""
        return tuple(self._tracking.chosen)

    def init_trackers(
        self,
        project_name: str,
        config: Mapping[str, Any] | None = None,
        init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        run_name: str | None = None,
    ) -> None:
        """Open the trackers of `log_with`, on rank 0 unless a tracker wants all.

        Wherever there is a folder for logs, `run.json` says there what the run is: its configuration with the origin
        of each value, its environment, and `config`.

        Args:
            project_name: The project, experiment or folder, as each tracker calls it.
            config: Settings of the script to keep with the run; nested mappings are welcome.
            init_kwargs: By a tracker's name, what to pass on to the function that opens its run.
            run_name: The run's name in every tracker that knows such a thing.

        Raises:
            ConfigError: `init_kwargs` names something that is no tracker.
        """
        settings = init_kwargs or {}
        self._check_names(settings, "init_trackers(…)", "init_kwargs")
        if self._tracking.start(project_name, settings=settings, run_name=run_name):
            self._tracking.record(self._record())
            self._is_described = False
        if config is not None:
            self._tracking.store(config)

    def _check_names(self, settings: Mapping[str, Any], where: str, key: str) -> None:
        """Refuse settings of what is no tracker: they would reach nobody."""
        names = {*TRACKERS, *(one if isinstance(one, str) else one.name for one in self._tracking.chosen)}
        wrong = [name for name in settings if name not in names]
        if wrong:
            raise ConfigError(
                Problem(where, f"{key}[{name!r}]", "is no tracker", hint=did_you_mean(name, names)) for name in wrong
            )

    def log(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Hand numbers, text and small tensors to every open tracker; elsewhere it does nothing.

        A tensor on a device is copied to the host behind the work that is queued there, and written by a later call,
        once it has come: this call does not wait for the device, and a later change of the tensor does not show.

        Args:
            values: By name. Tensors of one element become numbers.
            step: Of the run; None leaves counting to each tracker.
            log_kwargs: By a tracker's name, what to pass on to its own function.

        Raises:
            TrackingError: `log_with` was given and `init_trackers` was not called.
            ConfigError: `log_kwargs` names something that is no tracker.
        """
        if log_kwargs:
            self._check_names(log_kwargs, "log(…)", "log_kwargs")
        tracking = self._tracking
        if not self._is_described:
            # Only now is the model prepared and the strategy decided.
            self._is_described = True
            tracking.record(self._details())
        tracking.log(values, step, log_kwargs or {}, self._facts)

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """A tracker by its name, for what it can do besides; on ranks that record nothing, one that does nothing.

        Args:
            name: As in `log_with`.
            unwrap: Return the object of its package, such as wandb's run.

        Raises:
            TrackingError: There is no such tracker, or `init_trackers` was not called.
        """
        return self._tracking.get(name, unwrap=unwrap)

    def transfer_trackers(self, other: Reporting) -> None:
        """Go on with the open trackers of another Accelerator, which has none from then on."""
        self._tracking, other._tracking = other._tracking, self._tracking
        self._is_described = True

    def end_training(self) -> None:
        """Write what was logged and close the trackers.

        A script that forgets it, or ends with an error, still closes them when the process ends. The process group
        stays, since other Accelerators may use it; it is closed when the process ends.
        """
        self._tracking.finish()

    def _facts(self) -> dict[str, Any]:
        """What the run knows of itself at a log entry."""
        steps = steps_taken(self._optimizers)
        facts: dict[str, Any] = {"optimizer_steps": steps}
        batch = self._samples_of_step()
        if batch is not None:
            facts["samples_seen"] = steps * batch
        return {**facts, "peak_memory_bytes": peak_memory(self._components.context.device)}

    def _samples_of_step(self) -> int | None:
        """Samples of an optimizer step over all ranks, as the first prepared loader says."""
        batch = self._dataloaders[0].total_batch_size if self._dataloaders else None
        return None if batch is None else batch * self._window.num_steps

    def _record(self) -> dict[str, Any]:
        """What `run.json` says when the run begins."""
        from paceline.accelerator.environment_report import environment_report

        context = self._components.context
        explained = self._components.resolved.explain()
        report = environment_report(os.environ, ask_programs=False).as_dict()
        return {
            "paceline": __version__,
            "command": [sys.executable, *sys.argv],
            "host": platform.node(),
            "ranks": context.world.size,
            "mixed_precision": context.precision.mode,
            "peak_flops": peak_flops(context.device, context.precision.mode),
            "config": {
                key: {"value": value, "origin": origin.where, "kind": origin.kind} for key, value, origin in explained
            },
            "environment": report,
        }

    def _details(self) -> dict[str, Any]:
        """What can be said once everything is prepared."""
        return {
            "description": self.describe(),
            # Before a model is there, "auto" has not decided.
            "engine_settings": self.strategy.settings if self._models else {},
            "parameters": sum(self.strategy.num_elements(model) for model in self._models),
            "samples_per_step": self._samples_of_step(),
            "attention_width": sum(_attention_width(self.strategy.unwrap(model)) for model in self._models),
        }


def _attention_width(model: nn.Module) -> int:
    """The width of queries, summed over layers, as a model of transformers' kind says; 0 where none does.

    What attention computes beside its parameters grows with it and with the length of a sequence.
    """
    config = getattr(model, "config", None)
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None)
    width = heads * size if isinstance(heads, int) and isinstance(size, int) else getattr(config, "hidden_size", None)
    return layers * width if isinstance(layers, int) and isinstance(width, int) else 0
