"""Tracker for MLflow."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from paceline.tracking.base import Backend
from paceline.tracking.log_values import numbers, short_text

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Tracker"]

logger = logging.getLogger(__name__)
_PARAMS_PER_CALL = 100


class Tracker(Backend):
    """The active run of `mlflow`; settings are those of `mlflow.start_run`, and `tracking_uri`.

    A run that the script has already started is used, and left open at the end. Without `tracking_uri` MLflow's own
    variables and defaults decide where it is stored.
    """

    name = "mlflow"

    def start(self) -> None:
        """Open a run, or use the one that is open."""
        import mlflow

        self._package = mlflow
        settings = self.named("run_name")
        uri = settings.pop("tracking_uri", None)
        if uri is not None:
            mlflow.set_tracking_uri(uri)
        self._run = mlflow.active_run()
        self._is_own = self._run is None
        if self._is_own:
            mlflow.set_experiment(self.project)
            self._run = mlflow.start_run(**settings)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Store the settings as parameters; text that is too long is truncated."""
        longest = self._package.utils.validation.MAX_PARAM_VAL_LENGTH
        texts = {name.replace("/", "."): str(value) for name, value in short_text(values).items()}
        cut = [name for name, text in texts.items() if len(text) > longest]
        if cut:
            logger.warning("MLflow stores %d characters per parameter; %s were truncated.", longest, ", ".join(cut))
        pairs = [(name, text[:longest]) for name, text in texts.items()]
        for first in range(0, len(pairs), _PARAMS_PER_CALL):
            self._package.log_params(dict(pairs[first : first + _PARAMS_PER_CALL]))

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record the numbers among the values."""
        self._package.log_metrics({name: float(value) for name, value in numbers(values).items()}, step=step, **kwargs)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images; keywords are those of `mlflow.log_image`."""
        for name, images in values.items():
            for index, image in enumerate(images):
                target = (
                    {"artifact_file": f"{name}_{step}_{index}.png"} if step is None else {"key": name, "step": step}
                )
                self._package.log_image(image, **{**target, **kwargs})

    def log_table(
        self,
        table_name: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Record a table as a file of the run."""
        if dataframe is not None:
            self._package.log_table(dataframe, f"{table_name}.json", **kwargs)
        else:
            # The format in which MLflow stores a data frame, written without pandas.
            table = {"columns": list(columns or ()), "data": [list(row) for row in data or ()]}
            self._package.log_dict(table, f"{table_name}.json")

    def log_figure(self, figure: Any, artifact_file: str, **kwargs: Any) -> None:
        """Store a figure of matplotlib or plotly."""
        self._package.log_figure(figure, artifact_file, **kwargs)

    def log_artifact(self, path: str, name: str | None = None, **kwargs: Any) -> None:
        """Store a file with the run; `name` is its folder there."""
        self._package.log_artifact(path, name, **kwargs)

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Store the files of a folder with the run."""
        self._package.log_artifacts(local_dir, artifact_path)

    def finish(self) -> None:
        """Close the run, marked as failed after a crash, unless the script started it."""
        if self._is_own:
            self._package.end_run("FAILED" if self.crashed else "FINISHED")
