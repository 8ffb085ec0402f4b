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

from paceline.accelerator.checkpoints import Saving
from paceline.accelerator.communication import Ranks
from paceline.accelerator.preparation import Preparing
from paceline.accelerator.run_tracking import Reporting
from paceline.accelerator.summary import describe_run
from paceline.accelerator.unprepared import FirstSteps
from paceline.data import ActiveLoaders, PreparedDataLoader
from paceline.environment.profiling import peak_memory, profile
from paceline.stepping import (
    AcceleratedOptimizer,
    AcceleratedScheduler,
    Accumulation,
    ScheduleLengths,
    Window,
    say,
    scalar_loss,
    steps_taken,
)
from paceline.tracking import Trackers, choose_trackers
from paceline.training_state.manager import Checkpointing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from paceline.accelerator.oom_report import MemorySnapshot
    from paceline.accelerator.recording import ParityRecorder, Recorder
    from paceline.config import (
        AutocastKwargs,
        DataLoaderConfiguration,
        DeepSpeedPlugin,
        FullyShardedDataParallelPlugin,
        GradientAccumulationPlugin,
        ParallelismConfig,
        ProfileKwargs,
        ProjectConfiguration,
        TorchDynamoPlugin,
    )
    from paceline.precision import LossScaler
    from paceline.strategies import DistributedType, RunContext, Strategy

T = TypeVar("T")


class Accelerator(Preparing, Saving, Reporting, Ranks):
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
        strategy: str | Strategy | Callable[[RunContext], Strategy] | None = None,
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
        # What builds a run stands on the schema of its configuration, which a mere import must not wait for.
        from paceline.accelerator.arguments import (
            Handlers,
            accumulation_steps,
            check_rng_types,
            compile_settings,
            project_settings,
            refuse_scaler,
        )
        from paceline.accelerator.assembly import assemble
        from paceline.accelerator.oom_report import report_out_of_memory_at_exit
        from paceline.config import DataLoaderConfiguration, GradientAccumulationPlugin

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
        self._components = assemble(os.environ, given, Handlers.sort(kwargs_handlers))
        super().__init__(self._components.context, ActiveLoaders())
        config = self._components.context.config
        self.device_placement = device_placement
        self.dataloader_config = dataloader_config or DataLoaderConfiguration()
        self.project_configuration = project_settings(project_dir, project_config)
        self._tracking = self._choose_trackers(log_with)
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        self.scaler: LossScaler | None = self._components.scaler
        plugin = accumulation or GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps)
        self._window = Window(plugin, self._loaders, self._components.group)
        # Not `self`: what is prepared must go when the script lets go of its Accelerator.
        window = self._window
        self._loaders.micro_batches = lambda: window.num_steps
        self._accumulation = Accumulation(self._window, sync_each_batch=plugin.sync_each_batch)
        self._models: list[nn.Module] = []
        self._optimizers: list[AcceleratedOptimizer] = []
        self._schedulers: list[AcceleratedScheduler] = []
        self._dataloaders: list[PreparedDataLoader] = []
        self._lengths = ScheduleLengths(self._components.group.size, lambda: window.num_steps)
        self._loaders.on_iteration_start = self._lengths.begin_pass
        self._loaders.on_iteration_end = self._lengths.end_pass
        weakref.finalize(self, say, self._lengths.verdict)
        self._checkpointing = Checkpointing(self.project_configuration, self._components.group)
        self._recorder = self._start_recording()
        self._arm()
        self._own_strategy = None if isinstance(strategy, str) else strategy
        self._strategy: Strategy | None
        self._strategy, self._reason = self._decide_early()
        if self._strategy is not None and self._strategy.scales_loss:
            refuse_scaler(self._components.handlers, self._strategy.name)
            self.scaler = None
        itself = weakref.ref(self)
        self._first_steps = FirstSteps(
            self._components.group,
            window,
            self._loaders,
            self._models,
            self.scaler,
            lambda: None if (it := itself()) is None else it._strategy,
        )
        report_out_of_memory_at_exit(
            self, self._components, lambda: None if (it := itself()) is None else it._memory_snapshot()
        )

    def _memory_snapshot(self) -> MemorySnapshot:
        """What fills the memory, for the report of a run that has none left."""
        return self._models, [o.optimizer for o in self._optimizers], self._micro_batch(), self._window.num_steps

    def _choose_trackers(self, log_with: object) -> Trackers:
        folder = None if self.logging_dir is None else Path(self.logging_dir)
        chosen = choose_trackers(log_with, folder)
        return Trackers(chosen, folder, is_main=self.is_main_process, is_asked=log_with is not None)

    def _start_recording(self) -> Recorder | ParityRecorder | None:
        """Note what this run does, where `paceline verify-resume` or `paceline parity` asked for it."""
        recording, group = self._components.resolved.recording, self._components.group
        if recording is None:
            return None
        from paceline.accelerator.recording import ParityRecorder, Recorder

        recorder: Recorder | ParityRecorder
        if recording.parity:
            recorder = ParityRecorder(recording, group, self, self._models, self._optimizers)
        else:
            finish_save = self._checkpointing.wait
            recorder = Recorder(recording, group, lambda: steps_taken(self._optimizers), finish_save)
        self._loaders.watch = recorder.note_batch
        return recorder

    # What was said and decided

    @property
    def mixed_precision(self) -> str:
        """`no`, `bf16` or `fp16`."""
        return self._components.context.precision.mode

    @property
    def distributed_type(self) -> DistributedType:
        """How configuration files call this way of training."""
        return self.strategy.distributed_type

    @property
    def deepspeed_plugin(self) -> DeepSpeedPlugin | None:
        """The settings of DeepSpeed in force, from whatever source; None under another strategy."""
        return self._components.context.config.deepspeed_config

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
        return describe_run(self._components, self._strategy, self._reason, self._dataloaders, self._window.num_steps)

    @property
    def strategy_reason(self) -> str:
        """Which strategy is in force and why, in one line; empty while `auto` waits for a model."""
        return self._reason

    def peak_memory(self) -> int:
        """The most bytes this rank has held: of the device, or of the process on a CPU."""
        return peak_memory(self.device)

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
        self._window.forget()
        say(self._lengths.verdict)
        if self._strategy is not None:
            self._strategy.close()
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
        `gradient_accumulation_steps`, and at the end of the loop over a prepared loader. Where a loop draws from
        several, the one whose batch comes first ends it, and zipped ones end with the shortest.

        Args:
            models: Whose gradients to hold back; all prepared ones when left out.
        """
        return self._accumulation.for_models(models or self._models, self.strategy)

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Keep gradients to this rank inside; the next backward outside exchanges their sum."""
        self.strategy.set_gradient_sync(model, False)
        try:
            yield
        finally:
            self.strategy.set_gradient_sync(model, True)

    def backward(
        self,
        loss: Tensor,
        *,
        weight: float | Tensor | None = None,
        gradient: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Compute gradients: a true mean over the window, over its micro-batches or over what `weight` counts.

        Without `weight`, `loss` is a mean, and the window's gradient is the mean over its micro-batches and ranks.
        With it, `loss` is a sum, `weight` says over how many tokens or samples, and the window's gradient is that of
        the sum over all ranks divided by the total weight, however unequally it is spread.

        Args:
            loss: One value.
            weight: A number, or a tensor of one value (on the device it costs no wait).
            gradient: As in `Tensor.backward`: a weight for each value of a loss that has several.
            kwargs: Passed on to `Tensor.backward`.

        Raises:
            SteppingError: The loss is not one value, or weighted and unweighted losses in one window.
        """
        loss = scalar_loss(loss, gradient)
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
        self.strategy.complete_gradients(listed)
        self._window.finalize_gradients(self.strategy)
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
            self.strategy.complete_gradients(p for group in one.param_groups for p in group["params"])
            self.scaler.unscale_(one.optimizer if isinstance(one, AcceleratedOptimizer) else one)

    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """Open an autocast region for code outside a prepared model, such as a loss."""
        return self._components.context.precision.context(autocast_handler)

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

    # Looking inside

    @contextmanager
    def profile(self, profile_handler: ProfileKwargs | None = None) -> Iterator[torch.profiler.profile]:
        """Profile what runs inside; with `output_trace_dir`, each rank writes `profile_{rank}.json`."""
        with profile(profile_handler or self._components.handlers.profile, self.process_index) as profiler:
            yield profiler
        self.wait_for_everyone()
