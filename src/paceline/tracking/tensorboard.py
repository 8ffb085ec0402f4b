"""Tracker for TensorBoard: event files under `<folder>/<project>`."""

from __future__ import annotations

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
        """Write numbers as scalars, mappings as scalars in one plot, text as text, arrays as histograms."""
        for name, value in values.items():
            if isinstance(value, bool | int | float):
                self._run.add_scalar(name, value, step, **kwargs)
            elif isinstance(value, str):
                self._run.add_text(name, value, step)
            elif isinstance(value, dict):
                self._run.add_scalars(name, value, step)
            elif hasattr(value, "shape"):
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
