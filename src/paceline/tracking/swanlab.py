"""Tracker for SwanLab."""

from __future__ import annotations

from typing import Any

from paceline.tracking.base import Backend
from paceline.tracking.log_values import flatten

__all__ = ["Tracker"]


class Tracker(Backend):
    """A run of `swanlab`; settings are those of `swanlab.init`."""

    name = "swanlab"

    def start(self) -> None:
        """Open a run."""
        import swanlab

        self._package = swanlab
        location = {}
        if self.folder is not None:
            location = {"logdir": str(self.folder / "swanlog")}
        self._run = swanlab.init(**{"project": self.project, **location, **self.named("experiment_name")})

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Store the settings as the run's config."""
        self._package.config.update(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record numbers and text."""
        shown = {name: value for name, value in flatten(values).items() if isinstance(value, int | float | str)}
        texts = {name: self._package.Text(value) for name, value in shown.items() if isinstance(value, str)}
        self._run.log({**shown, **texts}, step=step, **kwargs)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images; keywords are those of `swanlab.Image`."""
        converted = {name: [self._package.Image(one, **kwargs) for one in images] for name, images in values.items()}
        self._run.log(converted, step=step)

    def finish(self) -> None:
        """Close the run."""
        self._package.finish()
