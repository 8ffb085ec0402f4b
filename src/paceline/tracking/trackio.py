"""Trackio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.tracking.base import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Tracker"]


class Tracker(Backend):
    """A run of `trackio`; settings are those of `trackio.init`."""

    name = "trackio"

    def start(self) -> None:
        """Open a run."""
        import trackio

        self._package = trackio
        self._run = trackio.init(**{"project": self.project, **self.named("name")})

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the settings as the run's config."""
        self._run.config.update(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Hand everything on."""
        self._run.log(values, step=step, **kwargs)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images; keywords are those of `trackio.Image`."""
        for name, images in values.items():
            made = {f"{name}_{index}": self._package.Image(one, **kwargs) for index, one in enumerate(images)}
            self._run.log(made, step=step)

    def log_table(
        self,
        table_name: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Record a table."""
        rows = None if data is None else [list(row) for row in data]
        table = self._package.Table(columns=None if columns is None else list(columns), data=rows, dataframe=dataframe)
        self._run.log({table_name: table}, step=step)

    def finish(self) -> None:
        """Close the run."""
        self._run.finish()
