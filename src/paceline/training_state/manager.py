"""When and where a run's state is saved and loaded: folder names, hooks, background saves and preemption."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.checkpoint import (
    Saver,
    find_checkpoints,
    find_foreign,
    is_foreign_state,
    next_number,
    open_checkpoint,
)
from paceline.environment.logging import get_logger
from paceline.errors import CheckpointError, DamagedCheckpointError, PacelineError, StateError
from paceline.training_state.preemption import Preempted, Preemption

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.checkpoint import Checkpoint
    from paceline.checkpoint.save_load import SaveTimings
    from paceline.collectives import Group
    from paceline.config import ProjectConfiguration
    from paceline.training_state.state import TrainingState

__all__ = ["Checkpointing", "HookHandle"]

_LOG = get_logger(__name__)


class HookHandle:
    """Removes a registered hook."""

    def __init__(self, hooks: list[Any], hook: Any) -> None:
        self._hooks, self._hook = hooks, hook

    def remove(self) -> None:
        """Remove the hook. Does nothing if it was removed before."""
        if self._hook in self._hooks:
            self._hooks.remove(self._hook)


class Checkpointing:
    """Saves and loads the state of one run.

    Args:
        project: Folder and naming options.
        group: All ranks.

    Attributes:
        custom: Objects registered by the script, in that order.
    """

    def __init__(self, project: ProjectConfiguration, group: Group) -> None:
        self.custom: list[Any] = []
        self._project = project
        self._group = group
        self._saver = Saver(group)
        self._save_hooks: list[Callable[..., Any]] = []
        self._load_hooks: list[Callable[..., Any]] = []
        self._preemption: Preemption | None = None

    # Registered objects and hooks

    def register(self, *objects: Any) -> None:
        """Add objects of the script to the state.

        Args:
            *objects: Instances with `state_dict` and `load_state_dict`; known ones are ignored.

        Raises:
            StateError: Some lack these methods, or are classes; lists them.
        """
        unfit = [
            f"{f'the class {item.__name__}' if isinstance(item, type) else type(item).__name__} (number {index})"
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
        self.custom.extend(item for item in objects if not any(item is known for known in self.custom))

    def on_save(self, hook: Callable[..., Any]) -> HookHandle:
        """Call `hook(models, weights, folder)` before each save; returns a handle that removes it."""
        self._save_hooks.append(hook)
        return HookHandle(self._save_hooks, hook)

    def on_load(self, hook: Callable[..., Any]) -> HookHandle:
        """Call `hook(models, folder)` before each load; returns a handle that removes it."""
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
        return self._project.iteration if folder is None else next_number(folder, self._project.iteration)

    @property
    def _numbered_folder(self) -> Path | None:
        if not self._project.automatic_checkpoint_naming or self._project.project_dir is None:
            return None
        return Path(self._project.project_dir) / "checkpoints"

    def save(
        self, state: TrainingState, output_dir: str | os.PathLike[str] | None, *, blocking: bool | None = None
    ) -> str:
        """Save a state; see `Accelerator.save_state`.

        Collective: every rank must call it.
        """
        # The number of a save in flight is not on the disk yet.
        self.wait()
        folder = self._save_folder(output_dir)
        is_blocking = not self._project.save_in_background if blocking is None else blocking
        hook = self._run_save_hooks if self._save_hooks else None
        if hook is not None and not is_blocking:
            _LOG.info("saving %s in the foreground: registered hooks may write files of their own", folder)
            is_blocking = True
        self._saver.save(
            # The script may change its working directory during a background save.
            folder.absolute(),
            state,
            blocking=is_blocking,
            prepare=hook,
            keep=self._project.total_limit,
            numbered=self._numbered_folder is not None,
        )
        return str(folder)

    def _run_save_hooks(self, state: TrainingState, folder: Path) -> TrainingState:
        """Call the hooks. They may write into the folder, and empty `weights` to save those models themselves."""
        models = list(state.models)
        weights = [state.strategy.gather_state(model) for model in models]
        failure = None
        try:
            for hook in list(self._save_hooks):
                hook(models, weights, str(folder))
        except Exception as error:
            failure = error
        # Scripts often write, and empty the list, on the main process only.
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

    def before_step(self) -> None:
        """See `Saver.before_step`."""
        self._saver.before_step()

    def wait(self) -> None:
        """Wait for the save in flight; see `Saver.wait`."""
        self._saver.wait()

    def close(self) -> None:
        """Wait for the save in flight, free memory, and restore the signal handlers."""
        if self._preemption is not None:
            self._preemption.close()
            self._preemption = None
        self._saver.release()

    # Loading

    def load(
        self, state: TrainingState, input_dir: str | os.PathLike[str] | None, *, strict: bool = True
    ) -> str | None:
        """Load a state; see `Accelerator.load_state`.

        Collective: every rank must call it.
        """
        self.wait()
        if input_dir is not None:
            folder = _expanded(input_dir)
            if self._is_foreign(folder):
                return self._import_foreign(state, folder, strict=strict)
            self._load(state, self._open(folder), strict=strict)
            return str(folder)
        return self._load_newest(state, self._project_folder(), strict=strict)

    def _load(self, state: TrainingState, checkpoint: Checkpoint, *, strict: bool) -> None:
        models = list(state.models)
        for hook in list(self._load_hooks):
            hook(models, str(checkpoint.folder))
        state.without_weights(state.models[len(models) :]).load(checkpoint, strict=strict)

    def _is_foreign(self, folder: Path) -> bool:
        """Whether all ranks see a training state of another library at this path."""
        return all(self._group.all_gather_object(is_foreign_state(folder)))

    def _import_foreign(self, state: TrainingState, folder: Path, *, strict: bool) -> str:
        from paceline.training_state.migration import import_foreign_state

        models = list(state.models)
        for hook in list(self._load_hooks):
            hook(models, str(folder))
        lines = import_foreign_state(state.without_weights(state.models[len(models) :]), folder, strict=strict)
        for line in lines:
            _LOG.log(logging.WARNING if line.startswith("skipped") else logging.INFO, "%s: %s", folder.name, line)
        return str(folder)

    def _project_folder(self) -> Path:
        if self._project.project_dir is None:
            raise CheckpointError(
                "load_state() was called without a folder",
                "Without project_dir there is nowhere to look for the newest checkpoint",
                "Pass a folder, or create the Accelerator with project_dir=…",
            )
        return Path(self._project.project_dir)

    def _open(self, folder: Path) -> Checkpoint:
        """Open a checkpoint that is complete, and the same one, on all ranks."""
        checkpoint: Checkpoint | None = None
        problem = ""
        try:
            checkpoint = open_checkpoint(folder)
        except PacelineError as error:
            problem = f"rank {self._group.rank}: {error}"
        reports = self._group.all_gather_object((problem, checkpoint.manifest.id if checkpoint else ""))
        problems = [text for text, _ in reports if text]
        if not problems and len({save_id for _, save_id in reports}) > 1:
            problems = ["the ranks see checkpoints of different saves at this path"]
        if problems or checkpoint is None:
            raise DamagedCheckpointError(f"{folder} cannot be loaded", problems[0], "")
        return checkpoint

    def _load_newest(self, state: TrainingState, project: Path, *, strict: bool) -> str | None:
        """Load the newest complete checkpoint; logs a warning for each newer one that is incomplete."""
        paths = [entry.folder.relative_to(project) for entry in find_checkpoints(project)]
        skipped = 0
        for path in self._group.broadcast_object(paths):
            try:
                checkpoint = self._open(project / path)
                self._load(state, checkpoint, strict=strict)
            except DamagedCheckpointError as error:
                skipped += 1
                _LOG.warning("skipped %s: %s", path.name, error)
                continue
            _LOG.info("resumed from %s", project / path)
            return str(project / path)
        for other in find_foreign(project)[:1]:
            _LOG.warning("skipped %s: another library wrote it; load_state('%s') imports it", other.name, other)
        if skipped:
            raise DamagedCheckpointError(
                f"None of the {skipped} checkpoints in {project} is complete",
                "The warnings above say what is wrong with each",
                "Restore one of them, or move them away to start from scratch",
            )
        return None

    # Preemption

    def arm(self, save: Callable[[], Any] | None, *, always: bool = False) -> Preemption | None:
        """Save and end the run when a signal arrives.

        Args:
            save: Called on all ranks at the same batch; the run ends after it. None stops listening.
            always: Listen even if checkpoints are not named automatically.

        Returns:
            The object whose `reach_point` must be called for each batch; None if no signal is listened for.
        """
        if self._preemption is not None:
            self._preemption.close()
            self._preemption = None
        if save is not None and self._project.save_on_signals and (always or self._numbered_folder is not None):

            def act() -> None:
                save()
                self.wait()
                raise Preempted

            self._preemption = Preemption(self._group, self._project.save_on_signals, act)
        return self._preemption


def _expanded(folder: str | os.PathLike[str]) -> Path:
    """A folder name with `~` expanded."""
    return Path(os.path.expanduser(folder))  # noqa: PTH111 - Path.expanduser refuses names such as ~backup
