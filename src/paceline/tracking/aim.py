"""Tracker for Aim."""

from __future__ import annotations

from typing import Any

from paceline.tracking.base import Backend
from paceline.tracking.log_values import flatten, to_json

__all__ = ["Tracker"]


class Tracker(Backend):
    """A run of `aim` in the folder's repository; settings are those of `aim.Run`."""

    name = "aim"
    requires_logging_directory = True

    def start(self) -> None:
        """Open a run."""
        import aim

        self._package = aim
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run = aim.Run(**{"repo": str(self.folder), "experiment": self.project, **self.settings})
        if self.run_name is not None:
            self._run.name = self.run_name

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Store the settings as the run's hparams."""
        self._run["hparams"] = to_json(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record numbers as metrics and text as text."""
        for name, value in flatten(values).items():
            if isinstance(value, int | float):
                self._run.track(value, name=name, step=step, **kwargs)
            elif isinstance(value, str):
                self._run.track(self._package.Text(value), name=name, step=step, **kwargs)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images; keywords are those of `aim.Image`."""
        for name, images in values.items():
            converted = [self._package.Image(image, **kwargs) for image in images]
            self._run.track(converted, name=name, step=step)

    def finish(self) -> None:
        """Close the run."""
        if self.crashed:
            self._run["crashed"] = True
        self._run.close()
