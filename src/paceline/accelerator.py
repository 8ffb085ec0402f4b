"""The facade: the public methods, each of which hands on to the part that knows."""

from __future__ import annotations

import gc
import os
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from paceline.assembly import assemble, decide_strategy
from paceline.checkpoint import save_weights
from paceline.checkpointing import Checkpointing
from paceline.config import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    TorchDynamoPlugin,
)
from paceline.data import ActiveLoaders, PreparedDataLoader, prepare_loader, skip_first_batches
from paceline.environment.profiling import peak_memory, profile
from paceline.errors import (
    ForeignOptimizerError,
    PacelineError,
    PrepareError,
    UnassignedParametersError,
)
from paceline.overview import describe_run
from paceline.ranks import Ranks
from paceline.reporting import Reporting
from paceline.saving import Saving
from paceline.script_arguments import (
    Handlers,
    accumulation_steps,
    check_rng_types,
    compile_settings,
    project_settings,
    refuse_scaler,
)
from paceline.shortage import report_shortage_at_exit
from paceline.stepping import (
    AcceleratedOptimizer,
    AcceleratedScheduler,
    Accumulation,
    Window,
    is_scheduler,
    steps_taken,
    unassigned,
)
from paceline.strategies import Strategy
from paceline.strategies.dummies import DummyScheduler
from paceline.tracking import Trackers, choose_trackers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from paceline.config import (
        AutocastKwargs,
        DeepSpeedPlugin,
        FullyShardedDataParallelPlugin,
        ParallelismConfig,
        ProfileKwargs,
    )
    from paceline.precision import LossScaler
    from paceline.recording import ParityRecorder, Recorder
    from paceline.shortage import Holdings
    from paceline.strategies import DistributedType, Surroundings

T = TypeVar("T")


class Accelerator(Saving, Reporting, Ranks):
    """Runs one training script on whatever it was launched on.

    Every rank builds one and calls the same methods in the same order; those marked "Collective" exchange something.
    What the launcher's configuration leaves open may be said here. What both say, and differently, is an error.

    Args:
        device_placement: Move models and batches to the device.
        mixed_precision: `no`, `bf16` or `fp16`.
        gradient_accumulation_steps: Micro-batches to an optimizer step.
        cpu: Stay on the CPU even where there is an accelerator.
        strategy: `auto`, `single`, `ddp`, `fsdp`, `deepspeed`, or one of your own: a class derived from
            `paceline.strategies.Strategy`, or an object of one. `auto` takes the least sharding that fits.
        dataloader_config: How prepared loaders are shared out.
        fsdp_plugin: Settings of FSDP2; asks for that strategy.
        deepspeed_plugin: Settings of DeepSpeed; asks for that strategy.
        gradient_accumulation_plugin: Says more than `gradient_accumulation_steps`; give one of them.
        step_scheduler_with_optimizer: Let a prepared scheduler move once an optimizer step; else on every call.
        kwargs_handlers: `DistributedDataParallelKwargs`, `GradScalerKwargs`, `AutocastKwargs`,
            `InitProcessGroupKwargs`, `ProfileKwargs`: one of each kind at most.
        dynamo_plugin: Settings of `torch.compile`.
        dynamo_backend: Short for `TorchDynamoPlugin(backend=...)`.
        parallelism_config: Sizes of the mesh axes, for hybrid sharding.
        project_dir: Where a run keeps its files.
        project_config: Says more than `project_dir`; give one of them.
        log_with: Experiment trackers for `init_trackers` to open: a name, `all` that are installed, an object derived
            from `paceline.tracking.GeneralTracker`, or a list of these. JSON lines are written besides wherever there
            is a folder for logs.
        rng_types: Accepted as `["generator"]` or None: the order of samples depends on seed and epoch only, so
            no generator has to be synchronised.
    """

    def __init__(
        self,
        device_placement: bool = True,
        *,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int | None = None,
        cpu: bool | None = None,
        strategy: str | Strategy | Callable[[Surroundings], Strategy] | None = None,
        dataloader_config: DataLoaderConfiguration | None = None,
        fsdp_plugin: FullyShardedDataParallelPlugin | None = None,
        deepspeed_plugin: DeepSpeedPlugin | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: Sequence[object] = (),
        dynamo_plugin: TorchDynamoPlugin | None = None,
        dynamo_backend: str | None = None,
        parallelism_config: ParallelismConfig | None = None,
        project_dir: str | os.PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
        log_with: object = None,
        rng_types: Sequence[str] | None = None,
    ) -> None:
        check_rng_types(rng_types)
        accumulation = gradient_accumulation_plugin
        said = {
            "strategy": strategy if isinstance(strategy, str) else None,
            "mixed_precision": mixed_precision,
            "gradient_accumulation_steps": accumulation_steps(accumulation, gradient_accumulation_steps),
            "use_cpu": cpu,
            "fsdp_config": fsdp_plugin,
            "deepspeed_config": deepspeed_plugin,
            "dynamo_config": compile_settings(dynamo_plugin, dynamo_backend),
            "parallelism_config": parallelism_config,
        }
        given = {key: value for key, value in said.items() if value is not None}
        self._parts = assemble(os.environ, given, Handlers.sort(kwargs_handlers))
        super().__init__(self._parts.around, ActiveLoaders())
        config = self._parts.around.config
        self.device_placement = device_placement
        self.dataloader_config = dataloader_config or DataLoaderConfiguration()
        self.project_configuration = project_settings(project_dir, project_config)
        self._tracking = self._choose_trackers(log_with)
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        self.scaler: LossScaler | None = self._parts.scaler
        plugin = accumulation or GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps)
        self._window = Window(plugin, self._loaders, self._parts.group)
        # Not `self`: what is prepared must go when the script lets go of its Accelerator.
        window = self._window
        self._loaders.micro_batches = lambda: window.num_steps
        self._accumulation = Accumulation(self._window, sync_each_batch=plugin.sync_each_batch)
        self._models: list[nn.Module] = []
        self._optimizers: list[AcceleratedOptimizer] = []
        self._schedulers: list[AcceleratedScheduler] = []
        self._dataloaders: list[PreparedDataLoader] = []
        self._recorder = self._start_recording()
        self._checkpointing = Checkpointing(self.project_configuration, self._parts.group)
        self._arm()
        self._own_strategy = None if isinstance(strategy, str) else strategy
        self._strategy: Strategy | None
        self._strategy, self._reason = self._decide_early()
        if self._strategy is not None and self._strategy.scales_loss:
            refuse_scaler(self._parts.handlers, self._strategy.name)
            self.scaler = None
        itself = weakref.ref(self)
        report_shortage_at_exit(self, self._parts, lambda: None if (it := itself()) is None else it._holdings())

    def _holdings(self) -> Holdings:
        """What fills the memory, for the report of a run that has none left."""
        return self._models, [o.optimizer for o in self._optimizers], self._micro_batch(), self._window.num_steps

    def _choose_trackers(self, log_with: object) -> Trackers:
        folder = None if self.logging_dir is None else Path(self.logging_dir)
        chosen = choose_trackers(log_with, folder)
        return Trackers(chosen, folder, is_main=self.is_main_process, is_asked=log_with is not None)

    def _start_recording(self) -> Recorder | ParityRecorder | None:
        """Note what this run does, where `paceline verify-resume` or `paceline parity` asked for it."""
        recording, group = self._parts.resolved.recording, self._parts.group
        if recording is None:
            return None
        from paceline.recording import ParityRecorder, Recorder

        recorder: Recorder | ParityRecorder
        if recording.parity:
            recorder = ParityRecorder(recording, group, self, self._models, self._optimizers)
        else:
            recorder = Recorder(recording, group, lambda: steps_taken(self._optimizers))
        self._loaders.watch = recorder.note_batch
        return recorder

    # What was decided

    @property
    def mixed_precision(self) -> str:
        """`no`, `bf16` or `fp16`."""
        return self._parts.around.precision.mode

    @property
    def distributed_type(self) -> DistributedType:
        """How configuration files call this way of training."""
        return self.strategy.distributed_type

    @property
    def strategy(self) -> Strategy:
        """The strategy in force; under `auto` it is decided when the first model is prepared."""
        if self._strategy is None:
            raise PrepareError(
                "The strategy was asked for before a model was prepared",
                "strategy='auto' looks at the model's size to decide",
                "Call accelerator.prepare(model, ...) first, or name a strategy",
            )
        return self._strategy

    @property
    def project_dir(self) -> str | None:
        """Where the run keeps its files."""
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> str | None:
        """Where the run keeps its logs: `logging_dir`, else `project_dir`."""
        return self.project_configuration.logging_dir or self.project_dir

    @property
    def split_batches(self) -> bool:
        """Whether a loader's batch is the global one."""
        return self.dataloader_config.split_batches

    @property
    def even_batches(self) -> bool:
        """Whether the last batches are filled up so that all ranks have as many."""
        return self.dataloader_config.even_batches

    def describe(self) -> str:
        """What was detected and decided, as lines of text for the start of a log."""
        return describe_run(self._parts, self._strategy, self._reason, self._dataloaders, self._window.num_steps)

    def peak_memory(self) -> int:
        """The most bytes this rank has held: of the device, or of the process on a CPU."""
        return peak_memory(self.device)

    # Prepare

    def prepare(self, *args: Any, device_placement: Sequence[bool | None] | None = None) -> Any:
        """Make models, optimizers, loaders and schedulers fit the run.

        They come back in the order given; one alone comes back by itself. What is none of them, or was prepared
        before, comes back as it is. An optimizer may be made before or after its model is prepared.
        Collective: every rank must call it.

        Args:
            args: In any order.
            device_placement: One flag an argument, to override `device_placement` of the constructor.

        Raises:
            PrepareError: Something cannot be trained, sharded or stepped.
            DataError: A loader cannot be shared out.
        """
        flags = list(device_placement) if device_placement is not None else [None] * len(args)
        if len(flags) != len(args):
            raise PrepareError(
                f"device_placement has {len(flags)} entries for {len(args)} arguments",
                "Each entry belongs to one argument",
                "Give one flag (or None) for each argument",
            )
        place = {id(arg): flag for arg, flag in zip(args, flags, strict=True)}
        done: dict[int, Any] = {}
        for loader in _unique(args, DataLoader):
            done[id(loader)] = self.prepare_data_loader(loader, place[id(loader)])
        models = [m for m in _unique(args, nn.Module) if not self._knows_model(m)]
        optimizers = [o for o in _unique(args, Optimizer) if not isinstance(o, AcceleratedOptimizer)]
        done |= self._prepare_trained(models, optimizers, place)
        for other in args:
            if id(other) in done or isinstance(other, (nn.Module, Optimizer)):
                continue
            if is_scheduler(other) or isinstance(other, DummyScheduler):
                done[id(other)] = self.prepare_scheduler(other)
        result = [done.get(id(arg), arg) for arg in args]
        return result[0] if len(result) == 1 else tuple(result)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Prepare one model; with `evaluation_mode` it is only placed, and no gradients are exchanged for it."""
        if self._knows_model(model):
            return model
        place = self.device_placement if device_placement is None else device_placement
        if evaluation_mode:
            return self._decided([model], []).prepare_evaluation(model, place=place)
        prepared: nn.Module = self._prepare_trained([model], [], {id(model): place})[id(model)]
        return prepared

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> AcceleratedOptimizer:
        """Prepare one optimizer, before or after the model whose parameters it holds."""
        if isinstance(optimizer, AcceleratedOptimizer):
            return optimizer
        prepared: AcceleratedOptimizer = self._prepare_trained([], [optimizer], {})[id(optimizer)]
        return prepared

    def prepare_data_loader(
        self, data_loader: DataLoader[Any], device_placement: bool | None = None, *, saved: bool = True
    ) -> PreparedDataLoader:
        """Make a loader yield this rank's share, on the device ahead of need.

        Args:
            data_loader: Any `DataLoader`.
            device_placement: Overrides the constructor's.
            saved: Whether its position belongs to the training state; not for loaders that always begin at their
                first sample, of which there may be any number.
        """
        place = self.device_placement if device_placement is None else device_placement
        prepared = prepare_loader(
            data_loader,
            group=self._parts.group,
            device=self.device if place else None,
            config=self.dataloader_config,
            active=self._loaders,
            plays=1 if self._parts.resolved.recording is None else self._parts.resolved.recording.plays,
        )
        if saved and prepared not in self._dataloaders:
            self._dataloaders.append(prepared)
        return prepared

    def skip_first_batches(self, dataloader: DataLoader[Any], num_batches: int = 0) -> DataLoader[Any]:
        """Return a view of a loader whose first pass begins `num_batches` batches later; see the function.

        Not needed after `load_state`, which lets prepared loaders go on by themselves, and harmless there.
        """
        return skip_first_batches(dataloader, num_batches)

    def prepare_scheduler(self, scheduler: Any) -> AcceleratedScheduler:
        """Make a scheduler move once for each step that its optimizer takes."""
        if isinstance(scheduler, AcceleratedScheduler):
            return scheduler
        if self._strategy is not None:
            scheduler = self._strategy.adopt_scheduler(scheduler)
        inner = getattr(scheduler, "optimizer", None)
        own = [o for o in self._optimizers if inner is o or inner is o.optimizer]
        prepared = AcceleratedScheduler(
            scheduler,
            window=self._window,
            optimizers=own or self._optimizers,
            step_with_optimizer=self.step_scheduler_with_optimizer,
        )
        self._schedulers.append(prepared)
        return prepared

    def _prepare_trained(
        self, models: list[nn.Module], optimizers: list[Optimizer], place: dict[int, bool | None]
    ) -> dict[int, Any]:
        if not models and not optimizers:
            return {}
        strategy = self._decided(models, optimizers) if models else self._strategy
        wrappers = [self._wrap_optimizer(optimizer) for optimizer in optimizers]
        done: dict[int, Any] = {id(o): w for o, w in zip(optimizers, wrappers, strict=True)}
        if strategy is not None:
            flags = [place.get(id(model)) for model in models]
            where = [self.device_placement if flag is None else flag for flag in flags]
            # Optimizers prepared before their model still hold what it was made of.
            known = [wrapper.optimizer for wrapper in self._optimizers]
            strategy.micro_batch = self._micro_batch()
            prepared = strategy.prepare(models, known, place=where)
            self._models.extend(prepared)
            for wrapper in self._optimizers:
                wrapper.optimizer = strategy.successor(wrapper.optimizer)
            done.update((id(m), p) for m, p in zip(models, prepared, strict=True))
        if models:
            self._check_foreign(optimizers)
        return done

    def _micro_batch(self) -> int | None:
        """Samples in a rank's smallest batch, as far as the prepared loaders say."""
        sizes = [loader.batch_size for loader in self._dataloaders]
        return min((size for size in sizes if size is not None), default=None)

    def _wrap_optimizer(self, optimizer: Optimizer) -> AcceleratedOptimizer:
        before_step = self._checkpointing.before_step
        if self._recorder is not None:
            before_step = self._recorder.watching(before_step, len(self._optimizers))
        wrapper = AcceleratedOptimizer(
            optimizer,
            window=self._window,
            scaler=self.scaler,
            first_step=self._check_first_step,
            before_step=before_step,
        )
        self._optimizers.append(wrapper)
        return wrapper

    def _decide_early(self) -> tuple[Strategy | None, str]:
        """The strategy and why, where that does not depend on the model."""
        if self._own_strategy is not None:
            return _build_strategy(self._own_strategy, self._parts.around), "asked for by the script"
        if self._parts.around.config.strategy == "auto" and self.num_processes > 1:
            return None, ""
        return decide_strategy(self._parts, (), ())

    def _decided(self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> Strategy:
        if self._strategy is None:
            known = [*optimizers, *(wrapper.optimizer for wrapper in self._optimizers)]
            self._strategy, self._reason = decide_strategy(self._parts, models, known)
        return self._strategy

    def _knows_model(self, model: object) -> bool:
        return any(model is known for known in self._models)

    def _check_foreign(self, optimizers: Iterable[Optimizer]) -> None:
        known = {id(p) for model in self._models for p in model.parameters()}
        for optimizer in optimizers:
            held = self.strategy.parameters_of(optimizer)
            foreign = [tuple(p.shape) for p in held if id(p) not in known]
            if foreign and self._models:
                raise ForeignOptimizerError(foreign, len(held))

    def _check_first_step(self) -> Strategy:
        """Look for what would go wrong in silence, before the first step of each optimizer."""
        self.strategy.check_first_backward()
        self._check_foreign(wrapper.optimizer for wrapper in self._optimizers)
        missing = unassigned(self._models, [w.optimizer for w in self._optimizers], self.strategy)
        if missing:
            raise UnassignedParametersError(missing)
        return self.strategy

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> nn.Module:
        """The user's own module behind a prepared one; under FSDP2 that module is the sharded one."""
        inner = self._strategy.unwrap(model) if self._strategy is not None else model
        if keep_torch_compile:
            return inner
        original: nn.Module = getattr(inner, "_orig_mod", inner)
        return original

    def init_module(self) -> AbstractContextManager[Any]:
        """Build big models inside: under ZeRO stage 3 each parameter is sharded as soon as it is made.

        Elsewhere it changes nothing; FSDP2 takes models built under `torch.device("meta")`.
        """
        return self.strategy.init_module()

    def gather_parameters(
        self, parameters: nn.Module | nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = None
    ) -> AbstractContextManager[Any]:
        """Hold sharded parameters whole inside, for reading or changing them.

        Collective: every rank must call it.

        Args:
            parameters: Of a prepared model, or the whole model.
            modifier_rank: Whose changes all ranks take over; None if nothing is changed.

        Raises:
            PrepareError: The strategy cannot.
        """
        if isinstance(parameters, nn.Parameter):
            parameters = [parameters]
        listed = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
        return self.strategy.gather_parameters(list(listed), modifier_rank)

    def free_memory(self, *objects: Any) -> list[None]:
        """Forget everything prepared and give the device's memory back; returns a None for each object.

        Assign the result to the names that hold the objects, so that nothing else keeps them:
        `model, optimizer = accelerator.free_memory(model, optimizer)`.
        """
        for prepared in (self._models, self._optimizers, self._schedulers, self._dataloaders):
            prepared.clear()
        self._checkpointing.close()
        self._arm()
        self._accumulation.forget()
        self._strategy, self._reason = self._decide_early()
        count = len(objects)
        del objects
        gc.collect()
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()
        return [None] * count

    clear = free_memory

    # One step

    @property
    def sync_gradients(self) -> bool:
        """Whether the micro-batch in work is the last of its accumulation window."""
        return self._window.sync_gradients

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches to an optimizer step."""
        return self._window.num_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, value: int) -> None:
        self._window.num_steps = value

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last step of any prepared optimizer was skipped for an fp16 overflow."""
        return any(optimizer.step_was_skipped for optimizer in self._optimizers)

    def accumulate(self, *models: nn.Module) -> AbstractContextManager[None]:
        """Open one micro-batch: `with accelerator.accumulate(model):` around forward, backward and step.

        Gradients are exchanged, and optimizers and schedulers act, in the last micro-batch of a window only: every
        `gradient_accumulation_steps`, and at the end of the loader.

        Args:
            models: Whose gradients to hold back; all prepared ones when left out.
        """
        return self._accumulation.over(models or self._models, self.strategy)

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Keep gradients to this rank inside; the next backward outside exchanges their sum."""
        self.strategy.set_gradient_sync(model, False)
        try:
            yield
        finally:
            self.strategy.set_gradient_sync(model, True)

    def backward(self, loss: Tensor, *, weight: float | Tensor | None = None, **kwargs: Any) -> None:
        """Compute gradients: a true mean over the window, over its micro-batches or over what `weight` counts.

        Without `weight`, `loss` is a mean, and the window's gradient is the mean over its micro-batches and ranks.
        With it, `loss` is a sum, `weight` says over how many tokens or samples, and the window's gradient is that of
        the sum over all ranks divided by the total weight, however unequally it is spread.

        Args:
            loss: Shape [].
            weight: A number, or a tensor of shape [] (on the device it costs no wait).
            kwargs: Passed on to `Tensor.backward`.

        Raises:
            SteppingError: Weighted and unweighted losses in one window.
        """
        if self._recorder is not None:
            self._recorder.note_loss(loss, weight)
        scale = self._window.scale_of(loss, weight)
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        self.strategy.backward(loss, scale, **kwargs)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """Scale gradients so that their norm over all ranks is at most `max_norm`.

        Collective under sharding: every rank must call it.

        Args:
            parameters: Of prepared models; any subset.
            max_norm: `inf` only measures.
            norm_type: 2, another power, or `inf`.

        Returns:
            The norm before clipping, shape [], on the device. `.item()` waits for the device.

        Raises:
            SteppingError: Called before the accumulation window ends.
        """
        parameters = self._closed("clip_grad_norm_", parameters)
        norm = self.strategy.clip_norm(parameters, float(max_norm), float(norm_type))
        if self._recorder is not None:
            self._recorder.note_norm(norm, norm_type)
        return norm

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clamp every element of every gradient to [-clip_value, clip_value].

        Raises:
            SteppingError: Called before the accumulation window ends.
        """
        self.strategy.clip_value(self._closed("clip_grad_value_", parameters), float(clip_value))

    def _closed(self, what: str, parameters: Any) -> list[nn.Parameter]:
        """The parameters as a list, their gradients final and unscaled."""
        self._window.require_end(what)
        listed: list[nn.Parameter] = [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
        self._window.settle(self.strategy)
        if self.scaler is not None:
            asked = {id(p) for p in listed}
            for wrapper in self._optimizers:
                if any(id(p) in asked for group in wrapper.param_groups for p in group["params"]):
                    self.scaler.unscale_(wrapper.optimizer)
        return listed

    def unscale_gradients(self, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> None:
        """Divide fp16 gradients by the loss scale, once; of the optimizers named, else of all."""
        if self.scaler is None:
            return
        chosen = self._optimizers if optimizer is None else optimizer
        for one in [chosen] if isinstance(chosen, Optimizer) else chosen:
            self.scaler.unscale_(one.optimizer if isinstance(one, AcceleratedOptimizer) else one)

    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """Open an autocast region for code outside a prepared model, such as a loss."""
        return self._parts.around.precision.context(autocast_handler)

    @contextmanager
    def join_uneven_inputs(self, joinables: Sequence[nn.Module], even_batches: bool | None = None) -> Iterator[None]:
        """Let ranks with fewer batches follow along until all are done (DDP).

        Args:
            joinables: The prepared models that the loop trains.
            even_batches: Overrides the loaders' own setting inside.

        Raises:
            SteppingError: The strategy's ranks cannot follow along.
        """
        before = [(loader, loader.even_batches) for loader in self._dataloaders]
        if even_batches is not None:
            for loader in self._dataloaders:
                loader.even_batches = even_batches
        try:
            with self.strategy.join(joinables):
                yield
        finally:
            for loader, value in before:
                loader.even_batches = value

    # Weights

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
        if not safe_serialization:
            raise PacelineError(
                "save_model(safe_serialization=False)",
                "Pickled weights run code when they are loaded",
                "Leave it out: the weights are written as safetensors",
            )
        state = self.get_state_dict(model)
        failure: str | None = None
        if self.is_main_process:
            try:
                save_weights(state, save_directory, max_shard_size=max_shard_size)
            except (OSError, PacelineError) as error:
                failure = f"{type(error).__name__}: {error}"
        failure = self._parts.group.broadcast_object(failure)
        if failure is not None:
            raise PacelineError(f"The weights could not be saved into {os.fspath(save_directory)}", failure)

    # Looking inside

    @contextmanager
    def profile(self, profile_handler: ProfileKwargs | None = None) -> Iterator[torch.profiler.profile]:
        """Profile what runs inside; with `output_trace_dir`, each rank writes `profile_{rank}.json`."""
        with profile(profile_handler or self._parts.handlers.profile, self.process_index) as profiler:
            yield profiler
        self.wait_for_everyone()


def _unique(things: Iterable[object], kind: type[T]) -> list[T]:
    """Each thing of a kind once, in order."""
    return list({id(thing): thing for thing in things if isinstance(thing, kind)}.values())


def _build_strategy(strategy: object, around: Surroundings) -> Strategy:
    made = strategy(around) if callable(strategy) else strategy
    if isinstance(made, Strategy):
        return made
    raise PrepareError(
        f"strategy={strategy!r}",
        "A strategy is a name, or a class derived from paceline.strategies.Strategy",
        "Choose auto, single, ddp, fsdp or deepspeed",
    )
