"""Saves and loads the state of a run: folders, hooks, saves in the background, and saves on a signal."""

from __future__ import annotations

import logging
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline import checkpoint as checkpoints
from paceline.accelerator.training_state.preemption import Preempted, Preemption
from paceline.environment.logging import get_logger
from paceline.errors import CheckpointError, DamagedCheckpointError, PacelineError, StateError, counted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from paceline.accelerator.stepping import Window
    from paceline.accelerator.training_state.state import TrainingState
    from paceline.checkpoint import Checkpoint
    from paceline.checkpoint.save_load import SaveTimings
    from paceline.collectives import Group
    from paceline.config import ProjectConfiguration
    from paceline.data import ActiveLoaders, LoaderStatus, PreparedDataLoader

__all__ = ["CheckpointManager", "HookHandle", "require_safe_serialization"]

_LOG = get_logger(__name__)


class HookHandle:
    """Removes a hook."""

    def __init__(self, hooks: list[Any], hook: Any) -> None:
        self._hooks, self._hook = hooks, hook

    def remove(self) -> None:
        """Remove the hook; a second call does nothing."""
        if self._hook in self._hooks:
            self._hooks.remove(self._hook)


class CheckpointManager:
    """Saves and loads the training state of one run.

    Prepared optimizers keep it alive, prepared loaders do not.

    Args:
        project: Folder and naming options.
        group: All ranks.
        take_state: Returns the training state, in live memory.
        registered: Objects of the script that checkpoints contain; `register` adds to it.
        window: The accumulation window: a state has no place for gradients.
        loaders: Count the points at which a signal may stop the run.
    """

    def __init__(
        self,
        project: ProjectConfiguration,
        group: Group,
        take_state: Callable[[], TrainingState],
        registered: list[Any],
        window: Window,
        loaders: ActiveLoaders,
    ) -> None:
        self._project = project
        self._group = group
        self._take_state = take_state
        self._registered = registered
        self._window = window
        self._loaders = loaders
        self._saver = checkpoints.Saver(group)
        self._save_hooks: list[Callable[..., Any]] = []
        self._load_hooks: list[Callable[..., Any]] = []
        self._preemption: Preemption | None = None
        self._save_on_signals()

    # What the script adds

    def register(self, *objects: Any) -> None:
        """Add objects of the script to the state.

        Args:
            *objects: Instances with `state_dict` and `load_state_dict`; known ones are ignored.

        Raises:
            StateError: Some lack these methods, or are classes; lists them.
        """
        unfit = [
            f"{_kind_of(item)} (number {index})"
            for index, item in enumerate(objects)
            if isinstance(item, type)
            or not all(callable(getattr(item, name, None)) for name in ("state_dict", "load_state_dict"))
        ]
        if unfit:
            raise StateError(
                f"{', '.join(unfit)} cannot be registered for checkpoints",
                "Objects are saved with state_dict() and restored with load_state_dict(state)",
                "Add both methods, and register instances, not classes",
            )
        self._registered.extend(item for item in objects if not any(item is known for known in self._registered))

    def add_save_hook(self, hook: Callable[..., Any]) -> HookHandle:
        """See `Accelerator.register_save_state_pre_hook`."""
        self._save_hooks.append(hook)
        return HookHandle(self._save_hooks, hook)

    def add_load_hook(self, hook: Callable[..., Any]) -> HookHandle:
        """See `Accelerator.register_load_state_pre_hook`."""
        self._load_hooks.append(hook)
        return HookHandle(self._load_hooks, hook)

    # Saving

    @property
    def times(self) -> SaveTimings | None:
        """How long the last save took on this rank; None before the first has ended."""
        return self._saver.times

    @property
    def next_iteration(self) -> int:
        """Number of the next automatically named checkpoint."""
        folder = self._numbered_folder
        if folder is None:
            return self._project.iteration
        return checkpoints.next_number(folder, self._project.iteration)

    @property
    def _numbered_folder(self) -> Path | None:
        if not self._project.automatic_checkpoint_naming or self._project.project_dir is None:
            return None
        return Path(self._project.project_dir) / "checkpoints"

    def save(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: object = True,
        *,
        blocking: bool | None = None,
    ) -> str:
        """See `Accelerator.save_state`."""
        require_safe_serialization("save_state", safe_serialization)
        self._window.require_no_gradients("save_state")
        # The folder of a save in flight is not on the disk yet, so its number is not known.
        self.wait()
        folder = self._save_folder(output_dir)
        if blocking is None:
            blocking = not self._project.save_in_background
        hook = self._run_save_hooks if self._save_hooks else None
        if hook is not None and not blocking:
            _LOG.info("%s is written at once: hooks that write files of their own are registered", folder)
            blocking = True
        self._saver.save(
            # The script may change its working directory during a save in the background.
            folder.absolute(),
            self._take_state(),
            blocking=blocking,
            prepare=hook,
            keep=self._project.total_limit,
            numbered=self._numbered_folder is not None,
        )
        return str(folder)

    def _run_save_hooks(self, state: TrainingState, folder: Path) -> TrainingState:
        """Let hooks write into the folder, and keep models out by emptying the lists that they get."""
        models = list(state.models)
        weights = [state.strategy.gather_state(model) for model in models]
        failure = None
        try:
            for hook in list(self._save_hooks):
                hook(models, weights, str(folder))
        except Exception as error:
            failure = error
        # Scripts often write, and empty the lists, on the main process only.
        num_left = min(self._group.all_gather_object(len(weights)))
        if failure is not None:
            raise failure
        return state.without_weights(state.models[num_left:])

    def _save_folder(self, output_dir: str | os.PathLike[str] | None) -> Path:
        numbered = self._numbered_folder
        if numbered is None:
            if output_dir is None:
                raise CheckpointError(
                    "save_state() was called without a folder",
                    "Only ProjectConfiguration(automatic_checkpoint_naming=True) names checkpoints automatically",
                    "Pass a folder, or create the Accelerator with such a project_config",
                )
            return _expanded(output_dir)
        if output_dir is not None:
            raise CheckpointError(
                f"save_state({os.fspath(output_dir)!r}) was called with automatic_checkpoint_naming",
                f"Checkpoints are then numbered in {numbered}, and the folder would be ignored",
                "Omit the folder, or turn automatic_checkpoint_naming off",
            )
        number = self._group.broadcast_object(self.next_iteration if self._group.rank == 0 else 0)
        return numbered / f"checkpoint_{number}"

    @property
    def before_step(self) -> Callable[[], None]:
        """What optimizers call before each step: `Saver.before_step`."""
        return self._saver.before_step

    def wait(self) -> None:
        """Wait for the save in flight; see `Saver.wait`."""
        self._saver.wait()

    def release(self) -> None:
        """Wait for the save in flight, and give host memory back."""
        self._disarm()
        try:
            self._saver.release()
        finally:
            self._save_on_signals()

    # Loading

    def load(
        self,
        input_dir: str | os.PathLike[str] | None,
        load_kwargs: Mapping[str, Any] | None,
        map_location: object,
        *,
        strict: bool,
        progress: bool,
    ) -> str | None:
        """See `Accelerator.load_state`."""
        _refuse_reader_options(load_kwargs, map_location)
        self.wait()
        if input_dir is not None:
            folder = _expanded(input_dir)
            if self._is_foreign(folder):
                return self._import_foreign(folder, strict=strict, progress=progress)
            self._load(self._open(folder), strict=strict, progress=progress)
            return str(folder)
        return self._load_newest(self._project_folder(), strict=strict, progress=progress)

    def _load(self, checkpoint: Checkpoint, *, strict: bool, progress: bool) -> None:
        self._run_load_hooks(checkpoint.folder).load(checkpoint, strict=strict, progress=progress)

    def _run_load_hooks(self, folder: Path) -> TrainingState:
        """Let hooks load models themselves: those that they remove from the end of the list."""
        state = self._take_state()
        models = list(state.models)
        for hook in list(self._load_hooks):
            hook(models, str(folder))
        return state.without_weights(state.models[len(models) :])

    def _is_foreign(self, folder: Path) -> bool:
        """Whether all ranks see a training state of another library in this folder."""
        return all(self._group.all_gather_object(checkpoints.is_foreign_state(folder)))

    def _import_foreign(self, folder: Path, *, strict: bool, progress: bool) -> str:
        from paceline.accelerator.training_state.migration import import_foreign_state

        state = self._run_load_hooks(folder)
        for line in import_foreign_state(state, folder, strict=strict, progress=progress):
            _LOG.log(logging.WARNING if line.startswith("skipped") else logging.INFO, "%s: %s", folder.name, line)
        return str(folder)

    def _project_folder(self) -> Path:
        if self._project.project_dir is None:
            raise CheckpointError(
                "load_state() was called without a folder",
                "Without project_dir there is no folder to find the newest checkpoint in",
                "Pass a folder, or Accelerator(project_dir=…)",
            )
        return Path(self._project.project_dir)

    def _open(self, folder: Path) -> Checkpoint:
        """Open a checkpoint that is complete and the same on all ranks."""
        opened: Checkpoint | None = None
        problem = ""
        try:
            opened = checkpoints.open_checkpoint(folder)
        except PacelineError as error:
            problem = f"rank {self._group.rank}: {error}"
        of_ranks = self._group.all_gather_object((problem, opened.manifest.id if opened else ""))
        problems = [text for text, _ in of_ranks if text]
        if not problems and len({save_id for _, save_id in of_ranks}) > 1:
            problems = ["the ranks see checkpoints of different saves under this name"]
        if problems or opened is None:
            raise DamagedCheckpointError(_unopened(folder), problems[0], "")
        return opened

    def _load_newest(self, project: Path, *, strict: bool, progress: bool) -> str | None:
        """Load the newest complete checkpoint, with a warning for each newer one that is damaged."""
        paths = [entry.folder.relative_to(project) for entry in checkpoints.find_checkpoints(project)]
        skipped = 0
        for path in self._group.broadcast_object(paths):
            try:
                checkpoint = self._open(project / path)
                self._load(checkpoint, strict=strict, progress=progress)
            except DamagedCheckpointError as error:
                skipped += 1
                # Its name comes first already.
                _LOG.warning("skipped %s: %s", path.name, str(error).removeprefix(f"{_unopened(project / path)}. "))
                continue
            _LOG.info("resumed from %s", project / path)
            return str(project / path)
        for other in checkpoints.find_foreign(project)[:1]:
            _LOG.warning("skipped %s: another library wrote it; load_state('%s') imports it", other.name, other)
        if skipped:
            raise DamagedCheckpointError(
                f"{project} has {counted(skipped, 'checkpoint')}, and none is complete",
                "The warnings above say what is wrong with each",
                "Restore one, or move them away to start from scratch",
            )
        return None

    # Signals

    def on_preemption(self, save: Callable[[], Any] | None, loader: PreparedDataLoader | None) -> None:
        """See `Accelerator.on_preemption`."""
        self._disarm()
        if save is not None:
            self._arm(save, loader)

    def _save_on_signals(self) -> None:
        """Save and exit on a signal, where checkpoints are numbered."""
        itself = weakref.ref(self)

        def save() -> None:
            manager = itself()
            if manager is not None:
                manager.save(blocking=True)

        if self._numbered_folder is not None:
            self._arm(save, None)

    def _arm(self, save: Callable[[], Any], loader: PreparedDataLoader | None) -> None:
        """Let a signal on any rank call `save` on all, and end the run, before a batch between two steps.

        Args:
            save: Saves the state.
            loader: Whose batches; None for those of all loaders.
        """
        if not self._project.save_on_signals:
            return
        # Signal handlers and loaders keep these functions alive, which must not keep models alive in turn.
        itself, window = weakref.ref(self), self._window
        only = None if loader is None else weakref.ref(loader)

        def act() -> None:
            save()
            manager = itself()
            if manager is not None:
                manager.wait()
            raise Preempted

        preemption = self._preemption = Preemption(self._group, self._project.save_on_signals, act)

        def reach_point(read: LoaderStatus) -> None:
            if not window.has_gradients and (only is None or only() is read):
                preemption.reach_point()

        self._loaders.before_batch = reach_point

    def _disarm(self) -> None:
        """Restore what signals did before."""
        if self._preemption is not None:
            self._preemption.close()
            self._preemption = None
        self._loaders.before_batch = None


def _kind_of(item: object) -> str:
    if isinstance(item, type):
        return f"the class {item.__name__}"
    return type(item).__name__


def require_safe_serialization(method: str, safe_serialization: object) -> None:
    """Refuse to write pickles.

    Raises:
        PacelineError: It is not True.
    """
    if safe_serialization is not True:
        raise PacelineError(
            f"{method}(safe_serialization={safe_serialization!r})",
            "Only True is possible: pickled weights run code when they are loaded",
            "Leave it out: the weights are written as safetensors",
        )


def _refuse_reader_options(load_kwargs: Mapping[str, Any] | None, map_location: object) -> None:
    """Refuse options that would have no effect."""
    if load_kwargs:
        raise PacelineError(
            f"load_state(load_kwargs={dict(load_kwargs)!r})",
            "They are options for reading pickles, which paceline never does",
            "Leave them out",
        )
    if map_location not in (None, "cpu", "on_device"):
        raise PacelineError(
            f"load_state(map_location={map_location!r})",
            "Tensors are read to the device of the prepared objects",
            "Leave it out, or write 'cpu' or 'on_device', which are the same here",
        )


def _expanded(folder: str | os.PathLike[str]) -> Path:
    """The folder with `~` replaced by the user's home."""
    return Path(os.path.expanduser(folder))  # noqa: PTH111 - Path.expanduser refuses names such as ~backup


def _unopened(folder: Path) -> str:
    return f"{folder} cannot be loaded"
