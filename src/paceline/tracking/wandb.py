"""Tracker for Weights & Biases."""

from __future__ import annotations

from typing import Any

from paceline.tracking.base import TableBackend

__all__ = ["Tracker"]


class Tracker(TableBackend):
    """A run of `wandb`; settings are those of `wandb.init`."""

    name = "wandb"

    def start(self) -> None:
        """Open a run."""
        import wandb

        self._package = wandb
        location = {}
        if self.folder is not None:
            location = {"dir": str(self.folder)}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(**{"project": self.project, **location, **self.named("name")})

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Store the settings as the run's config."""
        self._run.config.update(values, allow_val_change=True)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Pass all values to `run.log`."""
        self._run.log(values, step=step, **kwargs)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images; keywords are those of `wandb.Image`."""
        converted = {name: [self._package.Image(one, **kwargs) for one in images] for name, images in values.items()}
        self._run.log(converted, step=step)

    def log_artifact(self, path: str, name: str | None = None, **kwargs: Any) -> None:
        """Store a file with the run."""
        self._run.log_artifact(path, name=name, **kwargs)

    def finish(self) -> None:
        """Close the run, marked as failed after a crash."""
        self._run.finish(exit_code=int(self.crashed))
