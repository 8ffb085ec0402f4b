"""The trackers that paceline knows, by name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from paceline.config.packages import is_installed
from paceline.errors import MissingExtraError

if TYPE_CHECKING:
    from paceline.tracking.base import Backend

__all__ = ["TRACKERS", "TrackerEntry", "load_backend"]


@dataclass(frozen=True, slots=True)
class TrackerEntry:
    """A tracker that paceline knows.

    Attributes:
        module: Module in `paceline.tracking` that defines the class `Tracker`.
        package: The package that it imports; empty when it needs none.
        extra: The extra of paceline that installs the package.
    """

    module: str
    package: str
    extra: str

    @property
    def is_installed(self) -> bool:
        """Whether its package can be imported. A folder of that name in the working directory does not count."""
        return not self.package or is_installed(self.package)

    @property
    def backend(self) -> type[Backend]:
        """Its class, which imports the package only when a run is opened."""
        tracker: type[Backend] = import_module(f"paceline.tracking.{self.module}").Tracker
        return tracker


TRACKERS: dict[str, TrackerEntry] = {
    "jsonl": TrackerEntry("files", "", ""),
    "tensorboard": TrackerEntry("tensorboard", "tensorboard", "tensorboard"),
    "wandb": TrackerEntry("wandb", "wandb", "wandb"),
    "mlflow": TrackerEntry("mlflow", "mlflow", "mlflow"),
    "comet_ml": TrackerEntry("comet", "comet_ml", "comet"),
    "aim": TrackerEntry("aim", "aim", "aim"),
    "clearml": TrackerEntry("clearml", "clearml", "clearml"),
    "dvclive": TrackerEntry("dvclive", "dvclive", "dvclive"),
    "swanlab": TrackerEntry("swanlab", "swanlab", "swanlab"),
    "trackio": TrackerEntry("trackio", "trackio", "trackio"),
}


def load_backend(name: str) -> type[Backend]:
    """Import the class of a tracker.

    Raises:
        MissingExtraError: Its package is not installed; the error names the pip command.
    """
    entry = TRACKERS[name]
    if not entry.is_installed:
        raise MissingExtraError(entry.package, entry.extra, f"The tracker {name!r}")
    return entry.backend
