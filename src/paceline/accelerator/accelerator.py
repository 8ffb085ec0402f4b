"""The facade: one class whose public methods each delegate to the part that does the work."""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from paceline.accelerator.communication import Communicator
from paceline.accelerator.gradients import Gradients
from paceline.accelerator.policies import current_policies
from paceline.accelerator.preparation import Preparer
from paceline.accelerator.prepared import Prepared
from paceline.accelerator.profiling import peak_memory, profile
from paceline.accelerator.run_tracking import RunTracker
from paceline.accelerator.summary import describe_run
from paceline.accelerator.training_state.manager import CheckpointManager
from paceline.accelerator.weights import WeightWriter
from paceline.data import ActiveLoaders
from paceline.errors import explains_keywords

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer
    from torch.utils.data import DataLoader

    from paceline.accelerator.stepping import AcceleratedOptimizer, AcceleratedScheduler
    from paceline.accelerator.training_state.manager import HookHandle
    from paceline.collectives import Reduction
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
    from paceline.data import PreparedDataLoader
    from paceline.strategies import DistributedType, RunContext, Strategy
    from paceline.tracking import GeneralTracker

F = TypeVar("F", bound="Callable[..., Any]")


_IN_LOADER_SETTINGS = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")
# Arguments of Accelerate (several versions) that do not exist here, with what to write.
_INSTEAD = {
    **{name: f"write dataloader_config=DataLoaderConfiguration({name}=…)" for name in _IN_LOADER_SETTINGS},
    "fp16": 'write mixed_precision="fp16"',
    "logging_dir": "write project_config=ProjectConfiguration(logging_dir=…)",
    "megatron_lm_plugin": "write fsdp_plugin: Megatron-LM is not supported",
    "torch_tp_plugin": "leave it out: tensor parallelism is not supported",
}


class Accelerator:
    """Runs one training script on whatever it was launched on.

    Every rank builds one and calls the same methods in the same order; those marked "Collective" wait for all ranks.
    What the launcher's configuration leaves open can be set here. A setting with different values in both is an error.

    Args:
        device_placement: Move models and batches to the device.
        mixed_precision: `no`, `bf16`, `fp16` or `fp8`.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        cpu: Use the CPU even if there is an accelerator.
        strategy: `auto`, `single`, `ddp`, `fsdp`, `deepspeed`, or your own: a subclass of
            `paceline.strategies.Strategy`, or an instance of one. `auto` takes the least sharding that fits.
        dataloader_config: How prepared loaders are split over ranks.
        fsdp_plugin: Settings of FSDP2; selects that strategy.
        deepspeed_plugin: Settings of DeepSpeed; selects that strategy.
        deepspeed_plugins: Several of these by name; the first one is used until `select_deepspeed_plugin`.
        gradient_accumulation_plugin: More settings than `gradient_accumulation_steps`; give one or the other.
        step_scheduler_with_optimizer: Step a prepared scheduler once for each optimizer step; else on every call.
        kwargs_handlers: `DistributedDataParallelKwargs`, `GradScalerKwargs`, `AutocastKwargs`,
            `InitProcessGroupKwargs`, `ProfileKwargs`, `FP8Config`: at most one of each.
        dynamo_plugin: Settings of `torch.compile`.
        dynamo_backend: Short for `TorchDynamoPlugin(backend=...)`.
        attention_kernels: Kernels behind torch's `scaled_dot_product_attention`: `auto`, `torch` or `flash-attn-4`.
        parallelism_config: Sizes of the mesh axes, for hybrid sharding.
        project_dir: Where a run keeps its files.
        project_config: More settings than `project_dir`; give one or the other.
        log_with: Experiment trackers for `init_trackers` to open: a name, `all` that are installed, an instance of
            `paceline.tracking.GeneralTracker`, or a list of these. JSON lines are also written wherever there is a
            folder for logs.
        rng_types: Accepted as `["generator"]` or None: the order of samples depends on seed and epoch only, so
            no generator has to be synchronised.

    Attributes:
        scaler: The loss scaler for fp16; None in any other precision, and where the engine scales the loss.
        project_configuration: Where the run keeps its files, and how checkpoints are named.

    Raises:
        ConfigError: Arguments contradict each other or the launcher's configuration; lists all problems.
        PrecisionError: The device does not support the precision.

    Example:
        >>> accelerator = Accelerator(cpu=True)
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=4)
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        >>> for batch in loader:
        ...     accelerator.backward(model(batch).pow(2).mean())
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    @explains_keywords(_INSTEAD)
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
        deepspeed_plugins: Mapping[str, DeepSpeedPlugin] | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: Sequence[object] = (),
        dynamo_plugin: TorchDynamoPlugin | None = None,
        dynamo_backend: str | None = None,
        attention_kernels: str | None = None,
        parallelism_config: ParallelismConfig | None = None,
        project_dir: str | os.PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
        log_with: object = None,
        rng_types: Sequence[str] | None = None,
    ) -> None:
        # These modules need the configuration's schema, which takes too long to load for a mere import of paceline.
        from paceline.accelerator import arguments
        from paceline.accelerator.assembly import assemble
        from paceline.accelerator.oom_report import report_out_of_memory_at_exit
        from paceline.accelerator.recording import start_recording
        from paceline.accelerator.strategy_selection import StrategySelector, usable_scaler
        from paceline.config import DataLoaderConfiguration

        arguments.check_rng_types(rng_types)
        policies = current_policies()
        steps = arguments.accumulation_steps(gradient_accumulation_plugin, gradient_accumulation_steps)
        explicit = {
            "strategy": strategy if isinstance(strategy, str) else None,
            "mixed_precision": mixed_precision,
            "gradient_accumulation_steps": steps,
            "use_cpu": cpu,
            "fsdp_config": fsdp_plugin,
            "deepspeed_config": arguments.first_plugin(deepspeed_plugin, deepspeed_plugins),
            "dynamo_config": arguments.compile_settings(dynamo_plugin, dynamo_backend),
            "attention_kernels": attention_kernels,
            "parallelism_config": parallelism_config,
        }
        handlers = arguments.Handlers.sort(kwargs_handlers)
        self._components = components = assemble(os.environ, explicit, handlers, policies)
        self._deepspeed_plugins = dict(deepspeed_plugins or {})
        self._context = context = components.context
        self.project_configuration: ProjectConfiguration = arguments.project_settings(project_dir, project_config)
        accumulation = arguments.accumulation_settings(gradient_accumulation_plugin, context.config)
        self._prepared = prepared = Prepared()
        family = policies.loaders(loaders := ActiveLoaders())
        self._window = window = policies.open_window(accumulation, family.position, context.group)
        remaining_steps = partial(prepared.remaining_steps, window)
        self._selector = selector = StrategySelector(components, prepared.optimizers, strategy, remaining_steps)
        self.scaler = scaler = usable_scaler(components, selector.maybe_current)
        self._tracker = RunTracker(log_with, self.logging_dir, components, prepared, selector, window)
        self._communicator = Communicator(context, family)
        self._weights = WeightWriter(context.group, selector)
        state = prepared.state_source(selector, scaler)
        self._checkpoints = CheckpointManager(
            self.project_configuration, context.group, state, prepared.registered, window, loaders
        )
        recorder = start_recording(components, self, prepared, loaders, self._checkpoints.wait)
        self._gradients = Gradients(
            prepared, selector, window, accumulation.sync_each_batch, scaler=scaler, recorder=recorder
        )
        self._preparer = Preparer(
            components,
            prepared,
            selector,
            window,
            loaders,
            family,
            scaler=scaler,
            before_step=self._checkpoints.before_step,
            recorder=recorder,
            device_placement=device_placement,
            dataloader_config=dataloader_config or DataLoaderConfiguration(),
            step_scheduler_with_optimizer=step_scheduler_with_optimizer,
        )
        report_out_of_memory_at_exit(self._preparer, components)

    # Processes

    @property
    def device(self) -> torch.device:
        """The device on which this rank computes."""
        return self._context.device

    @property
    def num_processes(self) -> int:
        """The number of ranks, over all machines."""
        return self._context.world.size

    @property
    def process_index(self) -> int:
        """The rank of this process, over all machines."""
        return self._context.world.rank

    @property
    def local_process_index(self) -> int:
        """The rank of this process on its machine."""
        return self._context.world.local_rank

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self._context.world.is_main

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first rank of its machine."""
        return self._context.world.is_local_main

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last rank."""
        return self._context.world.is_last

    @property
    def use_distributed(self) -> bool:
        """Whether there is more than one rank."""
        return self.num_processes > 1

    # Settings

    @property
    def mixed_precision(self) -> str:
        """The precision: `no`, `bf16`, `fp16` or `fp8`."""
        return self._context.precision.mode

    @property
    def distributed_type(self) -> DistributedType:
        """The strategy under its name in configuration files.

        Raises:
            PrepareError: `strategy="auto"`, and no model has been prepared.
        """
        return self.strategy.distributed_type

    @property
    def strategy(self) -> Strategy:
        """The strategy; `auto` is decided when the first model is prepared.

        Raises:
            PrepareError: It is not decided yet.
        """
        return self._selector.current

    @property
    def strategy_reason(self) -> str:
        """Which strategy it is and why, in one line; empty while `auto` waits for a model."""
        return self._selector.reason

    @property
    def deepspeed_plugin(self) -> DeepSpeedPlugin | None:
        """The settings of DeepSpeed from all sources; None under another strategy."""
        return self._selector.context.config.deepspeed_config

    def select_deepspeed_plugin(self, name: str) -> None:
        """Use another of `deepspeed_plugins` for models prepared from now on.

        Args:
            name: Its key.

        Raises:
            ConfigError: There is no such plugin, or it contradicts the launcher's configuration.
            PrepareError: A model was prepared under another one.
        """
        from paceline.accelerator.arguments import named_plugin

        self.replace_plugin(named_plugin(self._deepspeed_plugins, name))

    def replace_plugin(self, plugin: DeepSpeedPlugin | FullyShardedDataParallelPlugin) -> None:
        """Replace the constructor's settings of FSDP2 or DeepSpeed, before the first model is prepared.

        Args:
            plugin: All settings; those of the launcher's configuration still hold where it leaves them open.

        Raises:
            ConfigError: It contradicts the launcher's configuration.
            PrepareError: A model was prepared under the current settings.
        """
        from paceline.config import DeepSpeedPlugin

        section = "deepspeed_config" if isinstance(plugin, DeepSpeedPlugin) else "fsdp_config"
        self._selector.use_config(self._components.resolve_with(os.environ, section, plugin).config)

    @property
    def fsdp_plugin(self) -> FullyShardedDataParallelPlugin | None:
        """The settings of FSDP2 from all sources; None where there are none."""
        return self._selector.context.config.fsdp_config

    @property
    def parallelism_config(self) -> ParallelismConfig | None:
        """The sizes of the mesh axes from all sources; None where there are none."""
        return self._context.config.parallelism_config

    @property
    def torch_device_mesh(self) -> DeviceMesh | None:
        """The device mesh over which the strategy spreads models; None if it has none, or is not decided yet."""
        strategy = self._selector.maybe_current
        return None if strategy is None else strategy.mesh

    @property
    def context(self) -> RunContext:
        """The run as strategies see it: ranks, device, precision and configuration."""
        return self._selector.context

    @property
    def prepared(self) -> Prepared:
        """What was prepared and registered; the lists grow with each call and belong to this Accelerator."""
        return self._prepared

    @property
    def project_dir(self) -> str | None:
        """Where the run keeps its files."""
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> str | None:
        """Where the run keeps its logs: `logging_dir` of the project configuration, else `project_dir`."""
        return self.project_configuration.logging_dir or self.project_dir

    @property
    def device_placement(self) -> bool:
        """Whether `prepare` moves models and batches to the device, unless a call overrides it."""
        return self._preparer.device_placement

    @device_placement.setter
    def device_placement(self, value: bool) -> None:
        self._preparer.device_placement = value

    @property
    def dataloader_config(self) -> DataLoaderConfiguration:
        """How loaders prepared from now on are split over ranks."""
        return self._preparer.dataloader_config

    @dataloader_config.setter
    def dataloader_config(self, value: DataLoaderConfiguration) -> None:
        self._preparer.dataloader_config = value

    @property
    def step_scheduler_with_optimizer(self) -> bool:
        """Whether schedulers prepared from now on step once for each optimizer step; else on every call."""
        return self._preparer.step_scheduler_with_optimizer

    @step_scheduler_with_optimizer.setter
    def step_scheduler_with_optimizer(self, value: bool) -> None:
        self._preparer.step_scheduler_with_optimizer = value

    @property
    def split_batches(self) -> bool:
        """Whether the batch size of a loader is the global one, over all ranks."""
        return self.dataloader_config.split_batches

    @property
    def even_batches(self) -> bool:
        """Whether the last batches are filled up so that all ranks have the same number."""
        return self.dataloader_config.even_batches

    def describe(self) -> str:
        """Describe what was detected and decided, for the start of a log.

        Returns:
            Lines of text: processes, device, strategy and why, precision, data, explicit settings.

        Example:
            >>> print(Accelerator(cpu=True, strategy="single").describe())
            processes     1
            device        cpu...
        """
        return describe_run(self._components, self._selector, self._prepared, self._window.num_steps)

    def peak_memory(self) -> int:
        """Measure the most memory that this rank has used.

        Returns:
            Bytes: allocated on the device, or resident in the process on a CPU.

        Example:
            >>> Accelerator(cpu=True).peak_memory() > 0
            True
        """
        return peak_memory(self.device)

    def free_memory(self, *objects: Any) -> list[None]:
        """Forget everything prepared and free the device's memory.

        Assign the result to the variables that hold the objects, so that nothing keeps them alive.

        Args:
            objects: The script's prepared objects.

        Returns:
            One None for each object.

        Raises:
            CheckpointError: A save in the background failed; everything is forgotten anyway.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> model = accelerator.prepare(nn.Linear(2, 1))
            >>> (model,) = accelerator.free_memory(model)
        """
        self._preparer.forget()
        try:
            self._checkpoints.release()
        finally:
            self._gradients.release()
            self._selector.reset()
        count = len(objects)
        del objects
        gc.collect()
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()
        return [None] * count

    clear = free_memory

    # Preparation

    def prepare(self, *args: Any, device_placement: Sequence[bool | None] | None = None) -> Any:
        """Prepare models, optimizers, loaders and schedulers for the run.

        Any other object, or one that was prepared before, is returned unchanged; on several ranks an iterable of
        batches that is not a `DataLoader` is prepared as well. An optimizer may be created before or after its model is
        prepared.
        Collective: every rank must call it.

        Args:
            args: In any order.
            device_placement: One flag for each argument, to override `device_placement` of the constructor.

        Returns:
            The prepared objects in the same order, as a tuple; a single one is returned by itself.

        Raises:
            PrepareError: Something cannot be trained, sharded or stepped.
            DataError: A loader cannot be split over ranks.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> model = nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> loader = torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=4)
            >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        """
        return self._preparer.prepare(args, device_placement)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Prepare one model.

        Collective: every rank must call it.

        Args:
            model: To be trained, or only evaluated.
            device_placement: Overrides the constructor's.
            evaluation_mode: Only place the model; exchange no gradients for it.

        Returns:
            What to call instead of the model.

        Raises:
            PrepareError: It cannot be trained or sharded.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> teacher = accelerator.prepare_model(nn.Linear(2, 1), evaluation_mode=True)
        """
        return self._preparer.prepare_model(model, device_placement, evaluation_mode=evaluation_mode)

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> AcceleratedOptimizer:
        """Prepare one optimizer, before or after the model whose parameters it updates.

        Collective: every rank must call it.

        Args:
            optimizer: A torch optimizer, or a subclass.
            device_placement: Accepted; an optimizer's state follows its parameters.

        Returns:
            An optimizer that steps at the end of each accumulation window.

        Raises:
            PrepareError: It updates parameters of a model that was not prepared.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> model = accelerator.prepare_model(nn.Linear(2, 1))
            >>> optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        """
        return self._preparer.prepare_optimizer(optimizer)

    def prepare_data_loader(
        self, data_loader: Any, device_placement: bool | None = None, *, saved: bool = True, ordered: bool = False
    ) -> PreparedDataLoader:
        """Prepare one loader, which then yields this rank's part, copied to the device ahead of time.

        Args:
            data_loader: A `DataLoader`, or another iterable of batches: a single rank reads it unchanged, several as
                `dispatch_batches` or `streams_are_sharded` say.
            device_placement: Overrides the constructor's.
            saved: Whether checkpoints contain its position; False for any number of loaders that always begin at their
                first sample.
            ordered: Whether the batches of rank 0, 1, … must follow each other in the order of a stream: then rank 0
                reads it for all ranks, unless `dispatch_batches` or `streams_are_sharded` say otherwise.

        Returns:
            The loader to iterate instead.

        Raises:
            DataError: It cannot be split over ranks.

        Example:
            >>> loader = torch.utils.data.DataLoader(torch.arange(4), batch_size=2)
            >>> [batch.tolist() for batch in Accelerator(cpu=True).prepare_data_loader(loader)]
            [[0, 1], [2, 3]]
        """
        prepared: PreparedDataLoader = self._preparer.prepare_data_loader(
            data_loader, device_placement, saved=saved, ordered=ordered
        )
        return prepared

    def prepare_scheduler(self, scheduler: Any) -> AcceleratedScheduler:
        """Prepare one learning-rate scheduler, after its optimizer.

        Args:
            scheduler: A torch scheduler, or an object with the same methods.

        Returns:
            A scheduler that steps once for each step that its optimizer takes.

        Raises:
            PrepareError: It is a `DummyScheduler`, and the strategy reads no DeepSpeed configuration.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> model = nn.Linear(2, 1)
            >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            >>> scheduler = accelerator.prepare_scheduler(torch.optim.lr_scheduler.StepLR(optimizer, 10))
        """
        return self._preparer.prepare_scheduler(scheduler)

    def skip_first_batches(self, dataloader: DataLoader[Any], num_batches: int = 0) -> DataLoader[Any]:
        """Make a view of a loader whose first epoch begins `num_batches` batches later.

        Harmless but unnecessary after `load_state`, which makes prepared loaders continue where they were.

        Args:
            dataloader: Prepared or not.
            num_batches: How many batches of this rank to skip.

        Returns:
            The loader to iterate in this epoch.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> loader = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(4), batch_size=2))
            >>> [batch.tolist() for batch in accelerator.skip_first_batches(loader, 1)]
            [[2, 3]]
        """
        from paceline.data import skip_first_batches

        return skip_first_batches(dataloader, num_batches)

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> nn.Module:
        """Get the script's own module from a prepared one; under FSDP2 that module is the sharded one.

        Args:
            model: Prepared or not.
            keep_fp32_wrapper: Accepted: `forward` of a prepared model is the script's own in any case.
            keep_torch_compile: False also removes the wrapper of `torch.compile(model)`.

        Returns:
            The module.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> module = nn.Linear(2, 1)
            >>> accelerator.unwrap_model(accelerator.prepare(module)) is module
            True
        """
        return self._preparer.unwrap_model(model, keep_torch_compile=keep_torch_compile)

    def init_module(self) -> AbstractContextManager[Any]:
        """Build large models inside: under ZeRO stage 3 each parameter is sharded as soon as it is created.

        Under any other strategy it changes nothing; FSDP2 accepts models built under `torch.device("meta")`.

        Returns:
            A context manager.

        Raises:
            PrepareError: `strategy="auto"`, and no model has been prepared.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> with accelerator.init_module():
            ...     model = nn.Linear(2, 1)
        """
        return self.strategy.init_module()

    def gather_parameters(
        self, parameters: nn.Module | nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = None
    ) -> AbstractContextManager[Any]:
        """Gather sharded parameters inside, to read or change them.

        Collective: every rank must call it.

        Args:
            parameters: Of a prepared model, or the whole model.
            modifier_rank: The rank whose changes all ranks receive; None if nothing is changed.

        Returns:
            A context manager.

        Raises:
            PrepareError: The strategy cannot gather them.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> model = accelerator.prepare(nn.Linear(2, 1))
            >>> with accelerator.gather_parameters(model, modifier_rank=0):
            ...     if accelerator.is_main_process:
            ...         _ = nn.init.zeros_(model.bias)
        """
        return self._preparer.gather_parameters(parameters, modifier_rank)

    # One step

    @property
    def sync_gradients(self) -> bool:
        """Whether the current micro-batch is the last of its accumulation window.

        `accumulate` sets it. A script that manages its own windows sets it before the forward: optimizers and
        schedulers step, and DeepSpeed's engine ends its window, only when it is True. `no_sync` decides whether
        gradients are exchanged.
        """
        return self._window.boundary.sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        self._gradients.set_sync(value)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self._window.num_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, value: int) -> None:
        self._window.num_steps = value

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last step of any prepared optimizer was skipped for an fp16 overflow."""
        return any(optimizer.step_was_skipped for optimizer in self._prepared.optimizers)

    def accumulate(self, *models: nn.Module) -> AbstractContextManager[None]:
        """Run the forward, backward and step of one micro-batch inside.

        Gradients are exchanged, and optimizers and schedulers step, only in the last micro-batch of a window: every
        `gradient_accumulation_steps`, and at the end of the loop over a prepared loader. If a loop reads from several
        loaders, the one whose batch comes first ends it, and zipped ones end with the shortest.

        Args:
            models: Models whose gradients are exchanged only when the window ends; by default all prepared ones.

        Returns:
            A context manager.

        Raises:
            SteppingError: An optimizer's `step` is called only before the end of windows, so it would never step.

        Example:
            >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
            >>> model = nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> loader = torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2)
            >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            >>> for batch in loader:
            ...     with accelerator.accumulate(model):
            ...         accelerator.backward(model(batch).mean())
            ...         optimizer.step()
            ...         optimizer.zero_grad()
            >>> optimizer.num_steps
            2
        """
        return self._gradients.accumulate(models)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Exchange no gradients inside; the next backward pass outside exchanges their sum.

        Args:
            model: A prepared model.

        Returns:
            A context manager.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> model = accelerator.prepare(nn.Linear(2, 1))
            >>> with accelerator.no_sync(model):
            ...     accelerator.backward(model(torch.ones(4, 2)).mean())
        """
        return self._gradients.no_sync(model)

    def trigger_sync_in_backward(self, model: nn.Module) -> AbstractContextManager[None]:
        """Exchange gradients in the backward inside, even though every forward ran under `no_sync`.

        Args:
            model: A prepared model.

        Returns:
            A context manager.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> model = accelerator.prepare(nn.Linear(2, 1))
            >>> with accelerator.no_sync(model):
            ...     loss = model(torch.ones(4, 2)).mean()
            >>> with accelerator.trigger_sync_in_backward(model):
            ...     accelerator.backward(loss)
        """
        return self._gradients.trigger_sync_in_backward(model)

    def backward(
        self,
        loss: Tensor,
        *,
        weight: float | Tensor | None = None,
        gradient: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Compute gradients: a true mean over the window, over its micro-batches or over what `weight` counts.

        Without `weight`, `loss` is a mean, and the window's gradient is the mean over its micro-batches and ranks. With
        it, `loss` is a sum over `weight` tokens or samples, and the window's gradient is that of the sum over all ranks
        divided by the total weight, however unevenly that is distributed.
        Collective: every rank must call it.

        Args:
            loss: One value.
            weight: A number, or a tensor of one value (on the device, to avoid waiting for it).
            gradient: As in `Tensor.backward`: for a loss of several values, a weight for each, in the same shape.
            kwargs: Passed on to `Tensor.backward`.

        Raises:
            SteppingError: The loss is not one value, or the window mixes losses with and without a weight.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> model = accelerator.prepare(nn.Linear(2, 1))
            >>> accelerator.backward(model(torch.ones(4, 2)).sum(), weight=4)
            >>> model.bias.grad
            tensor([1.])
        """
        self._gradients.backward(loss, weight, gradient, kwargs)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """Scale gradients so that their norm over all ranks is at most `max_norm`.

        Collective under sharding: every rank must call it.

        Args:
            parameters: Any parameters of prepared models.
            max_norm: `inf` only measures.
            norm_type: 2, another power, or `inf`.

        Returns:
            The norm before clipping, shape [], on the device. `.item()` waits for the device.

        Raises:
            SteppingError: Called before the accumulation window ends.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> model = accelerator.prepare(nn.Linear(1, 1))
            >>> accelerator.backward(model(torch.zeros(4, 1)).mean())
            >>> accelerator.clip_grad_norm_(model.parameters(), 0.5)
            tensor(1.)
        """
        return self._gradients.clip_norm(parameters, max_norm, norm_type)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clamp every element of every gradient to [-clip_value, clip_value].

        Collective when losses are weighted: every rank must call it.

        Args:
            parameters: Any parameters of prepared models.
            clip_value: At least 0.

        Raises:
            SteppingError: Called before the accumulation window ends.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> model = accelerator.prepare(nn.Linear(2, 1))
            >>> accelerator.backward(model(torch.ones(4, 2)).mean())
            >>> accelerator.clip_grad_value_(model.parameters(), 0.5)
        """
        self._gradients.clip_value(parameters, clip_value)

    def unscale_gradients(self, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> None:
        """Divide fp16 gradients by the loss scale; in any other precision, or a second time, it does nothing.

        Collective under fp16: every rank must call it.

        Args:
            optimizer: One or several prepared optimizers; by default all of them.

        Raises:
            SteppingError: No loss has been scaled yet.

        Example:
            >>> Accelerator(cpu=True).unscale_gradients()
        """
        self._gradients.unscale(optimizer)

    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """Open an autocast region for code outside a prepared model, such as a loss.

        Args:
            autocast_handler: Settings that replace those of `kwargs_handlers` inside.

        Returns:
            A context manager.

        Example:
            >>> accelerator = Accelerator(cpu=True, mixed_precision="bf16")
            >>> with accelerator.autocast():
            ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
            torch.bfloat16
        """
        return self._context.precision.context(autocast_handler)

    def join_uneven_inputs(
        self, joinables: Sequence[nn.Module], even_batches: bool | None = None
    ) -> AbstractContextManager[None]:
        """Let ranks that run out of batches keep taking part in the others' exchanges (DDP).

        Collective: every rank must call it.

        Args:
            joinables: The prepared models that the loop trains.
            even_batches: Overrides the setting of the prepared loaders inside.

        Returns:
            A context manager.

        Raises:
            SteppingError: The strategy cannot train with uneven batches.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> model = nn.Linear(2, 1)
            >>> loader = torch.utils.data.DataLoader(torch.ones(3, 2))
            >>> model, loader = accelerator.prepare(model, loader)
            >>> with accelerator.join_uneven_inputs([model], even_batches=False):
            ...     for batch in loader:
            ...         accelerator.backward(model(batch).mean())
        """
        return self._gradients.join_uneven_inputs(joinables, even_batches)

    @contextmanager
    def profile(self, profile_handler: ProfileKwargs | None = None) -> Iterator[torch.profiler.profile]:
        """Profile what runs inside.

        Collective: every rank must call it.

        Args:
            profile_handler: Settings that replace those of `kwargs_handlers`. With `output_trace_dir`, each rank
                writes `profile_{rank}.json` at the end.

        Yields:
            The profiler of torch.

        Raises:
            PacelineError: The settings name an activity that the profiler does not know.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> with accelerator.profile() as profiler:
            ...     _ = torch.ones(2) + 1
        """
        with profile(profile_handler or self._components.handlers.profile, self.process_index) as profiler:
            yield profiler
        self.wait_for_everyone()

    # Communication

    def gather(self, tensor: Any) -> Any:
        """Concatenate tensors from all ranks along dim 0.

        Collective: every rank must call it.

        Args:
            tensor: A tensor of shape [N, ...] or [], or a nested structure of them; the same shapes on all ranks.

        Returns:
            The same structure, with tensors of shape [ranks * N, ...], on every rank.

        Raises:
            CollectiveError: Under `debug`, the ranks' shapes differ.

        Example:
            >>> Accelerator(cpu=True).gather(torch.tensor([1.0]))
            tensor([1.])
        """
        return self._communicator.gather(tensor)

    def gather_for_metrics(
        self, input_data: Any, use_gather_object: bool = False, *, pad_index: float | None = None
    ) -> Any:
        """Gather so that every sample counts once: duplicates that fill the last batches are dropped.

        A rank whose batch was not filled contributes all of its values, and one whose batch holds only duplicates
        contributes none. If a batch was partly filled, tensors and lists with one row or entry per sample are cut, and
        anything else is an error that names it; `fill_batches = False` on the prepared loader leaves that batch short
        instead. Ranks may differ in dimension 0.

        A value that is not per sample is kept, unless the batch holds only duplicates: a tensor of shape [] becomes one
        number per rank, any other value a list with one entry per rank. A list of dictionaries, or of as many tensors
        as there are samples, counts as one entry per sample; dictionaries and other tuples and lists of tensors keep
        their structure.
        Collective: every rank must call it.

        Args:
            input_data: Tensors of shape [samples, ...] and objects, nested.
            use_gather_object: Pickle tensors too, for shapes that differ: they become a list with one entry per rank,
                and lists are concatenated.
            pad_index: Pad tensors that differ in dimension 1 to the longest, with this value.

        Returns:
            The same structure over all ranks' samples, on every rank.

        Raises:
            CollectiveError: Some ranks have no batch left, so they will not call it; or a value can be neither cut nor
                concatenated.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> loader = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(3), batch_size=2))
            >>> [accelerator.gather_for_metrics(batch).tolist() for batch in loader]
            [[0, 1], [2]]
        """
        return self._communicator.gather_for_metrics(input_data, use_gather_object, pad_index)

    def gather_object(self, value: Any) -> list[Any]:
        """Concatenate lists of Python objects from all ranks.

        Collective: every rank must call it.

        Args:
            value: A list of objects that can be pickled.

        Returns:
            The objects of all ranks, on every rank.

        Example:
            >>> Accelerator(cpu=True).gather_object(["a", "b"])
            ['a', 'b']
        """
        return self._communicator.gather_object(value)

    def reduce(self, tensor: Any, reduction: Reduction = "sum", scale: float = 1.0) -> Any:
        """Sum or average tensors over ranks.

        Collective: every rank must call it.

        Args:
            tensor: A tensor of any shape, or a nested structure of them; the same shapes on all ranks.
            reduction: `sum`, `mean` or `none`.
            scale: Multiplies the result.

        Returns:
            New tensors of the same shapes, on every rank.

        Raises:
            CollectiveError: An unknown reduction, or under `debug` shapes that differ between ranks.

        Example:
            >>> Accelerator(cpu=True).reduce(torch.tensor(2.0), "mean")
            tensor(2.)
        """
        return self._communicator.reduce(tensor, reduction, scale)

    def broadcast(self, tensor: Any, from_process: int = 0) -> Any:
        """Send tensors from one rank to all, in place.

        Collective: every rank must call it.

        Args:
            tensor: A tensor, or a nested structure of them; the same shapes on all ranks.
            from_process: The rank that sends.

        Returns:
            The same tensors, with the sender's values.

        Raises:
            CollectiveError: Under `debug`, the ranks' shapes differ.

        Example:
            >>> Accelerator(cpu=True).broadcast(torch.tensor([1.0]))
            tensor([1.])
        """
        return self._communicator.broadcast(tensor, from_process)

    def broadcast_object_list(self, object_list: list[Any], from_process: int = 0) -> list[Any]:
        """Send a list of Python objects from one rank to all, in place.

        Collective: every rank must call it.

        Args:
            object_list: Of the same length on all ranks; its entries must be picklable.
            from_process: The rank that sends.

        Returns:
            The same list, with the sender's entries.

        Example:
            >>> Accelerator(cpu=True).broadcast_object_list(["seed", 42])
            ['seed', 42]
        """
        return self._communicator.broadcast_object_list(object_list, from_process)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Pad tensors along one dimension to the longest over all ranks.

        Collective: every rank must call it.

        Args:
            tensor: A tensor, or a nested structure of them; ranks may differ in `dim`.
            dim: The dimension to pad.
            pad_index: The value to pad with.
            pad_first: Pad at the beginning instead of the end.

        Returns:
            The same structure, with tensors of the same shape on all ranks.

        Example:
            >>> Accelerator(cpu=True).pad_across_processes(torch.ones(1, 2), dim=1)
            tensor([[1., 1.]])
        """
        return self._communicator.pad_across_processes(tensor, dim, pad_index, pad_first)

    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> AbstractContextManager[Any]:
        """Split a list, tuple, tensor, or dictionary of them over ranks; nothing is exchanged.

        Args:
            inputs: The same on all ranks.
            apply_padding: Repeat the last entry so that all ranks get the same number.

        Returns:
            A context manager that yields this rank's part.

        Example:
            >>> with Accelerator(cpu=True).split_between_processes(["a", "b"]) as prompts:
            ...     prompts
            ['a', 'b']
        """
        return self._communicator.split_between_processes(inputs, apply_padding)

    def wait_for_everyone(self) -> None:
        """Wait until every rank has called it.

        Collective: every rank must call it.

        Example:
            >>> Accelerator(cpu=True).wait_for_everyone()
        """
        self._communicator.wait_for_everyone()

    def main_process_first(self) -> AbstractContextManager[None]:
        """Let rank 0 run the body before the other ranks do, however long that takes.

        The others wait without a time limit, and log so once a minute. An exception on rank 0 is raised on them too.
        The body must not communicate with other ranks, which have not entered it yet.
        Collective: every rank must call it.

        Returns:
            A context manager.

        Example:
            >>> with Accelerator(cpu=True).main_process_first():
            ...     dataset = list(range(4))  # download and cache on rank 0, read the cache on the others
        """
        return self._communicator.main_process_first()

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """Let the first rank of each machine run the body before that machine's others do.

        Collective: every rank must call it.

        Returns:
            A context manager.

        Example:
            >>> with Accelerator(cpu=True).local_main_process_first():
            ...     dataset = list(range(4))  # download and cache once on each machine
        """
        return self._communicator.local_main_process_first()

    def set_trigger(self) -> None:
        """Set a flag on this rank that `check_trigger` reports to all.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> accelerator.set_trigger()
            >>> accelerator.check_trigger(), accelerator.check_trigger()
            (True, False)
        """
        self._communicator.set_trigger()

    def check_trigger(self) -> bool:
        """Check whether any rank has called `set_trigger`, and clear the flag.

        Collective: every rank must call it.

        Returns:
            The same on every rank.

        Example:
            >>> Accelerator(cpu=True).check_trigger()
            False
        """
        return self._communicator.check_trigger()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first rank of each machine only.

        Args:
            args: Passed on to `print`.
            kwargs: Passed on to `print`.

        Example:
            >>> Accelerator(cpu=True).print("epoch", 1)
            epoch 1
        """
        self._communicator.print(*args, **kwargs)

    def on_main_process(self, function: F) -> F:
        """Decorate a function to run on rank 0 only.

        Args:
            function: Must not communicate with other ranks.

        Returns:
            The function; on other ranks it returns None.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> @accelerator.on_main_process
            ... def report(loss):
            ...     return f"loss {loss}"
            >>> report(0.5)
            'loss 0.5'
        """
        return self._communicator.on_main_process(function)

    def on_local_main_process(self, function: F) -> F:
        """Decorate a function to run on the first rank of each machine only.

        Args:
            function: Must not communicate with other ranks.

        Returns:
            The function; on other ranks it returns None.

        Example:
            >>> Accelerator(cpu=True).on_local_main_process(len)("ab")
            2
        """
        return self._communicator.on_local_main_process(function)

    def on_last_process(self, function: F) -> F:
        """Decorate a function to run on the last rank only.

        Args:
            function: Must not communicate with other ranks.

        Returns:
            The function; on other ranks it returns None.

        Example:
            >>> Accelerator(cpu=True).on_last_process(len)("ab")
            2
        """
        return self._communicator.on_last_process(function)

    def on_process(self, function: F | None = None, process_index: int = 0) -> Any:
        """Decorate a function to run on one rank only.

        Args:
            function: Must not communicate with other ranks; None returns a decorator.
            process_index: The rank.

        Returns:
            The function; on other ranks it returns None.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> @accelerator.on_process(process_index=0)
            ... def name():
            ...     return "first"
            >>> name()
            'first'
        """
        return self._communicator.on_process(function, process_index)

    def on_local_process(self, function: F | None = None, local_process_index: int = 0) -> Any:
        """Decorate a function to run on one rank of each machine only.

        Args:
            function: Must not communicate with other ranks; None returns a decorator.
            local_process_index: The rank on its machine.

        Returns:
            The function; on other ranks it returns None.

        Example:
            >>> Accelerator(cpu=True).on_local_process(len, 0)("ab")
            2
        """
        return self._communicator.on_local_process(function, local_process_index)

    # Checkpoints

    @property
    def save_iteration(self) -> int:
        """The number of the next checkpoint under `automatic_checkpoint_naming`."""
        return self._checkpoints.next_iteration

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Add the script's own objects to what `save_state` saves.

        Args:
            objects: Objects with `state_dict` and `load_state_dict`, in the same order in every run.

        Raises:
            StateError: Some lack one of the two methods; lists them.

        Example:
            >>> averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 1))
            >>> Accelerator(cpu=True).register_for_checkpointing(averaged)
        """
        self._checkpoints.register(*objects)

    def register_save_state_pre_hook(self, hook: Callable[..., Any]) -> HookHandle:
        """Call a hook before each save, on every rank.

        Args:
            hook: Called as `hook(models, weights, folder)`. It may write files into `folder`, which become part of
                the checkpoint, and remove entries from the end of both lists to keep the weights of those models out.

        Returns:
            A handle; its `remove` unregisters the hook.

        Example:
            >>> import shutil
            >>> def copy_script(models, weights, folder):
            ...     shutil.copy("train.py", folder)
            >>> handle = Accelerator(cpu=True).register_save_state_pre_hook(copy_script)
            >>> handle.remove()
        """
        return self._checkpoints.add_save_hook(hook)

    def register_load_state_pre_hook(self, hook: Callable[..., Any]) -> HookHandle:
        """Call a hook before each load, on every rank.

        Args:
            hook: Called as `hook(models, folder)`. Models that it removes from the end of the list are not loaded: it
                has loaded them itself.

        Returns:
            A handle; its `remove` unregisters the hook.

        Example:
            >>> handle = Accelerator(cpu=True).register_load_state_pre_hook(lambda models, folder: None)
            >>> handle.remove()
        """
        return self._checkpoints.add_load_hook(hook)

    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        *,
        blocking: bool | None = None,
    ) -> str:
        """Save everything prepared and registered, to resume from exactly here.

        This means weights, optimizers, schedulers, loss scale, the position of every loader and all random generators.
        The folder appears under its name only when it is complete; until then a previous one stays in place. Any number
        of ranks can load it, under any strategy.
        Collective: every rank must call it.

        Args:
            output_dir: The checkpoint's folder; None with `automatic_checkpoint_naming`, which numbers them. An
                existing checkpoint is replaced; other files in that folder stay.
            safe_serialization: Must be True: paceline writes no pickle.
            blocking: False returns once the state is copied to host memory, and writes while training continues;
                `wait_for_save`, the next save and the end of the program wait for that. None takes
                `ProjectConfiguration.save_in_background`.

        Returns:
            The folder.

        Raises:
            SteppingError: There are gradients that no optimizer has used yet.
            CheckpointError: On every rank, when any of them could not write, now or in the save before.
            StateError: Some state cannot be stored in a checkpoint; names it.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> model = accelerator.prepare(nn.Linear(2, 1))
            >>> accelerator.save_state("runs/a")
            'runs/a'
            >>> accelerator.load_state("runs/a")
            'runs/a'
        """
        return self._checkpoints.save(output_dir, safe_serialization, blocking=blocking)

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: dict[str, Any] | None = None,
        *,
        map_location: str | None = None,
        strict: bool = True,
        progress: bool = True,
    ) -> str | None:
        """Load what `save_state` saved, after the same objects were prepared and registered.

        The next epoch over each prepared loader continues where it was.
        Collective: every rank must call it.

        Args:
            input_dir: The checkpoint's folder; None takes the newest complete one under `project_dir`, with a warning
                for each newer one that is damaged. A folder written by Accelerate's `save_state`, the transformers
                Trainer, DeepSpeed or torch.distributed.checkpoint is imported as far as it fits, with a log line for
                each thing imported or left out.
            load_kwargs: Must be None: Accelerate passes them to its pickle reader, and paceline reads no pickles.
            map_location: `"cpu"`, `"on_device"` or None as for Accelerate; all the same here, since tensors are read
                to the device of the prepared objects.
            strict: Refuse a checkpoint with missing or unexpected tensors; otherwise they are named in a warning.
            progress: Load everything. If False, only the weights and the state of the optimizers are loaded, for
                example those of the best step: schedulers, loaders, generators and registered objects stay as they
                are.

        Returns:
            The folder; None if there is no checkpoint under `project_dir` yet.

        Raises:
            CheckpointError: It is damaged, or does not match the model.
            StateError: Other objects were prepared or registered.

        Example:
            >>> accelerator = Accelerator(cpu=True, project_dir="runs/new")
            >>> model = accelerator.prepare(nn.Linear(2, 1))
            >>> accelerator.load_state() is None  # nothing saved yet: train from the beginning
            True
        """
        return self._checkpoints.load(input_dir, load_kwargs, map_location, strict=strict, progress=progress)

    def wait_for_save(self) -> None:
        """Wait until the save in the background is complete.

        Raises:
            CheckpointError: It failed.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> model = accelerator.prepare(nn.Linear(2, 1))
            >>> folder = accelerator.save_state("runs/b", blocking=False)
            >>> accelerator.wait_for_save()
        """
        self._checkpoints.wait()

    def on_preemption(self, save: Callable[[], Any] | None, loader: PreparedDataLoader | None = None) -> None:
        """Save and exit when a signal asks any rank to stop.

        The signals are those of `ProjectConfiguration.save_on_signals`; the exit code is 75. With
        `automatic_checkpoint_naming` this is the default, with `save_state`.
        Collective: every rank must call it.

        Args:
            save: Called on all ranks before the same batch; the run exits after it. None restores what the signals
                did before.
            loader: Stop only before a batch of this loader, and so never within an evaluation; None stops before a
                batch of any prepared loader.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> accelerator.on_preemption(lambda: accelerator.save_state("runs/preempted"))
            >>> accelerator.on_preemption(None)
        """
        self._checkpoints.on_preemption(save, loader)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Tensor]:
        """Gather all weights of a prepared model.

        Collective: every rank must call it.

        Args:
            model: A prepared model.
            unwrap: Accepted: names are those of the script's own module in any case.

        Returns:
            On rank 0 the weights by name, on the CPU; they may share memory with a model that is on the CPU and not
            sharded. On other ranks {}.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> list(accelerator.get_state_dict(accelerator.prepare(nn.Linear(2, 1))))
            ['weight', 'bias']
        """
        return self._weights.gather(model)

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: str | int = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write a model's weights as safetensors, in files that transformers' `from_pretrained` reads.

        Collective: every rank must call it; rank 0 writes, and all wait until the files are complete.

        Args:
            model: A prepared model.
            save_directory: Created if missing; weights saved there before are replaced.
            max_shard_size: The largest file size: bytes, or a string such as `"5GB"`.
            safe_serialization: Must be True: paceline writes no pickle.

        Raises:
            PacelineError: On every rank, when the files could not be written.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> accelerator.save_model(accelerator.prepare(nn.Linear(2, 1)), "runs/model")
        """
        self._weights.save_model(model, save_directory, max_shard_size, safe_serialization)

    def save_adapter(self, model: nn.Module, save_directory: str | os.PathLike[str]) -> None:
        """Write the adapters of a PEFT model, in files that `PeftModel.from_pretrained` reads.

        Collective: every rank must call it; rank 0 writes, and all wait until the files are complete. Frozen base
        weights are not gathered.

        Args:
            model: A prepared `PeftModel`.
            save_directory: Created if missing.

        Raises:
            PacelineError: It is not a `PeftModel`; or, on every rank, the files could not be written.

        Example:
            >>> accelerator = Accelerator(cpu=True)
            >>> accelerator.save_adapter(accelerator.prepare(nn.Linear(2, 1)), "runs/adapter")
            Traceback (most recent call last):
            paceline.errors.PacelineError: save_adapter was called with a Linear...
        """
        self._weights.save_adapter(model, save_directory)

    # Experiment trackers

    @property
    def trackers(self) -> Sequence[Any]:
        """The trackers that are open on this rank."""
        return self._tracker.active

    @property
    def log_with(self) -> Sequence[str | GeneralTracker]:
        """The trackers that `init_trackers` opens."""
        return self._tracker.chosen

    def init_trackers(
        self,
        project_name: str,
        config: Mapping[str, Any] | None = None,
        init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        run_name: str | None = None,
    ) -> None:
        """Open the trackers of `log_with`, on rank 0 unless a tracker wants all ranks.

        Wherever there is a folder for logs, `run.json` describes the run there: its configuration with the origin of
        each value, its environment, and `config`.

        Args:
            project_name: The project, experiment or folder, as each tracker calls it.
            config: Settings of the script to record with the run; mappings may be nested.
            init_kwargs: By tracker name, arguments for the function that opens its run.
            run_name: The run's name in every tracker that has such names.

        Raises:
            ConfigError: `init_kwargs` names something that is not a tracker.
            MissingExtraError: The package of a tracker is not installed.

        Example:
            >>> accelerator = Accelerator(cpu=True, project_dir="runs/tracked")
            >>> accelerator.init_trackers("example", config={"lr": 0.1})
            >>> accelerator.log({"loss": 0.5}, step=1)
            >>> accelerator.end_training()
        """
        self._tracker.start(project_name, config, init_kwargs, run_name)

    def log(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Send numbers, text and small tensors to every open tracker; does nothing on ranks without one.

        A tensor on a device is copied to the host after the work queued there, and written by a later call: this call
        does not wait for the device, and later changes to the tensor have no effect.

        Args:
            values: By name. Tensors of one element become numbers.
            step: The step of the run; None leaves counting to each tracker.
            log_kwargs: By tracker name, arguments for its logging function.

        Raises:
            TrackingError: `log_with` was given and `init_trackers` was not called.
            ConfigError: `log_kwargs` names something that is not a tracker.

        Example:
            >>> accelerator = Accelerator(cpu=True, project_dir="runs/logged")
            >>> accelerator.init_trackers("example")
            >>> accelerator.log({"loss": torch.tensor(0.5)}, step=1)
            >>> accelerator.end_training()
        """
        self._tracker.log(values, step, log_kwargs)

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """Get a tracker by name, to use more of it than `log`.

        Args:
            name: As in `log_with`.
            unwrap: Return its package's own object, such as wandb's run.

        Returns:
            The tracker; on ranks that record nothing, one whose methods do nothing.

        Raises:
            TrackingError: There is no such tracker, or `init_trackers` was not called.

        Example:
            >>> accelerator = Accelerator(cpu=True, project_dir="runs/one")
            >>> accelerator.init_trackers("example")
            >>> accelerator.get_tracker("jsonl").name
            'jsonl'
            >>> accelerator.end_training()
        """
        return self._tracker.get(name, unwrap=unwrap)

    def end_training(self) -> None:
        """Write what was logged, and close the trackers.

        If a script forgets to call it, or ends with an error, they are closed when the process ends. The process group
        stays open, since other Accelerators may use it, until the process ends.

        Example:
            >>> Accelerator(cpu=True).end_training()
        """
        self._tracker.finish()
