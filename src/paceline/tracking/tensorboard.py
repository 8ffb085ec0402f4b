"""Tracker for TensorBoard: event files under `<folder>/<project>`."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any

from paceline.tracking.base import Backend
from paceline.tracking.log_values import short_text

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Tracker"]


class Tracker(Backend):
    """Writes through `torch.utils.tensorboard`; settings are those of its `SummaryWriter`."""

    name = "tensorboard"
    requires_logging_directory = True

    def start(self) -> None:
        """Open an event file."""
        from torch.utils.tensorboard import SummaryWriter

        assert self.folder is not None
        folder = self.folder / self.project
        if self.run_name is not None:
            folder /= self.run_name
        self._run = SummaryWriter(**{"log_dir": str(folder), **self.settings})

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Write the settings as hyper-parameters, into the same folder."""
        self._run.add_hparams(short_text(values), {}, run_name=".")
        self._run.flush()

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Write numbers as scalars, those of a mapping in one plot, text as text, arrays of numbers as histograms."""
        for name, value in values.items():
            if isinstance(value, dict):
                self._log_mapping(name, value, step, kwargs)
            else:
                self._log_value(name, value, step, kwargs)

    def _log_mapping(self, name: str, parts: dict[str, Any], step: int | None, settings: dict[str, Any]) -> None:
        """Write numbers in one plot, and anything else as `name/part`."""
        curves = {part: value for part, value in parts.items() if isinstance(value, Real)}
        if curves:
            self._run.add_scalars(name, curves, step)
        rest = {f"{name}/{part}": value for part, value in parts.items() if part not in curves}
        self.log(rest, step, **settings)

    def _log_value(self, name: str, value: Any, step: int | None, settings: dict[str, Any]) -> None:
        if isinstance(value, Real):
            self._run.add_scalar(name, value, step, **settings)
        elif isinstance(value, str):
            self._run.add_text(name, value, step)
        elif getattr(value, "size", 0) and value.dtype.kind in "biuf":
            self._run.add_histogram(name, value, step)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Write batches of images; `dataformats` gives their layout, NHWC by default."""
        import numpy as np

        for name, images in values.items():
            self._run.add_images(name, np.stack(list(images)), step, **{"dataformats": "NHWC", **kwargs})

    def log_table(
        self,
        table_name: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the table as Markdown text."""
        names, rows = (columns or (), data or ()) if dataframe is None else (dataframe.columns, dataframe.values)
        lines = [list(names), ["---"] * len(names), *rows]
        self._run.add_text(table_name, "\n".join("|" + "|".join(map(str, line)) + "|" for line in lines), step)

    def finish(self) -> None:
        """Close the event file."""
        self._run.close()
