"""Tracker for Trackio."""

from __future__ import annotations

from typing import Any

from paceline.tracking.base import TableBackend

__all__ = ["Tracker"]


class Tracker(TableBackend):
    """A run of `trackio`; settings are those of `trackio.init`."""

    name = "trackio"

    def start(self) -> None:
        """Open a run."""
        import trackio

        self._package = trackio
        self._run = trackio.init(**{"project": self.project, **self.named("name")})

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Store the settings as the run's config."""
        self._run.config.update(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Pass all values on."""
        self._run.log(values, step=step, **kwargs)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images; keywords are those of `trackio.Image`."""
        for name, images in values.items():
            converted = {f"{name}_{index}": self._package.Image(one, **kwargs) for index, one in enumerate(images)}
            self._run.log(converted, step=step)

    def finish(self) -> None:
        """Close the run."""
        self._run.finish()
