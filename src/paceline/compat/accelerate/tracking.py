"""Trackers of experiments, with Accelerate's constructors. The core's trackers do the work."""

from __future__ import annotations

import enum
import functools
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from paceline.compat.accelerate.settings.enums import LoggerType
from paceline.compat.accelerate.settings.errors import InvalidValueError, UnsupportedError
from paceline.compat.accelerate.settings.variables import maybe_flag
from paceline.compat.accelerate.state import PartialState
from paceline.compat.accelerate.utils import imports
from paceline.compat.accelerate.utils.operations import listify
from paceline.tracking.clearml import plot_and_curve
from paceline.tracking.log_values import to_json
from paceline.tracking.registry import load_backend

if TYPE_CHECKING:
    from paceline.tracking.base import Backend

__all__ = [
    "LOGGER_TYPE_TO_CLASS",
    "AimTracker",
    "ClearMLTracker",
    "CometMLTracker",
    "DVCLiveTracker",
    "GeneralTracker",
    "MLflowTracker",
    "SwanLabTracker",
    "TensorBoardTracker",
    "TrackioTracker",
    "WandBTracker",
    "filter_trackers",
    "get_available_trackers",
    "on_main_process",
    "register_tracker_class",
]

F = TypeVar("F", bound=Callable[..., Any])
_LOG = logging.getLogger(__name__.removeprefix("paceline.compat."))  # programs filter "accelerate"
_IS_INSTALLED = {
    LoggerType.TENSORBOARD: imports.is_tensorboard_available,
    LoggerType.WANDB: imports.is_wandb_available,
    LoggerType.COMETML: imports.is_comet_ml_available,
    LoggerType.AIM: imports.is_aim_available,
    LoggerType.MLFLOW: imports.is_mlflow_available,
    LoggerType.CLEARML: imports.is_clearml_available,
    LoggerType.DVCLIVE: imports.is_dvclive_available,
    LoggerType.SWANLAB: imports.is_swanlab_available,
    LoggerType.TRACKIO: imports.is_trackio_available,
}


def on_main_process(function: F) -> F:
    """Make a tracker's method run on rank 0 only, if the tracker's `main_process_only` says so."""

    @functools.wraps(function)
    def limited(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "main_process_only", False) and not PartialState().is_main_process:
            return None
        return function(self, *args, **kwargs)

    return limited  # type: ignore[return-value]


class _SettingsDumper(yaml.SafeDumper):
    """Writes plain YAML; what it has no notation for becomes a number, a list or text."""

    def represent_other(self, value: Any) -> yaml.Node:
        """Represent a value of any type that YAML does not know."""
        portable = value.value if isinstance(value, enum.Enum) else to_json(value)
        if type(portable) not in self.yaml_representers:
            portable = str(portable)
        return self.represent_data(portable)


_SettingsDumper.add_multi_representer(object, _SettingsDumper.represent_other)


class GeneralTracker:
    """Base class of trackers. A subclass sets `name` and `requires_logging_directory`, and defines `tracker`.

    Attributes:
        name: The name by which `get_tracker` returns it.
        requires_logging_directory: Whether it needs a folder.
        main_process_only: Whether only rank 0 uses it.
    """

    name: str
    requires_logging_directory: bool
    main_process_only: bool = True

    def __init__(self, _blank: bool = False) -> None:
        needed = () if _blank else ("name", "requires_logging_directory", "tracker")
        if missing := [name for name in needed if name not in dir(self)]:
            raise UnsupportedError(
                f"The tracker {type(self).__name__} has no {' and no '.join(missing)}",
                "The Accelerator uses them",
                "Define them in the class",
            )

    def start(self) -> None:
        """Open the run; `init_trackers` calls it."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the run's settings.

        Args:
            values: The settings by name.
        """

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record the values of a step.

        Args:
            values: Numbers and text by name.
            step: The step.
            **kwargs: Arguments of the underlying package.
        """

    def finish(self) -> None:
        """Close the run; `end_training` calls it."""


class _BackendTracker(GeneralTracker):
    """A tracker that one of the core's does the work for."""

    requires_logging_directory: bool = False
    name: str = ""
    _backend: Backend

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.init_kwargs = kwargs

    def _open(self, folder: str | os.PathLike[str] | None = None, **settings: Any) -> None:
        location = None if folder is None else Path(folder)
        self._backend = load_backend(self.name)(self.run_name, location, None, {**self.init_kwargs, **settings})
        self._backend.start()

    @property
    def tracker(self) -> Any:
        """The run object of the underlying package."""
        return self._backend.tracker

    @on_main_process
    def start(self) -> None:
        """Open the run."""
        self._open()

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the run's settings.

        Args:
            values: The settings by name.
        """
        self._backend.store_init_configuration(values)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record the values of a step.

        Args:
            values: Numbers, text and dicts of those, by name; tensors become numbers or lists.
            step: The step.
            **kwargs: Arguments of the underlying package.
        """
        self._backend.log(listify(values), step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        """Close the run."""
        self._backend.finish()


class _ImageTracker(_BackendTracker):
    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images.

        Args:
            values: Images by name.
            step: The step.
            **kwargs: Arguments of the underlying package.
        """
        self._backend.log_images(values, step, **kwargs)


class _TableTracker(_ImageTracker):
    @on_main_process
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
            dataframe: A pandas data frame, instead.
            step: The step.
            **kwargs: Arguments of the underlying package.
        """
        self._backend.log_table(table_name, columns, data, dataframe, step, **kwargs)


class TensorBoardTracker(_ImageTracker):
    """Event files under `<logging_dir>/<run_name>`; settings are those of `SummaryWriter`.

    Args:
        run_name: The name of the project.
        logging_dir: The folder.
        **kwargs: Arguments of `SummaryWriter`.
    """

    name = "tensorboard"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str], **kwargs: Any) -> None:
        super().__init__(run_name, **kwargs)
        self.logging_dir = Path(logging_dir) / run_name
        self._folder = logging_dir

    @on_main_process
    def start(self) -> None:
        """Open an event file."""
        self._open(self._folder)

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Write the settings as hyper-parameters, and as `hparams.yml` in a folder named by the time.

        Args:
            values: The settings by name.
        """
        super().store_init_configuration(values)
        folder = self.logging_dir / str(time.time())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hparams.yml").write_text(yaml.dump(values, Dumper=_SettingsDumper), encoding="utf-8")

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Write batches of images, [samples, channels, height, width] unless `dataformats` says otherwise.

        Args:
            values: Batches of images by name.
            step: The step.
            **kwargs: Arguments of `SummaryWriter.add_images`.
        """
        super().log_images(values, step, **{"dataformats": "NCHW", **kwargs})


class WandBTracker(_TableTracker):
    """A run of `wandb`; settings are those of `wandb.init`."""

    name = "wandb"
    main_process_only = False


class TrackioTracker(_BackendTracker):
    """A run of `trackio`; settings are those of `trackio.init`."""

    name = "trackio"
    main_process_only = False


class CometMLTracker(_BackendTracker):
    """An experiment of `comet_ml`; settings are those of `comet_ml.start`."""

    name = "comet_ml"


class SwanLabTracker(_ImageTracker):
    """A run of `swanlab`; settings are those of `swanlab.init`."""

    name = "swanlab"


class AimTracker(_BackendTracker):
    """A run of `aim`; settings are those of `aim.Run`.

    Args:
        run_name: The run's name.
        logging_dir: The folder of the repository.
        **kwargs: Arguments of `aim.Run`.
    """

    name = "aim"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str] | None = ".", **kwargs: Any) -> None:
        super().__init__(run_name, **kwargs)
        self.aim_repo_path = logging_dir

    @on_main_process
    def start(self) -> None:
        """Open a run."""
        self._open(self.aim_repo_path or ".")
        self.tracker.name = self.run_name

    @on_main_process
    def log_images(
        self, values: dict[str, Any], step: int | None = None, kwargs: dict[str, dict[str, Any]] | None = None
    ) -> None:
        """Record images.

        Args:
            values: An image by name, or a pair of image and caption.
            step: The step.
            kwargs: Arguments of `aim.Image` and of `Run.track`, as {"aim_image": {...}, "track": {...}}.
        """
        kwargs = kwargs or {}
        make_image = import_module("aim").Image
        for name, value in values.items():
            image, caption = value if isinstance(value, tuple) else (value, "")
            shown = make_image(image, caption=caption, **kwargs.get("aim_image", {}))
            self.tracker.track(shown, name=name, step=step, **kwargs.get("track", {}))


class MLflowTracker(_BackendTracker):
    """A run of `mlflow`. `MLFLOW_EXPERIMENT_NAME`, `_RUN_ID`, `_TAGS` and `_NESTED_RUN` go before the arguments.

    Args:
        experiment_name: The experiment, which is made if it does not exist.
        logging_dir: Where a new experiment keeps its artifacts.
        run_id: A run to continue.
        tags: Tags of the run, as a dict or JSON.
        nested_run: Start the run inside the active one.
        run_name: The run's name.
        description: What the run is about.
    """

    name = "mlflow"

    def __init__(
        self,
        experiment_name: str | None = None,
        logging_dir: str | os.PathLike[str] | None = None,
        run_id: str | None = None,
        tags: dict[str, Any] | str | None = None,
        nested_run: bool | None = False,
        run_name: str | None = None,
        description: str | None = None,
    ) -> None:
        GeneralTracker.__init__(self)
        nested = maybe_flag("MLFLOW_NESTED_RUN")
        tags = os.environ.get("MLFLOW_TAGS", tags)
        self.experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment_name
        self.logging_dir = logging_dir
        self.run_id = os.environ.get("MLFLOW_RUN_ID") or run_id
        self.tags: dict[str, Any] | None = json.loads(tags) if isinstance(tags, str) else tags
        self.nested_run = bool(nested_run) if nested is None else nested
        self.description = description
        self.init_kwargs = {}
        self.run_name = run_name  # type: ignore[assignment]

    @on_main_process
    def start(self) -> None:
        """Start a run, which the core's tracker then finds active."""
        mlflow = import_module("mlflow")
        experiment = mlflow.get_experiment_by_name(self.experiment_name) if self.experiment_name else None
        identity = experiment.experiment_id if experiment is not None else None
        if identity is None and self.experiment_name:
            location = None if self.logging_dir is None else str(self.logging_dir)
            identity = mlflow.create_experiment(self.experiment_name, artifact_location=location, tags=self.tags)
        mlflow.start_run(
            run_id=self.run_id,
            experiment_id=identity,
            run_name=self.run_name,
            nested=self.nested_run,
            tags=self.tags,
            description=self.description,
        )
        self._open()

    @property
    def active_run(self) -> Any:
        """The run of `mlflow`."""
        return self.tracker

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the run's settings, without those that are longer than MLflow allows.

        Args:
            values: The settings by name.
        """
        longest = import_module("mlflow").utils.validation.MAX_PARAM_VAL_LENGTH
        too_long = [name for name, value in values.items() if len(str(value)) > longest]
        if too_long:
            _LOG.warning("MLflow stores %s characters for a setting: %s left out.", longest, ", ".join(too_long))
        super().store_init_configuration({name: value for name, value in values.items() if name not in too_long})

    @on_main_process
    def log_figure(self, figure: Any, artifact_file: str, **save_kwargs: Any) -> None:
        """Store a figure of matplotlib or plotly.

        Args:
            figure: The figure.
            artifact_file: Its name in the run.
            **save_kwargs: Arguments of `mlflow.log_figure`.
        """
        import_module("mlflow").log_figure(figure, artifact_file, **save_kwargs)

    @on_main_process
    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Store the files of a folder.

        Args:
            local_dir: The folder.
            artifact_path: The folder in the run.
        """
        import_module("mlflow").log_artifacts(local_dir, artifact_path)

    @on_main_process
    def log_artifact(self, local_path: str, artifact_path: str | None = None) -> None:
        """Store a file.

        Args:
            local_path: The file.
            artifact_path: The folder in the run.
        """
        import_module("mlflow").log_artifact(local_path, artifact_path)

    @on_main_process
    def finish(self) -> None:
        """End the run."""
        import_module("mlflow").end_run()


class ClearMLTracker(_TableTracker):
    """A task of `clearml`; settings are those of `Task.init`.

    Args:
        run_name: Name of project and task, unless `CLEARML_PROJECT` or `CLEARML_TASK` is set.
        **kwargs: Arguments of `Task.init`.
    """

    name = "clearml"

    def __init__(self, run_name: str | None = None, **kwargs: Any) -> None:
        super().__init__(run_name or "", **kwargs)

    @on_main_process
    def start(self) -> None:
        """Open a task, or use the one that is open."""
        names = {"project_name": "CLEARML_PROJECT", "task_name": "CLEARML_TASK"}
        given = {key: os.environ[variable] for key, variable in names.items() if variable in os.environ}
        self._open(**{key: value for key, value in given.items() if key not in self.init_kwargs})

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the run's settings as the configuration of the task.

        Args:
            values: The settings by name.
        """
        self.tracker.connect_configuration(values)

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images.

        Args:
            values: One image by name: an array, an image of PIL, or a path.
            step: The step.
            **kwargs: Arguments of `Logger.report_image`.
        """
        for name, image in values.items():
            title, series = plot_and_curve(name)
            self.tracker.get_logger().report_image(title=title, series=series, iteration=step, image=image, **kwargs)


class DVCLiveTracker(_BackendTracker):
    """A run of `dvclive`; settings are those of `Live`.

    Args:
        run_name: Ignored; DVC names runs itself.
        live: A run that is open already.
        **kwargs: Arguments of `Live`.
    """

    name = "dvclive"

    def __init__(self, run_name: str | None = None, live: Any = None, **kwargs: Any) -> None:
        super().__init__(run_name or "", **kwargs)
        self.live = live

    @on_main_process
    def start(self) -> None:
        """Open a run, or use the program's."""
        self._open(**({} if self.live is None else {"live": self.live}))
        self.live = self.tracker

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record the numbers and texts of a step, and advance to the next.

        Args:
            values: Numbers and texts by name; anything else is left out.
            step: The step.
            **kwargs: Arguments of `Live.log_metric`.
        """
        can_log = import_module("dvclive.plots").Metric.could_log
        if step is not None:
            self.live.step = step
        for name, value in listify(values).items():
            if can_log(value):
                self.live.log_metric(name, value, **kwargs)
            else:
                _LOG.warning("dvclive records numbers and texts: %s is a %s, and left out.", name, type(value).__name__)
        self.live.next_step()


LOGGER_TYPE_TO_CLASS: dict[str, type[GeneralTracker]] = {
    tracker.name: tracker
    for tracker in (
        AimTracker,
        CometMLTracker,
        MLflowTracker,
        TensorBoardTracker,
        WandBTracker,
        ClearMLTracker,
        DVCLiveTracker,
        SwanLabTracker,
        TrackioTracker,
    )
}
"""The trackers by the names that `log_with` takes."""


def get_available_trackers() -> list[LoggerType]:
    """Return the trackers whose packages are installed."""
    return [kind for kind, is_installed in _IS_INSTALLED.items() if is_installed()]


def register_tracker_class(tracker_class: type[GeneralTracker]) -> None:
    """Let `log_with` accept a tracker of your own by its name.

    Args:
        tracker_class: Takes the project's name, and the folder if it requires one.

    Raises:
        InvalidValueError: It is no subclass of `GeneralTracker`, or lacks `name` or `requires_logging_directory`.
    """
    is_tracker = isinstance(tracker_class, type) and issubclass(tracker_class, GeneralTracker)
    name = getattr(tracker_class, "name", None)
    if not is_tracker or not name or not hasattr(tracker_class, "requires_logging_directory"):
        raise InvalidValueError(
            f"{tracker_class!r} is to become a tracker",
            "A tracker derives from GeneralTracker and has a name and requires_logging_directory",
            "Define them in the class",
        )
    if name in LOGGER_TYPE_TO_CLASS:
        warnings.warn(f"{tracker_class.__name__} replaces the tracker {name}", stacklevel=2)
    LOGGER_TYPE_TO_CLASS[name] = tracker_class


def filter_trackers(
    log_with: str | LoggerType | GeneralTracker | Sequence[str | LoggerType | GeneralTracker] | None,
    logging_dir: str | os.PathLike[str] | None = None,
) -> list[Any]:
    """Return the requested trackers, each once, without those whose packages are missing.

    Args:
        log_with: A name, "all", a tracker, or a list of these.
        logging_dir: The folder, for those that require one.

    Raises:
        InvalidValueError: There is no such tracker, or the folder is missing.
    """
    requested: list[Any] = [] if log_with is None else [log_with]
    if isinstance(log_with, list | tuple):
        requested = list(log_with)
    if any(item in ("all", LoggerType.ALL) for item in requested):
        return [item for item in requested if isinstance(item, GeneralTracker)] + get_available_trackers()
    chosen: list[Any] = []
    for item in requested:
        kind = item if isinstance(item, GeneralTracker) else _known_kind(item, logging_dir)
        if kind is not None and kind not in chosen:
            chosen.append(kind)
    return chosen


def _known_kind(item: str | LoggerType, logging_dir: str | os.PathLike[str] | None) -> Any:
    """The tracker that a name stands for, or None if its package is missing."""
    kind: Any = LoggerType(item) if item in LoggerType else item
    if str(kind) not in LOGGER_TYPE_TO_CLASS:
        raise InvalidValueError(
            f"log_with is {item!r}", "There is no such tracker", f"Use one of {', '.join(LOGGER_TYPE_TO_CLASS)}, or all"
        )
    if kind in _IS_INSTALLED and not _IS_INSTALLED[kind]():
        _LOG.warning("The tracker %s is left out: its package is not installed.", kind)
        return None
    if LOGGER_TYPE_TO_CLASS[str(kind)].requires_logging_directory and logging_dir is None:
        raise InvalidValueError(
            f"Logging with `{item}` requires a `logging_dir`, and there is none",
            "It writes its files there",
            "Pass project_dir, or ProjectConfiguration(logging_dir=...)",
        )
    return kind
