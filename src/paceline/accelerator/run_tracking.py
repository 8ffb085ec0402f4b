"""Tells experiment trackers what a run is and does."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.accelerator.profiling import peak_memory
from paceline.accelerator.stepping import steps_taken
from paceline.accelerator.summary import describe_run
from paceline.environment.peaks import peak_flops
from paceline.environment.version import __version__
from paceline.errors import ConfigError, Problem, did_you_mean
from paceline.tracking import TRACKERS, Trackers, choose_trackers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from paceline.accelerator.assembly import RunComponents
    from paceline.accelerator.prepared import Prepared
    from paceline.accelerator.stepping import Window
    from paceline.accelerator.strategy_selection import StrategySelector
    from paceline.tracking import GeneralTracker

__all__ = ["RunTracker"]


class RunTracker:
    """Opens trackers once, hands them what is logged, and closes them however the script ends.

    Args:
        log_with: The trackers, as for `Accelerator`.
        logging_dir: Where trackers keep their files; None if nowhere.
        components: The run.
        prepared: What trains.
        selector: Knows the strategy.
        window: The accumulation window.
    """

    def __init__(
        self,
        log_with: object,
        logging_dir: str | None,
        components: RunComponents,
        prepared: Prepared,
        selector: StrategySelector,
        window: Window,
    ) -> None:
        folder = None if logging_dir is None else Path(logging_dir)
        is_main = components.context.world.is_main
        chosen = choose_trackers(log_with, folder)
        self._trackers = Trackers(chosen, folder, is_main=is_main, is_requested=log_with is not None)
        self._components = components
        self._prepared = prepared
        self._selector = selector
        self._window = window
        self._is_described = True

    @property
    def active(self) -> Sequence[Any]:
        """See `Accelerator.trackers`."""
        return tuple(self._trackers.active)

    @property
    def chosen(self) -> Sequence[str | GeneralTracker]:
        """See `Accelerator.log_with`."""
        return tuple(self._trackers.chosen)

    def start(
        self,
        project_name: str,
        config: Mapping[str, Any] | None,
        init_kwargs: Mapping[str, Mapping[str, Any]] | None,
        run_name: str | None,
    ) -> None:
        """See `Accelerator.init_trackers`."""
        settings = init_kwargs or {}
        self._check_names(settings, "init_trackers(…)", "init_kwargs")
        if self._trackers.start(project_name, settings=settings, run_name=run_name):
            self._trackers.record(self._run_record())
            self._is_described = False
        if config is not None:
            self._trackers.store(config)

    def _check_names(self, settings: Mapping[str, Any], where: str, key: str) -> None:
        """Refuse settings of what is not a tracker, since nothing would read them."""
        names = {*TRACKERS, *(one if isinstance(one, str) else one.name for one in self._trackers.chosen)}
        unknown = [name for name in settings if name not in names]
        if unknown:
            raise ConfigError(
                Problem(where, f"{key}[{name!r}]", "is not a tracker", hint=did_you_mean(name, names))
                for name in unknown
            )

    def log(
        self, values: Mapping[str, Any], step: int | None, log_kwargs: Mapping[str, Mapping[str, Any]] | None
    ) -> None:
        """See `Accelerator.log`."""
        if log_kwargs:
            self._check_names(log_kwargs, "log(…)", "log_kwargs")
        if not self._is_described:
            # Only now is the model prepared and the strategy decided.
            self._is_described = True
            self._trackers.record(self._description())
        self._trackers.log(values, step, log_kwargs or {}, self._progress)

    def get(self, name: str, *, unwrap: bool) -> Any:
        """See `Accelerator.get_tracker`."""
        return self._trackers.get(name, unwrap=unwrap)

    def finish(self) -> None:
        """See `Accelerator.end_training`."""
        self._trackers.finish()

    def _progress(self) -> dict[str, Any]:
        """What is recorded with each log entry."""
        steps = steps_taken(self._prepared.optimizers)
        progress: dict[str, Any] = {"optimizer_steps": steps}
        samples = self._samples_per_step()
        if samples is not None:
            progress["samples_seen"] = steps * samples
        return {**progress, "peak_memory_bytes": peak_memory(self._components.context.device)}

    def _samples_per_step(self) -> int | None:
        """Samples of an optimizer step over all ranks; None if that is not known."""
        batch_size = self._prepared.global_batch_size
        return None if batch_size is None else batch_size * self._window.num_steps

    def _run_record(self) -> dict[str, Any]:
        """What `run.json` contains from the beginning of the run."""
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

    def _description(self) -> dict[str, Any]:
        """What `run.json` contains once everything is prepared."""
        models, strategy = self._prepared.models, self._selector.maybe_current
        description: dict[str, Any] = {
            "description": describe_run(self._components, self._selector, self._prepared, self._window.num_steps),
            "engine_settings": {},
            "parameters": 0,
            "samples_per_step": self._samples_per_step(),
            "attention_width": 0,
        }
        if models and strategy is not None:
            description["engine_settings"] = strategy.settings
            description["parameters"] = sum(strategy.num_elements(model) for model in models)
            description["attention_width"] = sum(_attention_width(strategy.unwrap(model)) for model in models)
        return description


def _attention_width(model: nn.Module) -> int:
    """The width of queries, summed over layers, from the `config` of a transformers model; 0 for any other.

    The operations of attention beside its parameters grow with it and with the length of a sequence.
    """
    config = getattr(model, "config", None)
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None)
    width = heads * size if isinstance(heads, int) and isinstance(size, int) else getattr(config, "hidden_size", None)
    return layers * width if isinstance(layers, int) and isinstance(width, int) else 0
