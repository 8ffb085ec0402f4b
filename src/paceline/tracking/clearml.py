"""Tracker for ClearML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.tracking.base import Backend
from paceline.tracking.log_values import flatten, to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Tracker", "plot_and_curve"]


class Tracker(Backend):
    """A task of `clearml`; settings are those of `Task.init`.

    A task that the script has already opened is used, and left open at the end.
    """

    name = "clearml"

    def start(self) -> None:
        """Open a task, or use the one that is open."""
        from clearml import Task

        self._run = Task.current_task()
        self._is_own = self._run is None
        if self._is_own:
            names = {"project_name": self.project, "task_name": self.run_name or self.project}
            self._run = Task.init(**{**names, **self.settings})

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Store the settings as the task's configuration."""
        self._run.connect_configuration(to_json(values), name="paceline")

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record numbers with a step as scalars, others as single values; text goes to the console log."""
        logger = self._run.get_logger()
        for name, value in flatten(values).items():
            if isinstance(value, str):
                logger.report_text(f"{name}: {value}", print_console=False)
            elif isinstance(value, int | float) and step is None:
                logger.report_single_value(name, value)
            elif isinstance(value, int | float):
                title, series = plot_and_curve(name)
                logger.report_scalar(title, series, value, step, **kwargs)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images; keywords are those of `report_image`."""
        for name, images in values.items():
            title, series = plot_and_curve(name)
            for index, image in enumerate(images):
                shown = {"iteration": step, "image": image, **kwargs}
                self._run.get_logger().report_image(title, f"{series}_{index}", **shown)

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
        table = dataframe
        if dataframe is None:
            # The first row names the columns, where nothing else does.
            table = [*([list(columns)] if columns else []), *map(list, data or ())]
        title, series = plot_and_curve(table_name)
        self._run.get_logger().report_table(title, series, iteration=step, table_plot=table, **kwargs)

    def log_artifact(self, path: str, name: str | None = None, **kwargs: Any) -> None:
        """Store a file with the run."""
        self._run.upload_artifact(name or path, path, **kwargs)

    def finish(self) -> None:
        """Close the task, unless the script opened it."""
        if not self._is_own:
            return
        if self.crashed:
            self._run.mark_failed(status_reason="the script ended with an error")
        self._run.close()


def plot_and_curve(name: str) -> tuple[str, str]:
    """The plot and the curve of a value: `eval_loss` is the curve eval of the plot loss."""
    for split in ("eval", "test", "train"):
        if name.startswith(f"{split}_"):
            return name[len(split) + 1 :], split
    return name, "train"
