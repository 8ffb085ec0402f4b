"""When and where a run's state is saved: names, hooks, the background, what is loaded, and room for others."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.checkpoint import Saver, find_checkpoints, find_foreign, next_number, open_checkpoint
from paceline.environment.logging import get_logger
from paceline.errors import CheckpointError, DamagedCheckpointError, PacelineError, StateError
from paceline.training_state.preemption import Preempted, Preemption

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.checkpoint import Checkpoint
    from paceline.checkpoint.writing import SaveTimings
    from paceline.collectives import Group
    from paceline.config import ProjectConfiguration
    from paceline.training_state.state import TrainingState

__all__ = ["Checkpointing", "HookHandle"]

_LOG = get_logger(__name__)


class HookHandle:
    """Takes a hook away again."""

    def __init__(self, hooks: list[Any], hook: Any) -> None:
        self._hooks, self._hook = hooks, hook

    def remove(self) -> None:
        """Take the hook away; again is nothing."""
        if self._hook in self._hooks:
            self._hooks.remove(self._hook)


class Checkpointing:
    """Saves and loads one run.

    Args:
        project: Where the run keeps its files.
        group: All ranks.

    Attributes:
        custom: The script's own objects, in the order in which they were registered.
    """

    def __init__(self, project: ProjectConfiguration, group: Group) -> None:
        self.custom: list[Any] = []
        self._project = project
        self._group = group
        self._saver = Saver(group)
        self._save_hooks: list[Callable[..., Any]] = []
        self._load_hooks: list[Callable[..., Any]] = []
        self._preemption: Preemption | None = None

    # What the script brings

    def register(self, *objects: Any) -> None:
        """Add objects of the script to the state.

        Raises:
            StateError: Some have no `state_dict` and `load_state_dict`; lists them.
        """
        unfit = [
            f"{f'the class {thing.__name__}' if isinstance(thing, type) else type(thing).__name__} (number {index})"
            for index, thing in enumerate(objects)
            if isinstance(thing, type)
            or not all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict"))
        ]
        if unfit:
            raise StateError(
                f"{', '.join(unfit)} cannot be registered for checkpoints",
                "Their state is taken by state_dict() and given back by load_state_dict(state)",
                "Add both methods, and register objects, not classes",
            )
        self.custom.extend(thing for thing in objects if not any(thing is known for known in self.custom))

    def on_save(self, hook: Callable[..., Any]) -> HookHandle:
        """Call a hook before each save."""
        self._save_hooks.append(hook)
        return HookHandle(self._save_hooks, hook)

    def on_load(self, hook: Callable[..., Any]) -> HookHandle:
        """Call a hook before each load."""
        self._load_hooks.append(hook)
        return HookHandle(self._load_hooks, hook)

    # Saving

    @property
    def times(self) -> SaveTimings | None:
        """Seconds that the last save took on this rank; None before the first has ended."""
        return self._saver.times

    @property
    def next_iteration(self) -> int:
        """Number of the next checkpoint that is named automatically."""
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
        """Save a state; see `Accelerator.save_state`."""
        # A save in flight has a number that is not on the disk yet.
        self.wait()
        folder = self._where_to_save(output_dir)
        now = not self._project.save_in_background if blocking is None else blocking
        hook = self._run_save_hooks if self._save_hooks else None
        if hook is not None and not now:
            _LOG.info("%s is written at once: hooks that write files of their own are registered", folder)
            now = True
        self._saver.save(
            # A save in the background must not depend on where the script works meanwhile.
            folder.absolute(),
            state,
            blocking=now,
            prepare=hook,
            keep=self._project.total_limit,
            numbered=self._numbered_folder is not None,
        )
        return str(folder)

    def _run_save_hooks(self, state: TrainingState, folder: Path) -> TrainingState:
        """Let hooks write into the folder, and take over models by emptying the lists that they get."""
        models = list(state.models)
        weights = [state.strategy.gather_state(model) for model in models]
        failure = None
        try:
            for hook in list(self._save_hooks):
                hook(models, weights, str(folder))
        except Exception as error:
            failure = error
        # Scripts often write, and take from the lists, on the main process alone.
        left = min(self._group.all_gather_object(len(weights)))
        if failure is not None:
            raise failure
        return state.without_weights(state.models[left:])

    def _where_to_save(self, output_dir: str | os.PathLike[str] | None) -> Path:
        numbered = self._numbered_folder
        if numbered is None:
            if output_dir is None:
                raise CheckpointError(
                    "save_state() was called without a folder",
                    "Checkpoints are numbered only with ProjectConfiguration(automatic_checkpoint_naming=True)",
                    "Pass a folder, or give the Accelerator such a project_config",
                )
            return _named(output_dir)
        if output_dir is not None:
            raise CheckpointError(
                f"save_state({os.fspath(output_dir)!r}) was called with automatic_checkpoint_naming",
                f"Checkpoints are then numbered in {numbered}, and the folder would be ignored",
                "Leave the folder out, or switch automatic_checkpoint_naming off",
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
        """Wait for the save in flight, give memory back, and let signals do what they did before."""
        if self._preemption is not None:
            self._preemption.close()
            self._preemption = None
        self._saver.release()

    # Loading

    def load(
        self, state: TrainingState, input_dir: str | os.PathLike[str] | None, *, strict: bool = True
    ) -> str | None:
        """Load a state; see `Accelerator.load_state`."""
        self.wait()
        if input_dir is not None:
            folder = _named(input_dir)
            if self._is_foreign(folder):
                return self._adopt(state, folder, strict=strict)
            self._load(state, self._open(folder), strict=strict)
            return str(folder)
        return self._load_newest(state, self._project_folder(), strict=strict)

    def _load(self, state: TrainingState, checkpoint: Checkpoint, *, strict: bool) -> None:
        models = list(state.models)
        for hook in list(self._load_hooks):
            hook(models, str(checkpoint.folder))
        state.without_weights(state.models[len(models) :]).load(checkpoint, strict=strict)

    def _is_foreign(self, folder: Path) -> bool:
        """Whether all ranks see a folder of another library under this name."""
        from paceline.checkpoint.foreign import recognise

        # Weights alone are no training state.
        foreign = recognise(folder) not in (None, "weights")
        return all(self._group.all_gather_object(foreign))

    def _adopt(self, state: TrainingState, folder: Path, *, strict: bool) -> str:
        from paceline.training_state.migration import import_foreign_state

        models = list(state.models)
        for hook in list(self._load_hooks):
            hook(models, str(folder))
        lines = import_foreign_state(state.without_weights(state.models[len(models) :]), folder, strict=strict)
        for line in lines:
            _LOG.log(logging.WARNING if line.startswith("left") else logging.INFO, "%s: %s", folder.name, line)
        return str(folder)

    def _project_folder(self) -> Path:
        if self._project.project_dir is None:
            raise CheckpointError(
                "load_state() was called without a folder",
                "Without project_dir there is no place where the newest checkpoint could be looked for",
                "Pass a folder, or Accelerator(project_dir=…)",
            )
        return Path(self._project.project_dir)

    def _open(self, folder: Path) -> Checkpoint:
        """Open a checkpoint that all ranks see whole, and the same one."""
        found: Checkpoint | None = None
        problem = ""
        try:
            found = open_checkpoint(folder)
        except PacelineError as error:
            problem = f"rank {self._group.rank}: {error}"
        told = self._group.all_gather_object((problem, found.manifest.id if found else ""))
        problems = [text for text, _ in told if text]
        if not problems and len({save_id for _, save_id in told}) > 1:
            problems = ["the ranks see checkpoints of different saves under this name"]
        if problems or found is None:
            raise DamagedCheckpointError(f"{folder} cannot be loaded", problems[0], "")
        return found

    def _load_newest(self, state: TrainingState, project: Path, *, strict: bool) -> str | None:
        """Load the newest whole checkpoint, with a line for each newer one that is not whole."""
        paths = [found.folder.relative_to(project) for found in find_checkpoints(project)]
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
            _LOG.warning("skipped %s: another library wrote it; load_state('%s') takes it over", other.name, other)
        if skipped:
            raise DamagedCheckpointError(
                f"None of the {skipped} checkpoints in {project} is whole",
                "The lines before say what is wrong with each",
                "Repair one, or move them away to start anew",
            )
        return None

    # Making room for others

    def arm(self, save: Callable[[], Any] | None, *, always: bool = False) -> Preemption | None:
        """Save and end when a signal comes; only where checkpoints are named automatically, or `always`.

        Args:
            save: Called on all ranks at a point on which they agreed; the run ends after it. None stops listening.
            always: Also without automatic names.

        Returns:
            What must be told of each point at which the run could be stopped; None if no signal is listened to.
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


def _named(folder: str | os.PathLike[str]) -> Path:
    """A folder as the script names it, with `~` for the user's own."""
    return Path(os.path.expanduser(folder))  # noqa: PTH111 - Path.expanduser refuses names such as ~backup
