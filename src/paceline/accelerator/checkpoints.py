"""The part of the facade that saves weights and the whole training state, and brings that back."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from paceline.checkpoint import save_weights
from paceline.checkpoint.folder import real_folder
from paceline.errors import PacelineError
from paceline.strategies.adapters import embedding_names, frozen_base, is_adapted, write_adapters
from paceline.training_state.state import TrainingState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from paceline.accelerator.assembly import RunComponents
    from paceline.data import ActiveLoaders, PreparedDataLoader
    from paceline.precision import LossScaler
    from paceline.stepping import AcceleratedOptimizer, AcceleratedScheduler, Window
    from paceline.strategies import Strategy
    from paceline.training_state.manager import Checkpointing, HookHandle
    from paceline.training_state.preemption import Preemption

__all__ = ["Saving"]


class Saving:
    """Checkpoints: what the script adds to them, when they are written, and what a signal does."""

    scaler: LossScaler | None
    _components: RunComponents
    _checkpointing: Checkpointing
    _window: Window
    _loaders: ActiveLoaders
    _models: list[nn.Module]
    _optimizers: list[AcceleratedOptimizer]
    _schedulers: list[AcceleratedScheduler]
    _dataloaders: list[PreparedDataLoader]

    if TYPE_CHECKING:

        @property
        def strategy(self) -> Strategy:
            """How the model is spread over ranks; the Accelerator decides it."""

        def _decided(self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> Strategy: ...

    @property
    def save_iteration(self) -> int:
        """Number of the next checkpoint that is named automatically."""
        return self._checkpointing.next_iteration

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Add objects of the script, with `state_dict` and `load_state_dict`, to what `save_state` saves.

        Raises:
            StateError: Some lack one of the two; lists them.
        """
        self._checkpointing.register(*objects)

    def register_save_state_pre_hook(self, hook: Callable[..., Any]) -> HookHandle:
        """Call `hook(models, weights, folder)` before each save, on every rank; the handle's `remove` ends that.

        It may write files into `folder`, which become part of the checkpoint, and empty both lists from their end
        to keep the weights of those models out of it.
        """
        return self._checkpointing.on_save(hook)

    def register_load_state_pre_hook(self, hook: Callable[..., Any]) -> HookHandle:
        """Call `hook(models, folder)` before each load, on every rank; the handle's `remove` ends that.

        Models that it takes from the end of the list are left alone: it has loaded them itself.
        """
        return self._checkpointing.on_load(hook)

    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        *,
        blocking: bool | None = None,
    ) -> str:
        """Save everything prepared and registered, to go on from exactly here.

        Weights, optimizers, schedulers, loss scale, the position of every loader and all random generators. The
        folder has its name only when it is whole; until then what was there before stays. Any number of ranks can
        load it, under any strategy.
        Collective: every rank must call it.

        Args:
            output_dir: The checkpoint's folder; None with `automatic_checkpoint_naming`, which numbers them. A
                checkpoint that is there is replaced; other things in that folder stay.
            safe_serialization: Only True: paceline writes no pickle.
            blocking: False returns once the state is copied to host memory, and writes while training goes on;
                `wait_for_save`, the next save and the end of the program wait for that. None takes
                `ProjectConfiguration.save_in_background`.

        Returns:
            The folder.

        Raises:
            SteppingError: Called where gradients would be lost that no optimizer has used yet.
            CheckpointError: On every rank, when any of them could not write, now or in the save before.
            StateError: Something holds what a checkpoint does not; says where.
        """
        _require_safe("save_state", safe_serialization)
        self._window.require_no_gradients("save_state")
        return self._checkpointing.save(self._training_state(), output_dir, blocking=blocking)

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: dict[str, Any] | None = None,
        *,
        map_location: str | None = None,
        strict: bool = True,
    ) -> str | None:
        """Bring back what `save_state` saved, after the same objects were prepared and registered.

        The next pass over each prepared loader goes on where it was.
        Collective: every rank must call it.

        Args:
            input_dir: The checkpoint's folder; None takes the newest whole one under `project_dir`, with a line for
                each newer one that is not whole. A folder that Accelerate's `save_state`, the transformers Trainer,
                DeepSpeed or torch.distributed.checkpoint wrote is taken over as far as it fits, with a line for each
                thing taken or left.
            load_kwargs: Only None: Accelerate hands them to its reader of pickles, and there is none here.
            map_location: `"cpu"`, `"on_device"` or None as for Accelerate; all the same here, since every tensor is
                read to where it is used.
            strict: Refuse a checkpoint that holds more or fewer tensors; else they are named in a warning.

        Returns:
            The folder; None if there is no checkpoint under `project_dir` yet.

        Raises:
            CheckpointError: It is not whole, or of another model.
            StateError: Other objects were prepared or registered.
        """
        _refuse_reading(load_kwargs, map_location)
        return self._checkpointing.load(self._training_state(), input_dir, strict=strict)

    def wait_for_save(self) -> None:
        """Wait until the save in flight is whole.

        Raises:
            CheckpointError: It failed.
        """
        self._checkpointing.wait()

    def on_preemption(self, save: Callable[[], Any] | None) -> None:
        """Call `save` on all ranks when one of them is asked to end, at a batch on which they agreed; then end.

        None stops listening: signals do again what they did before.

        The signals are those of `ProjectConfiguration.save_on_signals`; the exit code is 75. With
        `automatic_checkpoint_naming` this happens by itself, and `save` is `save_state`.
        Collective: every rank must call it.
        """
        self._listen(self._checkpointing.arm(save, always=True))

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Tensor]:
        """All weights of a prepared model on the CPU of rank 0, under the names of the user's own module; {} elsewhere.

        They may share memory with a model that is on the CPU and whole.
        Collective: every rank must call it.
        """
        return self._decided([model], []).gather_state(model)

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: str | int = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write a model's weights as safetensors, in files that `from_pretrained` of transformers reads.

        Collective: every rank must call it; rank 0 writes, and all go on when the files are whole.

        Args:
            model: A prepared model.
            save_directory: Made when missing; weights saved there before are replaced.
            max_shard_size: Bytes, or a text such as `"5GB"`.
            safe_serialization: Only True: paceline writes no pickle.

        Raises:
            PacelineError: On every rank, when the files could not be written.
        """
        _require_safe("save_model", safe_serialization)
        state = self.get_state_dict(model)
        self._write_on_main(save_directory, lambda folder: save_weights(state, folder, max_shard_size=max_shard_size))

    def save_adapter(self, model: nn.Module, save_directory: str | os.PathLike[str]) -> None:
        """Write what a PEFT model adds to its base, in files that `PeftModel.from_pretrained` opens.

        Collective: every rank must call it; rank 0 writes, and all go on when the files are whole. Of a base that is
        frozen nothing is gathered.

        Args:
            model: A prepared `PeftModel`.
            save_directory: Made when missing.

        Raises:
            PacelineError: It is no `PeftModel`; or, on every rank, the files could not be written.
        """
        strategy = self._decided([model], [])
        module: Any = strategy.unwrap(model)
        if not is_adapted(module):
            raise PacelineError(
                f"save_adapter was called with a {type(module).__name__}",
                "Only a PeftModel has adapters beside its base",
                "Call save_model",
            )
        base = frozen_base(module, strategy.named_parameters(model)) - embedding_names(module)
        state = strategy.gather_state(model, without=base)
        self._write_on_main(save_directory, lambda folder: write_adapters(module, folder, state))

    def _write_on_main(self, folder: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
        """Let rank 0 write weights into what a name leads to, and all know of a failure."""
        failure: str | None = None
        if self._components.group.rank == 0:
            try:
                write(real_folder(folder))
            except (OSError, PacelineError, SafetensorError) as error:
                failure = f"{type(error).__name__}: {error}"
        failure = self._components.group.broadcast_object(failure)
        if failure is not None:
            raise PacelineError(f"The weights could not be saved into {os.fspath(folder)}", failure)

    def _arm(self) -> None:
        """Save and end on a signal, where checkpoints are named automatically."""
        # The watcher lives as long as the process; the Accelerator need not.
        itself = weakref.ref(self)

        def save() -> None:
            accelerator = itself()
            if accelerator is not None:
                accelerator.save_state(blocking=True)

        self._listen(self._checkpointing.arm(save))

    def _listen(self, preemption: Preemption | None) -> None:
        """Make every batch that is handed out between two steps a point at which the run could be stopped."""
        # Not `self`: what is prepared must go when the script lets go of its Accelerator.
        window = self._window

        def reach_point() -> None:
            if preemption is not None and not window.has_gradients:
                preemption.reach_point()

        self._loaders.before_batch = reach_point

    def _training_state(self) -> TrainingState:
        return TrainingState(
            strategy=self.strategy,
            models=self._models,
            optimizers=self._optimizers,
            schedulers=self._schedulers,
            loaders=self._dataloaders,
            scaler=self.scaler,
            custom=self._checkpointing.custom,
        )


def _require_safe(method: str, safe_serialization: object) -> None:
    if safe_serialization is not True:
        raise PacelineError(
            f"{method}(safe_serialization={safe_serialization!r})",
            "Only True is possible: pickled weights run code when they are loaded",
            "Leave it out: the weights are written as safetensors",
        )


def _refuse_reading(load_kwargs: Mapping[str, Any] | None, map_location: object) -> None:
    """Refuse what would have an effect elsewhere, and none here."""
    if load_kwargs:
        raise PacelineError(
            f"load_state(load_kwargs={dict(load_kwargs)!r})",
            "They are for a reader of pickles, and paceline has none",
            "Leave them out",
        )
    if map_location not in (None, "cpu", "on_device"):
        raise PacelineError(
            f"load_state(map_location={map_location!r})",
            "Tensors are read to where the prepared objects have them, not elsewhere",
            "Leave it out, or write 'cpu' or 'on_device', which are the same here",
        )
