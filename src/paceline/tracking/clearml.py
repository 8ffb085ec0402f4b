"""ClearML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.tracking.base import Backend
from paceline.tracking.log_values import flatten, to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Tracker"]


class Tracker(Backend):
    """A task of `clearml`; settings are those of `Task.init`.

    A task that the script has opened already is joined, and left open at the end.
    """

    name = "clearml"

    def start(self) -> None:
        """Open a task, or join the one that is open."""
        from clearml import Task

        self._run = Task.current_task()
        self._is_own = self._run is None
        if self._is_own:
            said = {"project_name": self.project, "task_name": self.run_name or self.project}
            self._run = Task.init(**{**said, **self.settings})

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the settings as the task's configuration."""
        self._run.connect_configuration(to_json(values), name="paceline")

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record numbers: those of a step in a plot, others by themselves; text goes to the console log."""
        logger = self._run.get_logger()
        for name, value in flatten(values).items():
            if isinstance(value, str):
                logger.report_text(f"{name}: {value}", print_console=False)
            elif isinstance(value, int | float) and step is None:
                logger.report_single_value(name, value)
            elif isinstance(value, int | float):
                title, series = _place(name)
                logger.report_scalar(title, series, value, step, **kwargs)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images; keywords are those of `report_image`."""
        for name, images in values.items():
            title, series = _place(name)
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
        table = dataframe if dataframe is not None else [list(columns or ()), *map(list, data or ())]
        title, series = _place(table_name)
        self._run.get_logger().report_table(title, series, iteration=step, table_plot=table, **kwargs)

    def log_artifact(self, path: str, name: str | None = None, **kwargs: Any) -> None:
        """Keep a file."""
        self._run.upload_artifact(name or path, path, **kwargs)

    def finish(self) -> None:
        """Close the task, unless it is the script's."""
        if not self._is_own:
            return
        if self.crashed:
            self._run.mark_failed(status_reason="the script ended with an error")
        self._run.close()


def _place(name: str) -> tuple[str, str]:
    """The plot and the curve in it: `eval_loss` is the curve eval of the plot loss."""
    for before in ("eval", "test", "train"):
        if name.startswith(f"{before}_"):
            return name[len(before) + 1 :], before
    return name, "train"
