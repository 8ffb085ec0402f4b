"""The tracker protocol: derive from `GeneralTracker` to add a tracker of your own."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["Backend", "BlankTracker", "GeneralTracker", "TableBackend", "missing_parts"]

# Not the rank-aware logger: commands that need no torch import this module.
logger = logging.getLogger(__name__)


class GeneralTracker:
    """Base class of trackers, which record a run somewhere.

    A subclass sets `name` and `requires_logging_directory`, and implements `tracker`, `store_init_configuration` and
    `log`. Pass an instance to `Accelerator(log_with=...)`. All methods are called on rank 0 only, unless
    `main_process_only` is False.

    >>> class PrintTracker(GeneralTracker):
    ...     name = "print"
    ...     requires_logging_directory = False
    ...
    ...     @property
    ...     def tracker(self):
    ...         return self
    ...
    ...     def store_init_configuration(self, values):
    ...         print(values)
    ...
    ...     def log(self, values, step=None, **kwargs):
    ...         print(step, values)
    >>> PrintTracker().log({"loss": 0.5}, step=3)
    3 {'loss': 0.5}

    Attributes:
        name: The name by which `get_tracker` returns it.
        requires_logging_directory: Whether it needs `project_dir` or `logging_dir`.
        main_process_only: Whether only rank 0 uses it; otherwise every rank that calls `init_trackers` does.
        crashed: Set to True before `finish` when the script ended with an error.
    """

    name: str = ""
    requires_logging_directory: bool = False
    main_process_only: bool = True
    crashed: bool = False

    @property
    def tracker(self) -> Any:
        """The run object of the underlying package, which `get_tracker(name, unwrap=True)` returns.

        Raises:
            NotImplementedError: The subclass does not implement it.
        """
        raise NotImplementedError

    def start(self) -> None:
        """Open the run; called once, by `init_trackers`."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the run's settings; called by `init_trackers(config=...)`.

        Args:
            values: The settings by name; may be nested.

        Raises:
            NotImplementedError: The subclass does not implement it.
        """
        raise NotImplementedError

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record the values of a step. An exception disables the tracker; the run continues without it.

        Args:
            values: Numbers and text by name. Tensors of one element have been converted to numbers, others to numpy
                arrays.
            step: The step, or None when the script passed none.
            kwargs: What the script passed in `log_kwargs` under the tracker's name.

        Raises:
            NotImplementedError: The subclass does not implement it.
        """
        raise NotImplementedError

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images; the default warns once that they are dropped.

        Args:
            values: A list of images by name, each an array of shape [height, width, channels].
            step: The step, or None when the script passed none.
            kwargs: Arguments of the underlying package.
        """
        self._warn_once("images")

    def log_table(
        self,
        table_name: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Record a table, given as columns and rows or as a data frame; the default warns once that it is dropped.

        Args:
            table_name: The table's name.
            columns: Names of the columns.
            data: The rows.
            dataframe: A pandas data frame, instead of `columns` and `data`.
            step: The step, or None when the script passed none.
            kwargs: Arguments of the underlying package.
        """
        self._warn_once("tables")

    def log_artifact(self, path: str, name: str | None = None, **kwargs: Any) -> None:
        """Store a file with the run; the default warns once that it is dropped.

        Args:
            path: The file's path.
            name: The name to store it under; None leaves it to the tracker.
            kwargs: Arguments of the underlying package.
        """
        self._warn_once("files")

    def finish(self) -> None:
        """Close the run; called once, by `end_training` or at interpreter exit."""

    def _warn_once(self, what: str) -> None:
        warned = self.__dict__.setdefault("_warned", set())
        if what not in warned:
            warned.add(what)
            logger.warning("The tracker %s does not support %s; they are dropped.", self.name, what)


_PARTS = ("name", "requires_logging_directory", "tracker", "store_init_configuration", "log")


def missing_parts(tracker: object) -> list[str]:
    """List the required members that an object lacks as a tracker.

    Args:
        tracker: Any object; it need not be derived from `GeneralTracker`.

    Returns:
        The names of the missing members; empty when the object is a tracker.
    """
    defined = {name for cls in type(tracker).__mro__ if cls is not GeneralTracker for name in vars(cls)}
    defined |= set(getattr(tracker, "__dict__", ()))
    return [part for part in _PARTS if part not in defined]


class Backend(GeneralTracker):
    """A tracker on top of a package, which is imported when the run is opened.

    Args:
        project: The project's name.
        folder: Where the tracker writes its files; None leaves it to the package.
        run_name: The run's name; None leaves it to the package.
        settings: Keyword arguments of the call that opens the run.
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
        """The run object of the underlying package."""
        return self._run

    def named(self, argument: str) -> dict[str, Any]:
        """Combine the settings with the run's name.

        Args:
            argument: The keyword argument by which the package takes the run's name.

        Returns:
            The keyword arguments; the settings take precedence.
        """
        name = {} if self.run_name is None else {argument: self.run_name}
        return {**name, **self.settings}


class TableBackend(Backend):
    """A package with a class `Table`, which its run logs like a value."""

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
        """Record a table, given as columns and rows or as a data frame.

        Args:
            table_name: The table's name.
            columns: Names of the columns.
            data: The rows.
            dataframe: A pandas data frame, instead of `columns` and `data`.
            step: The step, or None when the script passed none.
            kwargs: Ignored.
        """
        names = None
        if columns is not None:
            names = list(columns)
        rows = None
        if data is not None:
            rows = [list(row) for row in data]
        table = self._package.Table(columns=names, data=rows, dataframe=dataframe)
        self._run.log({table_name: table}, step=step)


class BlankTracker:
    """What `get_tracker` returns on ranks that record nothing: every attribute and call returns this object."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> BlankTracker:
        """Do nothing, and return this object."""
        return self

    def __bool__(self) -> bool:
        return False
