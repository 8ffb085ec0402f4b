"""Tracker for DVCLive."""

from __future__ import annotations

from typing import Any

from paceline.tracking.base import Backend
from paceline.tracking.log_values import numbers, to_json

__all__ = ["Tracker"]

_OWN_COLUMNS = ("step", "timestamp")


class Tracker(Backend):
    """A run of `dvclive`; settings are those of `Live`. A `live` among them is used, and left open at the end."""

    name = "dvclive"

    def start(self) -> None:
        """Open a run, or use the script's."""
        from dvclive import Live

        settings = self.named("exp_name")
        self._run = settings.pop("live", None)
        self._is_own = self._run is None
        if self._is_own:
            location = {}
            if self.folder is not None:
                location = {"dir": str(self.folder / "dvclive")}
            self._run = Live(**{**location, **settings})

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Store the settings as parameters."""
        self._run.log_params(to_json(values))

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record the numbers of a step, and advance to the next."""
        if step is not None:
            self._run.step = step
        for name, value in numbers(values).items():
            self._run.log_metric(_column(name), value, **kwargs)
        self._run.next_step()

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images as PNG files."""
        if step is not None:
            self._run.step = step
        for name, images in values.items():
            for index, image in enumerate(images):
                self._run.log_image(f"{name}_{index}.png", image, **kwargs)

    def log_artifact(self, path: str, name: str | None = None, **kwargs: Any) -> None:
        """Store a file with the run."""
        self._run.log_artifact(path, name=name, **kwargs)

    def finish(self) -> None:
        """Close it, unless the script opened it."""
        if self._is_own:
            self._run.end()


def _column(name: str) -> str:
    """The name of a metric: in its file the last part is a column, beside those of DVCLive itself."""
    folder, _, last = name.rpartition("/")
    if last not in _OWN_COLUMNS:
        return name
    return f"{folder}/logged_{last}" if folder else f"logged_{last}"
