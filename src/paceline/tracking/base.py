"""What a tracker is: derive from `GeneralTracker` to bring your own."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["Backend", "BlankTracker", "GeneralTracker", "TableBackend", "missing_parts"]

# Not the logger that knows its rank: this room is read by commands that need no torch.
logger = logging.getLogger(__name__)


class GeneralTracker:
    """A place where a run is recorded.

    A subclass sets `name` and `requires_logging_directory`, and has `tracker`, `store_init_configuration` and `log`.
    An object of it is what `Accelerator(log_with=...)` takes.

    Attributes:
        name: By which `get_tracker` finds it.
        requires_logging_directory: Whether it cannot do without `project_dir` or `logging_dir`.
        main_process_only: Whether only rank 0 talks to it; else every rank that calls `init_trackers` does.
        crashed: Set before `finish` when the script ended with an error.
    """

    name: str = ""
    requires_logging_directory: bool = False
    main_process_only: bool = True
    crashed: bool = False

    @property
    def tracker(self) -> Any:
        """The object of the package behind it."""
        raise NotImplementedError

    def start(self) -> None:
        """Open the run; called once, by `init_trackers`."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the settings of the run."""
        raise NotImplementedError

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record numbers and text of a step; tensors have become numbers, or numpy arrays, before."""
        raise NotImplementedError

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record lists of images, each an array of shape [height, width, channels]."""
        self._tell_once("images")

    def log_table(
        self,
        table_name: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Record a table, given as names and rows, or as a data frame of pandas."""
        self._tell_once("tables")

    def log_artifact(self, path: str, name: str | None = None, **kwargs: Any) -> None:
        """Keep a file with the run."""
        self._tell_once("files")

    def finish(self) -> None:
        """Close the run; called once."""

    def _tell_once(self, what: str) -> None:
        told = self.__dict__.setdefault("_told", set())
        if what not in told:
            told.add(what)
            logger.warning("The tracker %s takes no %s; they are left out.", self.name, what)


_PARTS = ("name", "requires_logging_directory", "tracker", "store_init_configuration", "log")


def missing_parts(tracker: object) -> list[str]:
    """What an object lacks of a tracker; it need not be derived from `GeneralTracker`."""
    own = {name for cls in type(tracker).__mro__ if cls is not GeneralTracker for name in vars(cls)}
    own |= set(getattr(tracker, "__dict__", ()))
    return [part for part in _PARTS if part not in own]


class Backend(GeneralTracker):
    """A tracker on a package of its own, which is imported when the run is opened.

    Args:
        project: The run's project.
        folder: Where trackers keep their files; None leaves it to the package.
        run_name: The run's name; None leaves it to the package.
        settings: Passed on to what opens the run.
    """

    def __init__(
        self, project: str, folder: Path | None, run_name: str | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.project = project
        self.folder = folder
        self.run_name = run_name
        self.settings = dict(settings or {})
        self._run: Any = None

    @property
    def tracker(self) -> Any:
        """The object of the package behind it."""
        return self._run

    def named(self, argument: str) -> dict[str, Any]:
        """The settings, and the run's name under the argument by which the package takes it."""
        name = {} if self.run_name is None else {argument: self.run_name}
        return {**name, **self.settings}


class TableBackend(Backend):
    """A package with a class `Table` of columns, data or a data frame, which its run logs like a value."""

    _package: Any

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
        named = None if columns is None else list(columns)
        rows = None if data is None else [list(row) for row in data]
        table = self._package.Table(columns=named, data=rows, dataframe=dataframe)
        self._run.log({table_name: table}, step=step)


class BlankTracker:
    """Stands on ranks that record nothing for what `get_tracker` gives on the others: every call does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> BlankTracker:
        """Do nothing, and stand for whatever it would have given."""
        return self

    def __bool__(self) -> bool:
        return False
