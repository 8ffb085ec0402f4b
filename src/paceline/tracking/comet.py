"""Tracker for Comet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.tracking.base import Backend
from paceline.tracking.log_values import numbers, short_text

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Tracker"]


class Tracker(Backend):
    """An experiment of `comet_ml`; settings are those of `comet_ml.start`."""

    name = "comet_ml"

    def start(self) -> None:
        """Open an experiment."""
        import comet_ml

        self._run = comet_ml.start(**{"project_name": self.project, **self.settings})
        if self.run_name is not None:
            self._run.set_name(self.run_name)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Store the settings as parameters."""
        self._run.log_parameters(short_text(values))

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record numbers as metrics, text as it is."""
        if step is not None:
            self._run.set_step(step)
        self._run.log_metrics(numbers(values), step=step, **kwargs)
        for name, value in values.items():
            if isinstance(value, str):
                self._run.log_other(name, value)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images; keywords are those of `log_image`."""
        for name, images in values.items():
            for index, image in enumerate(images):
                self._run.log_image(image, name=f"{name}_{index}", step=step, **kwargs)

    def log_table(
        self,
        table_name: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Record a table as a CSV file."""
        rows = dataframe if dataframe is not None else [list(row) for row in data or ()]
        headers: bool | list[str] = True
        if dataframe is None:
            headers = list(columns or ())
        self._run.log_table(f"{table_name}.csv", tabular_data=rows, headers=headers, **kwargs)

    def log_artifact(self, path: str, name: str | None = None, **kwargs: Any) -> None:
        """Store a file with the run."""
        self._run.log_asset(path, file_name=name, **kwargs)

    def finish(self) -> None:
        """Close the experiment."""
        if self.crashed:
            self._run.log_other("crashed", True)
        self._run.end()
