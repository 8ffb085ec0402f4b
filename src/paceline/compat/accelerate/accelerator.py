"""`Accelerator` with Accelerate's arguments, methods and meanings, over paceline's own."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from paceline.accelerator import accelerator as core
from paceline.accelerator.policies import use_policies
from paceline.accelerator.profiling import write_trace
from paceline.compat.accelerate.bridge import sections
from paceline.compat.accelerate.bridge.deepspeed_values import fill_configuration
from paceline.compat.accelerate.bridge.rules import LoaderRules, PreparedKinds, rules_of
from paceline.compat.accelerate.parallelism_config import ParallelismConfig
from paceline.compat.accelerate.settings.deepspeed import DeepSpeedPlugin
from paceline.compat.accelerate.settings.enums import DistributedType, FP8BackendType
from paceline.compat.accelerate.settings.errors import (
    InvalidValueError,
    NotInitializedError,
    UnsupportedError,
    WrongTypeError,
    value_errors,
)
from paceline.compat.accelerate.settings.fsdp import FullyShardedDataParallelPlugin
from paceline.compat.accelerate.settings.handlers import (
    AORecipeKwargs,
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
)
from paceline.compat.accelerate.settings.plugins import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    TorchDynamoPlugin,
)
from paceline.compat.accelerate.settings.variables import parse_choice_from_env, parse_flag_from_env
from paceline.compat.accelerate.state import AcceleratorState, GradientState, PartialState
from paceline.compat.accelerate.utils.imports import is_bitsandbytes_multi_backend_available, is_xpu_available
from paceline.strategies.placeholders import DummyScheduler

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from paceline.compat.accelerate.optimizer import AcceleratedOptimizer
    from paceline.compat.accelerate.scheduler import AcceleratedScheduler

__all__ = ["Accelerator"]

F = TypeVar("F", bound=Callable[..., Any])
_LOG = logging.getLogger(__name__.removeprefix("paceline.compat."))  # programs filter "accelerate"
# Stands for an argument that was not passed.
_NOT_GIVEN = object()


# Programs replace these two by name in this module.


def fsdp2_prepare_model(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """See `accelerate.utils.fsdp_utils`. Collective: every rank must call it."""
    from paceline.compat.accelerate.utils import fsdp_utils

    return fsdp_utils.fsdp2_prepare_model(accelerator, model)


def fsdp2_canonicalize_names(named_params: dict[str, Any]) -> dict[str, Any]:
    """See `accelerate.utils.fsdp_utils`."""
    from paceline.compat.accelerate.utils import fsdp_utils

    return fsdp_utils.fsdp2_canonicalize_names(named_params)


def _trained(optimizers: Sequence[Optimizer]) -> set[int]:
    """The `id` of each parameter that an optimizer has."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {id(parameter) for group in groups for parameter in group["params"]}


class Accelerator:
    """Runs a training program on whatever it was launched on, with Accelerate's arguments and meanings.

    Every rank makes one and calls the same methods in the same order. The states that it shares with every other one
    (`AcceleratorState`, `GradientState`) describe the run; paceline does the work.

    Args:
        device_placement: Move models and batches to the device.
        split_batches: Accepted: `dataloader_config` says it.
        mixed_precision: "no", "fp16" or "bf16"; None takes the launcher's.
        gradient_accumulation_steps: Micro-batches to an optimizer step; the launcher's number goes before it.
        cpu: Run on the CPU even if there is an accelerator.
        dataloader_config: How prepared loaders are divided among ranks.
        deepspeed_plugin: DeepSpeed's settings; or several by name, of which the first is active.
        fsdp_plugin: FSDP's settings.
        torch_tp_plugin: The size of tensor parallelism.
        megatron_lm_plugin: Not supported.
        rng_types: Generators that get rank 0's state at the start of each pass over a loader.
        log_with: Trackers, by name or as objects.
        project_dir: Where the run keeps its files.
        project_config: More settings than `project_dir`.
        gradient_accumulation_plugin: More settings than `gradient_accumulation_steps`.
        step_scheduler_with_optimizer: Whether prepared schedulers step with their optimizers; else on every call.
        kwargs_handlers: Keyword arguments of torch's classes, at most one of each kind.
        dynamo_backend: Short for `TorchDynamoPlugin(backend=...)`.
        dynamo_plugin: Settings of torch.compile.
        deepspeed_plugins: As `deepspeed_plugin`.
        parallelism_config: The sizes of the mesh.

    Attributes:
        state: The run, shared.
        gradient_state: The accumulation of gradients, shared.
        scaler: The loss scaler of fp16; None elsewhere.
        step: Micro-batches that `accumulate` has begun since the last loader ended.
        project_configuration: Where the run keeps its files.
        trackers: The trackers that are open.
        log_with: The trackers that `init_trackers` opens.

    Raises:
        ValueError: Arguments contradict each other, or the first Accelerator of the program.
        TypeError: An argument is of a wrong type.
    """

    def __init__(
        self,
        device_placement: bool = True,
        split_batches: bool | object = _NOT_GIVEN,
        mixed_precision: Any = None,
        gradient_accumulation_steps: int = 1,
        cpu: bool = False,
        dataloader_config: DataLoaderConfiguration | None = None,
        deepspeed_plugin: DeepSpeedPlugin | dict[str, DeepSpeedPlugin] | None = None,
        fsdp_plugin: FullyShardedDataParallelPlugin | None = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        rng_types: list[Any] | None = None,
        log_with: Any = None,
        project_dir: str | os.PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: list[Any] | None = None,
        dynamo_backend: Any = None,
        dynamo_plugin: TorchDynamoPlugin | None = None,
        deepspeed_plugins: DeepSpeedPlugin | dict[str, DeepSpeedPlugin] | None = None,
        parallelism_config: ParallelismConfig | None = None,
    ) -> None:
        self._arguments = {name: value for name, value in locals().items() if name != "self"}
        _refuse_megatron(megatron_lm_plugin)
        self.project_configuration = project_config or ProjectConfiguration(project_dir=project_dir)
        if project_dir is not None and self.project_dir is None:
            self.project_configuration.set_directories(project_dir)
        handlers = sections.by_kind(kwargs_handlers)
        self._keep_handlers(handlers)
        deepspeed, fsdp = _sharding(_one_of(deepspeed_plugin, deepspeed_plugins), fsdp_plugin)
        compile_plugin = _compile_plugin(dynamo_plugin, dynamo_backend)
        sizes = _sizes(parallelism_config, torch_tp_plugin)
        self.state = self._make_state(mixed_precision, cpu, compile_plugin, deepspeed, fsdp, sizes)
        self.fp8_enabled = self.state.mixed_precision == "fp8"
        self.ao_recipe_handler = _fp8_recipe(handlers.get(AORecipeKwargs), self.fp8_enabled)
        self._join_mesh(sizes)

        self.device_placement = device_placement
        config = dataloader_config or DataLoaderConfiguration()
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        rng_types = ["generator"] if rng_types is None else rng_types
        # It does not refer to the Accelerator, which is freed with the last reference of the program then.
        self._loaders = LoaderRules(config, rng_types, _shared_mesh)
        plugin = _accumulation(gradient_accumulation_plugin, gradient_accumulation_steps)
        self.gradient_state = GradientState(plugin)
        self._known_plugin: Any = None
        self._kinds = PreparedKinds(self._loaders)
        with use_policies(rules_of(self._loaders, self._kinds)), value_errors():
            self._core = self._make_core(plugin, compile_plugin, handlers)
        if gradient_accumulation_plugin is not None and self.is_main_process:
            _warn_of_other_accumulation(gradient_accumulation_plugin)
        self.gradient_state.plugin_kwargs.setdefault("num_steps", self._core.gradient_accumulation_steps)
        self.scaler: Any = self._core.scaler
        self.native_amp = self.mixed_precision != "no"
        self.flag_tensor: Tensor | None = None
        self.step = 0
        self.log_with = _chosen_trackers(log_with, self.logging_dir)
        self.trackers: list[Any] = []
        # Removable handles refer to them weakly, which a plain dict does not allow.
        self._save_model_state_pre_hook: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._load_model_state_pre_hook: OrderedDict[int, Callable[..., Any]] = OrderedDict()

    # The run

    def _keep_handlers(self, handlers: dict[type, Any]) -> None:
        """Show the handlers, and that features of others are off."""
        self.ddp_handler = handlers.get(DistributedDataParallelKwargs)
        self.scaler_handler = handlers.get(GradScalerKwargs)
        self.init_handler = handlers.get(InitProcessGroupKwargs)
        self.autocast_handler = handlers.get(AutocastKwargs)
        self.profile_handler = handlers.get(ProfileKwargs)
        self.fp8_recipe_handler = self.te_recipe_handler = self.msamp_recipe_handler = None
        self.has_lomo_optimizer = False
        self.delayed_fp8_autocast = False

    def _make_state(
        self, precision: Any, cpu: bool, dynamo: Any, deepspeed: Any, fsdp: Any, sizes: ParallelismConfig | None
    ) -> AcceleratorState:
        mode = None if precision is None else str(precision)
        if mode not in (None, "no", "fp8", "fp16", "bf16"):
            raise InvalidValueError(
                f"mixed_precision is {mode!r}", "There is no such precision", "Use one of no, fp16, bf16"
            )
        if mode is None and not AcceleratorState._shared_state and "ACCELERATE_MIXED_PRECISION" not in os.environ:
            mode = _launched_precision()
        group = {} if self.init_handler is None else self.init_handler.to_kwargs()
        return AcceleratorState(
            mixed_precision=mode,
            cpu=cpu,
            dynamo_plugin=dynamo,
            deepspeed_plugin=deepspeed,
            fsdp_plugin=fsdp,
            parallelism_config=sizes,
            _from_accelerator=True,
            **group,
        )

    def _join_mesh(self, sizes: ParallelismConfig | None) -> None:
        if sizes is None:
            return
        self.state.parallelism_config = sizes
        sizes._validate_accelerator(self)
        self.state.device_mesh = sizes.get_device_mesh(self.device.type)

    def _make_core(
        self, plugin: GradientAccumulationPlugin | None, dynamo: Any, handlers: dict[type, Any]
    ) -> core.Accelerator:
        arguments: dict[str, Any] = {
            "device_placement": self.device_placement,
            # torchao's layers compute in fp8; all else is in bf16.
            "mixed_precision": "bf16" if self.fp8_enabled else self.state.mixed_precision,
            "cpu": True if self.device.type == "cpu" else None,
            "strategy": self._strategy_name,
            "gradient_accumulation_plugin": sections.accumulation_section(plugin),
            "kwargs_handlers": list(sections.core_handlers(handlers, self._strategy_name)),
            "dynamo_plugin": sections.dynamo_section(dynamo),
            "step_scheduler_with_optimizer": self.step_scheduler_with_optimizer,
        }
        sections.check_sequences(self.parallelism_config, self._strategy_name)
        if self._strategy_name == "fsdp":
            arguments["fsdp_plugin"] = self._known_plugin = sections.fsdp_section(self.state.fsdp_plugin)
            arguments["parallelism_config"] = sections.mesh_section(self.parallelism_config)
        elif self._strategy_name == "deepspeed" and self.deepspeed_plugin is not None:
            section = sections.deepspeed_section(self.deepspeed_plugin)
            arguments["deepspeed_plugin"] = self._known_plugin = section
        return core.Accelerator(**arguments)

    @property
    def _strategy_name(self) -> str:
        named = {DistributedType.DEEPSPEED: "deepspeed", DistributedType.FSDP: "fsdp"}.get(self.distributed_type)
        if named is not None:
            return named
        return "ddp" if self.num_processes > 1 else "single"

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.state.device

    @property
    def distributed_type(self) -> DistributedType:
        """How the run is distributed."""
        return self.state.distributed_type

    @property
    def num_processes(self) -> int:
        """The number of ranks."""
        return self.state.num_processes

    @property
    def process_index(self) -> int:
        """This rank."""
        return self.state.process_index

    @property
    def local_process_index(self) -> int:
        """This rank's number on its machine."""
        return self.state.local_process_index

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self.state.is_main_process

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first rank of its machine."""
        return self.state.is_local_main_process

    @property
    def is_last_process(self) -> bool:
        """Whether this is the highest rank."""
        return self.state.is_last_process

    @property
    def use_distributed(self) -> bool:
        """Whether there are several ranks."""
        return self.state.use_distributed

    @property
    def multi_device(self) -> bool:
        """Whether whole replicas train on several accelerators."""
        return self.use_distributed and self.distributed_type.name.startswith("MULTI_") and self.device.type != "cpu"

    @property
    def mixed_precision(self) -> str:
        """The precision: "no", "bf16" or "fp16"."""
        return self.state.mixed_precision

    @property
    def fp8_backend(self) -> FP8BackendType:
        """The library that computes in 8-bit floats: torchao, or none."""
        return FP8BackendType.NO if self.ao_recipe_handler is None else FP8BackendType.AO

    @property
    def has_fp8_handler(self) -> bool:
        """Whether there is a recipe for 8-bit floats."""
        return self.ao_recipe_handler is not None

    @property
    def is_fsdp2(self) -> bool:
        """Whether FSDP shards, in its version 2."""
        return self.state.is_fsdp2

    @property
    def is_composable_parallelism_enabled(self) -> bool:
        """Whether FSDP can be combined with other axes of the mesh."""
        return self.is_fsdp2

    @property
    def deepspeed_plugin(self) -> DeepSpeedPlugin | None:
        """The active plugin of DeepSpeed."""
        return self.state.deepspeed_plugin

    @property
    def parallelism_config(self) -> ParallelismConfig | None:
        """The sizes of the mesh."""
        sizes: ParallelismConfig | None = self.state.parallelism_config
        return sizes

    @property
    def torch_device_mesh(self) -> DeviceMesh | None:
        """The mesh of `parallelism_config`."""
        mesh: DeviceMesh | None = self.state.device_mesh
        return mesh

    @property
    def should_save_model(self) -> bool:
        """Whether this rank takes part in saving a model."""
        return self.parallelism_config is not None or self.is_local_main_process

    def _rank_on(self, axis: str) -> int:
        sizes = self.parallelism_config
        if sizes is None:
            raise NotInitializedError(
                f"The rank on the axis {axis} is requested", "There is no mesh", "Pass a parallelism_config"
            )
        if getattr(sizes, f"{axis}_size") == 1 or self.torch_device_mesh is None:
            return 0
        return int(self.torch_device_mesh.get_local_rank(axis))

    @property
    def tensor_parallel_rank(self) -> int:
        """This rank's place among those that share each layer."""
        return self._rank_on("tp")

    @property
    def data_parallel_rank(self) -> int:
        """This rank's place among the replicas."""
        return self._rank_on("dp_replicate")

    @property
    def data_parallel_shard_rank(self) -> int:
        """This rank's place among the shards of a replica."""
        return self._rank_on("dp_shard")

    @property
    def pipeline_parallel_rank(self) -> int:
        """Not supported."""
        raise UnsupportedError("pipeline_parallel_rank is requested", "There is no such axis", "Leave it out")

    @property
    def context_parallel_rank(self) -> int:
        """Not supported."""
        raise UnsupportedError("context_parallel_rank is requested", "There is no such axis", "Leave it out")

    # Settings

    @property
    def dataloader_config(self) -> DataLoaderConfiguration:
        """How loaders that are prepared from now on are divided among ranks."""
        return self._loaders.config

    @dataloader_config.setter
    def dataloader_config(self, value: DataLoaderConfiguration) -> None:
        self._loaders.config = value

    @property
    def rng_types(self) -> Sequence[Any] | None:
        """Generators that get rank 0's state at the start of each pass over loaders prepared from now on."""
        return self._loaders.rng_types

    @rng_types.setter
    def rng_types(self, value: Sequence[Any] | None) -> None:
        self._loaders.rng_types = value

    @property
    def split_batches(self) -> bool:
        """Whether a loader's batch size is that of all ranks together."""
        return self.dataloader_config.split_batches

    @property
    def dispatch_batches(self) -> bool | None:
        """Whether rank 0 reads for all ranks."""
        return self.dataloader_config.dispatch_batches

    @property
    def even_batches(self) -> bool:
        """Whether all ranks get the same number of batches."""
        return self.dataloader_config.even_batches

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self.dataloader_config.even_batches = value

    @property
    def use_seedable_sampler(self) -> bool:
        """Whether a random order depends only on the seed and the epoch."""
        return self.dataloader_config.use_seedable_sampler

    @property
    def non_blocking(self) -> bool:
        """Whether copies to the device overlap with the computation."""
        return self.dataloader_config.non_blocking

    @property
    def use_stateful_dataloader(self) -> bool:
        """Whether prepared loaders are torchdata's, which have a state."""
        return self.dataloader_config.use_stateful_dataloader

    @property
    def project_dir(self) -> Any:
        """Where the run keeps its files."""
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> Any:
        """Where the run keeps its logs."""
        return self.project_configuration.logging_dir

    @property
    def save_iteration(self) -> int:
        """The number of the next checkpoint."""
        return self.project_configuration.iteration

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches to an optimizer step."""
        return self.gradient_state.num_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, value: int) -> None:
        self.gradient_state.plugin_kwargs["num_steps"] = value
        self._core.gradient_accumulation_steps = value

    @property
    def sync_gradients(self) -> bool:
        """Whether the current micro-batch is the last of its window."""
        return self.gradient_state.sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        self.gradient_state.sync_gradients = value

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last step of any prepared optimizer was skipped for an overflow."""
        return self._core.optimizer_step_was_skipped

    # What was prepared

    @property
    def _models(self) -> list[Any]:
        return self._core.prepared.models

    @property
    def _optimizers(self) -> list[Any]:
        return self._core.prepared.optimizers

    @property
    def _schedulers(self) -> list[Any]:
        return self._core.prepared.schedulers

    @property
    def _dataloaders(self) -> list[Any]:
        return self._core.prepared.foreign_loaders

    @property
    def _custom_objects(self) -> list[Any]:
        return self._core.prepared.registered

    @property
    def deepspeed_config(self) -> dict[str, Any] | None:
        """DeepSpeed's configuration, complete once a model is prepared; None elsewhere."""
        return None if self.deepspeed_plugin is None else self.deepspeed_plugin.deepspeed_config

    @property
    def deepspeed_engine_wrapped(self) -> Any:
        """The engine of the model that is trained under DeepSpeed; None before it is prepared."""
        from paceline.compat.accelerate.utils.deepspeed import DeepSpeedEngineWrapper

        if self.distributed_type != DistributedType.DEEPSPEED or not self._models:
            return None
        return DeepSpeedEngineWrapper(self._models[0])

    # Preparation

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Make models, optimizers, loaders and schedulers fit the run; anything else comes back as it is.

        Collective: every rank must call it.

        Args:
            args: In any order.
            device_placement: For each argument, whether it is moved to the device.

        Returns:
            The prepared objects in the same order; a single one by itself.
        """
        self._check_placement(args, device_placement)
        models = [thing for thing in args if isinstance(thing, nn.Module)]
        self._make_ready(args, models)
        self._check_engine([thing for thing in args if isinstance(thing, Optimizer)], models)
        if self._is_evaluation(args, models):
            return self._prepared_for_evaluation(args)
        self._kinds.is_engines_schedule = any(isinstance(thing, DummyScheduler) for thing in args)
        with value_errors():
            result = self._core.prepare(*args, device_placement=device_placement or [None for _ in args])
        prepared = (result,) if len(args) == 1 else result
        for given, made in zip(args, prepared, strict=True):
            self._finish(given, made)
        prepared = self._in_parts(prepared, models)
        return prepared[0] if len(args) == 1 else prepared

    def _in_parts(self, prepared: tuple[Any, ...], models: Sequence[nn.Module]) -> tuple[Any, ...]:
        """What was prepared with a model, with loaders of parts of sequences where ranks share them."""
        return tuple(map(self._divided, prepared)) if models and self._sequence_ranks > 1 else prepared

    def _make_ready(self, args: Sequence[Any], models: Sequence[nn.Module]) -> None:
        for model in models:
            _check_quantized(model)
        self._check_device_map(models)
        self._convert_fp8(models)
        self._fill_deepspeed(args, models)
        self._push_plugin(models)
        self._share_sequences(args, models)

    @property
    def _sequence_ranks(self) -> int:
        """How many ranks share each sequence."""
        return 1 if self.parallelism_config is None else self.parallelism_config.sp_size

    def _divided(self, thing: Any) -> Any:
        from paceline.compat.accelerate.bridge.sequences import divide

        return divide(thing, self.device) if isinstance(thing, DataLoader) else thing

    def _share_sequences(self, args: Sequence[Any], models: Sequence[nn.Module]) -> None:
        """Divide attention over the ranks of a sequence, before the engine of the model that is trained is built."""
        sizes, plugin = self.parallelism_config, self.deepspeed_plugin
        fresh = set(map(id, models)).difference(map(id, self._models))
        if plugin is None or not fresh or self._is_evaluation(args, models):
            return
        from paceline.compat.accelerate.bridge import sequences

        if sizes is None or sizes.sp_size == 1:
            # Of an Accelerator before this one.
            sequences.restore_attention()
            return
        size = plugin.get_value("train_micro_batch_size_per_gpu", 1)
        strategy: Any = self._core.strategy
        strategy.join_process_group()
        groups = sequences.share_attention(models[0], sizes, ranks=self.num_processes, micro_batch=int(size))
        strategy.share_sequences(groups, sizes.sp_size)

    def _check_placement(self, args: Sequence[Any], device_placement: list[bool] | None) -> None:
        if device_placement is None:
            return
        if self.distributed_type == DistributedType.DEEPSPEED:
            raise InvalidValueError(
                "prepare(device_placement=…) was called under DeepSpeed",
                "The engine places what it shards",
                "Leave it out",
            )
        if len(device_placement) != len(args):
            raise InvalidValueError(
                f"device_placement has {len(device_placement)} entries for {len(args)} objects",
                "Each belongs to one object",
                "Pass as many",
            )

    def _convert_fp8(self, models: Sequence[nn.Module]) -> None:
        """Let linear layers of models that are not prepared yet compute in 8-bit floats."""
        recipe = self.ao_recipe_handler
        if recipe is None:
            return
        from paceline.compat.accelerate.utils.ao import convert_model_to_fp8_ao, has_ao_layers

        for model in models:
            if not has_ao_layers(model):
                convert_model_to_fp8_ao(model, config=recipe.config, module_filter_func=recipe.module_filter_func)

    def _fill_deepspeed(self, args: Sequence[Any], models: Sequence[nn.Module]) -> None:
        """Fill each `auto` of DeepSpeed's configuration, before the first model is prepared."""
        plugin = self.deepspeed_plugin
        has_optimizer = any(isinstance(thing, Optimizer) for thing in args)
        if plugin is None or not models or self._models or not has_optimizer:
            return
        fill_configuration(
            plugin,
            args,
            accumulation=self.gradient_accumulation_steps,
            ranks=self.num_processes,
            split_batches=self.split_batches,
            sequence_ranks=self._sequence_ranks,
        )
        described = int(plugin.get_value("gradient_accumulation_steps", 1))
        if described != self.gradient_accumulation_steps:
            _LOG.warning(
                "DeepSpeed's configuration says %s micro-batches to a step, the Accelerator %s: DeepSpeed's holds.",
                described,
                self.gradient_accumulation_steps,
            )
            self.gradient_accumulation_steps = described

    def _check_engine(self, optimizers: Sequence[Any], models: Sequence[nn.Module]) -> None:
        """Refuse an optimizer for an engine of DeepSpeed that is not there."""
        if self.distributed_type != DistributedType.DEEPSPEED or not optimizers or models or self._models:
            return
        raise InvalidValueError(
            f"{type(optimizers[0]).__name__} was prepared without its model under DeepSpeed",
            "An engine is built from both, and free_memory() destroys it: what is left of it cannot be trained",
            "Pass the model itself and its optimizer to one prepare(). Before a second train() of one Trainer set "
            "trainer.model_wrapped = trainer.model and trainer.optimizer = None",
        )

    def _is_evaluation(self, args: Sequence[Any], models: Sequence[nn.Module]) -> bool:
        """Whether an engine of DeepSpeed is asked for without an optimizer, as for a teacher beside a student."""
        if self.distributed_type != DistributedType.DEEPSPEED or any(isinstance(thing, Optimizer) for thing in args):
            return False
        known = set(map(id, self._models))
        fresh = [model for model in models if id(model) not in known]
        return bool(fresh) and _trained(self._optimizers).isdisjoint(
            id(p) for model in fresh for p in model.parameters()
        )

    def _prepared_for_evaluation(self, args: Sequence[Any]) -> Any:
        result = [
            self.prepare_model(thing, evaluation_mode=True) if isinstance(thing, nn.Module) else self.prepare(thing)
            for thing in args
        ]
        return result[0] if len(result) == 1 else tuple(result)

    def _finish(self, given: Any, made: Any) -> None:
        """What a program finds on a prepared object."""
        if made is None or isinstance(made, (str, bytes, int, float, dict, list, tuple)):
            return
        if isinstance(made, nn.Module):
            self._return_fp32(made)
        if isinstance(made, (nn.Module, Optimizer, DataLoader)) or made is not given:
            with contextlib.suppress(AttributeError):
                made._is_accelerate_prepared = True

    def _return_fp32(self, model: nn.Module) -> None:
        """Let a model that computes in 16 bits return fp32, for losses that the program computes."""
        is_engines = self.distributed_type == DistributedType.DEEPSPEED
        if self.mixed_precision == "no" or is_engines:
            return
        from paceline.compat.accelerate.utils.operations import convert_to_fp32

        inner = self._core.unwrap_model(model)
        if not any(hook is _to_fp32 for hook in inner._forward_hooks.values()):
            _to_fp32.convert = convert_to_fp32
            inner.register_forward_hook(_to_fp32)

    def _check_device_map(self, models: Sequence[nn.Module]) -> None:
        if self.distributed_type == DistributedType.NO:
            return
        for model in models:
            if self.verify_device_map(model):
                raise InvalidValueError(
                    f"{type(model).__name__} is spread over several devices by a device_map",
                    "Each rank trains on one device",
                    "Load it without device_map, or start one process",
                )

    def _push_plugin(self, models: Sequence[nn.Module]) -> None:
        """Hand what a program changed in its plugin to the core, before the first model is prepared."""
        if self._known_plugin is None or self._models or not models:
            return
        plugin: Any
        if self._strategy_name == "fsdp":
            plugin = sections.fsdp_section(self.state.fsdp_plugin, models[0])
        else:
            assert self.deepspeed_plugin is not None
            plugin = sections.deepspeed_section(self.deepspeed_plugin)
        if plugin != self._known_plugin:
            self._known_plugin = plugin
            self._core.replace_plugin(plugin)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Prepare one model. Collective: every rank must call it.

        Args:
            model: To be trained, or only evaluated.
            device_placement: Whether it is moved to the device.
            evaluation_mode: Only place it, and exchange no gradients for it.
        """
        _check_quantized(model)
        self._check_device_map([model])
        self._convert_fp8([model])
        self._push_plugin([model])
        prepared = self._core.prepare_model(model, device_placement, evaluation_mode)
        self._finish(model, prepared)
        return prepared

    def _prepare_fsdp2(self, *args: Any) -> tuple[Any, ...]:
        """Shard a model and let its optimizer update the shards, for programs that take this step by itself."""
        from paceline.compat.accelerate.utils.fsdp_utils import rebind

        before = fsdp2_canonicalize_names(self._get_named_parameters(*args))
        result = tuple(fsdp2_prepare_model(self, x) if isinstance(x, nn.Module) else x for x in args)
        after = fsdp2_canonicalize_names(self._get_named_parameters(*result))
        for model in (thing for thing in result if isinstance(thing, nn.Module)):
            for optimizer in (thing for thing in result if isinstance(thing, Optimizer)):
                rebind(optimizer, before, after, model)
        return result

    def _get_named_parameters(self, *args: Any, drop_refs: bool = False) -> dict[str, Any]:
        """The parameters of models by their names in the program's own modules, or with `drop_refs` their addresses."""
        models = [self.unwrap_model(thing) for thing in args if isinstance(thing, nn.Module)]
        named = {name: parameter for model in models for name, parameter in model.named_parameters()}
        named = fsdp2_canonicalize_names(named)
        return {name: value.data_ptr() for name, value in named.items()} if drop_refs else named

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> AcceleratedOptimizer:
        """Prepare one optimizer.

        Args:
            optimizer: Of torch, or derived from it.
            device_placement: Accepted: its state follows the parameters.
        """
        self._check_engine([optimizer], [])
        prepared: Any = self._core.prepare_optimizer(optimizer)
        self._finish(optimizer, prepared)
        return prepared  # type: ignore[no-any-return]

    def prepare_scheduler(self, scheduler: Any) -> AcceleratedScheduler:
        """Prepare one learning-rate scheduler, after its optimizer."""
        prepared: Any = self._core.prepare_scheduler(scheduler)
        self._finish(scheduler, prepared)
        return prepared  # type: ignore[no-any-return]

    def prepare_data_loader(
        self,
        data_loader: DataLoader[Any],
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Callable[..., Any] | None = None,
    ) -> Any:
        """Prepare one loader.

        Args:
            data_loader: Of torch.
            device_placement: Whether batches are moved to the device.
            slice_fn_for_dispatch: Takes a rank's part of a batch that rank 0 sent.
        """
        self._loaders.slice_fn = slice_fn_for_dispatch
        try:
            prepared = self._core.prepare_data_loader(data_loader, device_placement)
        finally:
            self._loaders.slice_fn = None
        self._finish(data_loader, prepared)
        return prepared

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """Make a loader like another one that leaves out the first batches."""
        from paceline.compat.accelerate.data_loader import skip_first_batches

        return skip_first_batches(dataloader, num_batches=num_batches)

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> nn.Module:
        """Get the program's own module from a prepared one.

        Args:
            model: Prepared or not.
            keep_fp32_wrapper: False lets the forward return the precision that it computes in.
            keep_torch_compile: False also removes the wrapper of `torch.compile(model)`.
        """
        from paceline.compat.accelerate.utils.other import extract_model_from_parallel

        inner = self._core.unwrap_model(model, keep_torch_compile=keep_torch_compile)
        # Wrappers of the program, of another Accelerator, or of one whose memory was freed.
        inner = cast("nn.Module", extract_model_from_parallel(inner, keep_fp32_wrapper, keep_torch_compile))
        if not keep_fp32_wrapper:
            for key, hook in list(inner._forward_hooks.items()):
                if hook is _to_fp32:
                    del inner._forward_hooks[key]
        return inner

    def verify_device_map(self, model: nn.Module) -> bool:
        """Whether a device_map spreads the model over several devices."""
        return any(len(getattr(module, "hf_device_map", ())) > 1 for module in model.modules())

    def free_memory(self, *objects: Any) -> list[Any]:
        """Forget everything prepared, and free the device's memory.

        Args:
            objects: What the program prepared.

        Returns:
            A None for each object, for the variables that hold them.
        """
        count = len(objects)
        del objects
        self._core.free_memory()
        self.step = 0
        return [None] * count

    def clear(self, *objects: Any) -> list[Any]:
        """See `free_memory`."""
        return self.free_memory(*objects)

    # One step

    @contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """Run forward, backward and step of one micro-batch inside.

        Args:
            models: Whose gradients are not exchanged before the window ends.
        """
        self.step += 1
        with self._core.accumulate(*models):
            if self.gradient_state.sync_with_dataloader and self.gradient_state.end_of_dataloader:
                self.step = 0
            yield

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Exchange no gradients inside. An engine of DeepSpeed is told by `sync_gradients` alone."""
        if not self.use_distributed or self.distributed_type == DistributedType.DEEPSPEED:
            return nullcontext()
        return self._core.no_sync(model)

    def trigger_sync_in_backward(self, model: nn.Module) -> AbstractContextManager[None]:
        """Exchange gradients in the backward inside, though its forwards ran under `no_sync`."""
        return self._core.trigger_sync_in_backward(model)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Compute gradients, divided by the number of micro-batches of a window.

        Args:
            loss: One value.
            kwargs: Passed on to `Tensor.backward`; under DeepSpeed `scale_wrt_gas=False` leaves the loss undivided.

        Raises:
            UnsupportedError: The optimizer is to step in the backward.
        """
        if "learning_rate" in kwargs:
            raise self._no_lomo()
        is_divided = kwargs.pop("scale_wrt_gas", True)
        if self.distributed_type == DistributedType.DEEPSPEED and not is_divided:
            # The program has divided it.
            loss = loss * self.gradient_accumulation_steps
        self._core.backward(loss, **kwargs)

    def lomo_backward(self, loss: Tensor, learning_rate: float) -> None:
        """Not supported."""
        raise self._no_lomo()

    @staticmethod
    def _no_lomo() -> UnsupportedError:
        return UnsupportedError(
            "An optimizer is to step in the backward (LOMO)", "paceline does not drive it", "Use another optimizer"
        )

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """Scale gradients so that their norm over all ranks is at most `max_norm`.

        Under DeepSpeed a norm in its configuration goes before `max_norm`. Collective under sharding.

        Args:
            parameters: Of prepared models.
            max_norm: "inf" only measures.
            norm_type: 2, another power, or inf.

        Returns:
            The norm before; under DeepSpeed a float, infinite if gradients have overflowed.
        """
        configured = self._configured_norm()
        if configured is not None and float(max_norm) != float("inf"):
            max_norm = configured
        norm = self._core.clip_grad_norm_(parameters, max_norm, norm_type)
        if self.distributed_type != DistributedType.DEEPSPEED or norm is None:
            return norm
        # Programs compare the engine's norm with numbers; that of gradients that have overflowed is no number.
        return float("inf") if norm.isnan() else float(norm)

    def _configured_norm(self) -> float | None:
        if self.distributed_type != DistributedType.DEEPSPEED or self.deepspeed_plugin is None:
            return None
        value = self.deepspeed_plugin.deepspeed_config.get("gradient_clipping")
        return float(value) if isinstance(value, (int, float)) and value > 0 else None

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clamp every element of every gradient to [-clip_value, clip_value]."""
        self._core.clip_grad_value_(parameters, clip_value)

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Divide fp16 gradients by the loss scale; a second time, or in another precision, it does nothing."""
        self._core.unscale_gradients(optimizer)

    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """Open an autocast region."""
        handler = None if autocast_handler is None else sections.autocast_section(autocast_handler)
        return self._core.autocast(handler)

    @contextmanager
    def maybe_context_parallel(
        self, buffers: Any = None, buffer_seq_dims: Any = None, no_restore_buffers: Any = None
    ) -> Iterator[None]:
        """Do nothing: sequences are not divided over ranks."""
        yield

    @contextmanager
    def join_uneven_inputs(self, joinables: list[Any], even_batches: bool | None = None) -> Iterator[None]:
        """Let ranks that run out of batches take part in the exchanges of the others.

        Args:
            joinables: The models that are trained inside.
            even_batches: Overrides the setting of map-style loaders inside.
        """
        if not self.distributed_type.name.startswith("MULTI_"):
            if self.distributed_type != DistributedType.NO:
                warnings.warn(
                    "join_uneven_inputs has no effect here: it is only supported for multi-GPU training with whole "
                    "replicas (DDP)",
                    stacklevel=3,
                )
            yield
            return
        all_samplers: list[Any] = [getattr(loader, "batch_sampler", None) for loader in self._dataloaders]
        samplers = [each for each in all_samplers if hasattr(each, "even_batches")]
        before = [each.even_batches for each in samplers]
        if even_batches is not None:
            if len(samplers) < len(self._dataloaders):
                warnings.warn("Overriding even_batches is only supported for map-style datasets", stacklevel=3)
            for each in samplers:
                each.even_batches = even_batches
        try:
            with self._core.join_uneven_inputs(joinables):
                yield
        finally:
            for each, value in zip(samplers, before, strict=True):
                each.even_batches = value

    @contextmanager
    def profile(self, profile_handler: ProfileKwargs | None = None) -> Iterator[torch.profiler.profile]:
        """Profile the block; with `output_trace_dir`, write `profile_{rank}.json`. Collective with that folder."""
        handler = profile_handler or self.profile_handler or ProfileKwargs()
        with handler.build() as profiler:
            yield profiler
        if handler.output_trace_dir is None:
            return
        write_trace(profiler, Path(handler.output_trace_dir), self.process_index)
        self.wait_for_everyone()

    def deepspeed_ulysses_dl_adapter(self, dl: Any, model: Any) -> Any:
        """Return a loader with this rank's part of each sequence; the loader itself where no ranks share them.

        Args:
            dl: Prepared apart from its model. Batches have `input_ids`, `position_ids` and `labels`.
            model: Prepared.
        """
        return dl if self._sequence_ranks == 1 else self._divided(dl)

    # Between ranks

    def gather(self, tensor: Any) -> Any:
        """Concatenate tensors of all ranks, nested in any way. Collective: every rank must call it."""
        from paceline.compat.accelerate.utils.operations import gather

        return gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Gather results of all ranks, without those of fillers in the last batch of a loader.

        Everything that is gathered at the end of a loader is cut to the number of samples that are left there, whatever
        its length. Collective: every rank must call it.

        Args:
            input_data: Tensors, nested; or anything else, gathered as objects.
            use_gather_object: Gather tensors as objects too, which lets them differ in shape.
        """
        from paceline.compat.accelerate.utils.operations import gather_object, recursively_apply

        if use_gather_object or not _has_only_tensors(input_data):
            # Row by row, so that rows can be left out below.
            is_batch = isinstance(input_data, torch.Tensor) and input_data.ndim > 0 and self.use_distributed
            data = gather_object(list(input_data) if is_batch else input_data)
            is_list = isinstance(data, list)
        else:
            data = self.gather(input_data)
            is_list = False
        state = self.gradient_state
        if not state.end_of_dataloader:
            return data
        remainder = state.remainder
        if remainder < 0:
            _LOG.info("The number of samples is not known, so that fillers in the last batch stay in what is gathered")
        if remainder <= 0:
            return data
        try:
            return data[:remainder] if is_list else recursively_apply(lambda tensor: tensor[:remainder], data)
        except (TypeError, KeyError, IndexError):
            # It has no first entries.
            return data

    def reduce(self, tensor: Any, reduction: Literal["mean", "sum", "max", "none"] = "sum", scale: float = 1.0) -> Any:
        """Add up tensors of all ranks, or average them. Collective: every rank must call it."""
        from paceline.compat.accelerate.utils.operations import reduce

        return reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Pad tensors to the longest of all ranks. Collective: every rank must call it."""
        from paceline.compat.accelerate.utils.operations import pad_across_processes

        return pad_across_processes(tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)

    def wait_for_everyone(self) -> None:
        """Return when every rank has arrived. Collective: every rank must call it."""
        PartialState().wait_for_everyone()

    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> AbstractContextManager[Any]:
        """Give each rank a part of `inputs`."""
        return PartialState().split_between_processes(inputs, apply_padding=apply_padding)

    def set_trigger(self) -> None:
        """Set a flag that `check_trigger` sees on all ranks."""
        self._core.set_trigger()

    def check_trigger(self) -> bool:
        """Whether any rank has set the flag, which is reset then. Collective: every rank must call it."""
        return self._core.check_trigger()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first rank of each machine."""
        self.state.print(*args, **kwargs)

    def on_main_process(self, function: F | None = None) -> F:
        """Make a function run on rank 0 only."""
        return PartialState().on_main_process(function)

    def on_local_main_process(self, function: F | None = None) -> F:
        """Make a function run on the first rank of each machine only."""
        return PartialState().on_local_main_process(function)

    def on_last_process(self, function: F) -> F:
        """Make a function run on the highest rank only."""
        return PartialState().on_last_process(function)

    def on_process(self, function: F | None = None, process_index: int | None = None) -> F:
        """Make a function run on one rank only."""
        return PartialState().on_process(function, process_index)

    def on_local_process(self, function: F | None = None, local_process_index: int | None = None) -> F:
        """Make a function run on one rank of each machine only."""
        return PartialState().on_local_process(function, local_process_index)

    def main_process_first(self) -> AbstractContextManager[None]:
        """Run the block on rank 0, then on the others. Collective: every rank must enter it."""
        return PartialState().main_process_first()

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """Run the block on the first rank of each machine first. Collective: every rank must enter it."""
        return PartialState().local_main_process_first()

    # Files

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Write an object on rank 0, or on each machine with `save_on_each_node`."""
        from paceline.compat.accelerate.utils.other import save

        save(
            obj,
            f,
            save_on_each_node=self.project_configuration.save_on_each_node,
            safe_serialization=safe_serialization,
        )

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> Any:
        """Get all weights of a model: gathered on rank 0 where they are sharded. Collective: every rank must call it.

        Args:
            model: Prepared.
            unwrap: Whether names are those of the program's own module.
        """
        if self._strategy_name in ("fsdp", "deepspeed"):
            return self._core.get_state_dict(model)
        return (self.unwrap_model(model) if unwrap else model).state_dict()

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write a model's weights, in several files where they are large. Collective: every rank must call it."""
        from paceline.compat.accelerate.checkpointing import save_model

        save_model(self, model, save_directory, max_shard_size, safe_serialization)

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Add objects with `state_dict` and `load_state_dict` to what `save_state` saves."""
        invalid = [
            f"Item at index {index} ({type(each).__name__})"
            for index, each in enumerate(objects)
            if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict"))
        ]
        if invalid:
            raise InvalidValueError(
                f"{', '.join(invalid)} cannot be registered for checkpoints",
                "It lacks state_dict or load_state_dict",
                "Add both methods",
            )
        self._custom_objects.extend(objects)

    def register_save_state_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """Call `hook(models, weights, output_dir)` before `save_state` writes; it may empty the lists."""
        handle = RemovableHandle(self._save_model_state_pre_hook)
        self._save_model_state_pre_hook[handle.id] = hook
        return handle

    def register_load_state_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """Call `hook(models, input_dir)` before `load_state` reads; it may empty the list."""
        handle = RemovableHandle(self._load_model_state_pre_hook)
        self._load_model_state_pre_hook[handle.id] = hook
        return handle

    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        **save_model_func_kwargs: Any,
    ) -> Any:
        """Write everything prepared and registered. Collective: every rank must call it.

        Args:
            output_dir: The folder; with `automatic_checkpoint_naming` it has a number under `project_dir`.
            safe_serialization: Write safetensors; else files of torch.
            save_model_func_kwargs: For what writes models under FSDP and DeepSpeed.

        Returns:
            The folder.
        """
        from paceline.compat.accelerate.checkpointing import save_state

        return save_state(self, output_dir, safe_serialization, save_model_func_kwargs)

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: dict[str, Any] | None = None,
        **load_model_func_kwargs: Any,
    ) -> None:
        """Read what `save_state` wrote. Collective: every rank must call it.

        Args:
            input_dir: The folder; None takes the highest number under `project_dir`.
            load_kwargs: Arguments of `torch.load`.
            load_model_func_kwargs: For what reads models; `map_location` is "cpu" or "on_device".
        """
        from paceline.compat.accelerate.checkpointing import load_state

        load_state(self, input_dir, load_kwargs, load_model_func_kwargs)

    # Trackers

    def init_trackers(
        self,
        project_name: str,
        config: Mapping[str, Any] | None = None,
        init_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Open the trackers of `log_with`, on rank 0.

        Args:
            project_name: The project.
            config: Settings of the program, to be recorded.
            init_kwargs: For each tracker's name, arguments of its constructor.
        """
        from paceline.compat.accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

        for chosen in self.log_with:
            tracker = chosen
            if not isinstance(chosen, GeneralTracker):
                cls: Any = LOGGER_TYPE_TO_CLASS[str(chosen)]
                where = [self.logging_dir] if cls.requires_logging_directory else []
                tracker = cls(project_name, *where, **init_kwargs.get(str(chosen), {}))
            self.trackers.append(tracker)
        for tracker in self._active_trackers():
            tracker.start()
            if config is not None:
                tracker.store_init_configuration(config)

    def _active_trackers(self) -> list[Any]:
        """Those that record on this rank."""
        return [each for each in self.trackers if self.is_main_process or not each.main_process_only]

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """Get a tracker by its name; one whose methods do nothing where none is open.

        Args:
            name: Of the tracker.
            unwrap: Return the object of its package.

        Raises:
            InvalidValueError: Others are open, and not this one.
        """
        from paceline.compat.accelerate.tracking import GeneralTracker

        for tracker in self.trackers:
            if tracker.name == name:
                return tracker.tracker if unwrap else tracker
        if self.trackers:
            known = ", ".join(str(tracker.name) for tracker in self.trackers)
            raise InvalidValueError(f"The tracker {name!r} is requested", f"Open are {known}", "Add it to log_with")
        return GeneralTracker(_blank=True)

    def log(self, values: dict[str, Any], step: int | None = None, log_kwargs: Mapping[str, Any] | None = None) -> None:
        """Hand values to every open tracker.

        Args:
            values: By name.
            step: Of the run.
            log_kwargs: For each tracker's name, arguments of its own function.
        """
        for tracker in self._active_trackers():
            tracker.log(values, step=step, **(log_kwargs or {}).get(tracker.name, {}))

    def end_training(self) -> None:
        """Close the trackers, and the process group."""
        for tracker in self._active_trackers():
            tracker.finish()
        self.state.destroy_process_group()

    def __reduce__(self) -> tuple[Any, ...]:
        schedulers = [each.scheduler for each in self._schedulers]
        prepared = (self._models, self._optimizers, schedulers)
        lists = tuple(list(each) for each in (*prepared, self._dataloaders, self._custom_objects))
        return _unpickled, (type(self), self._arguments, self.step, lists)

    def __deepcopy__(self, memo: Any) -> Any:
        _LOG.info("A copy of an Accelerator is the Accelerator itself")
        return self


def _unpickled(
    accelerator_class: type[Accelerator], arguments: dict[str, Any], step: int, lists: tuple[list[Any], ...]
) -> Accelerator:
    """Make an Accelerator of the same settings in this process, and let it prepare the same again."""
    given = {name: value for name, value in arguments.items() if name != "split_batches"}
    accelerator = accelerator_class(**given)
    models, optimizers, schedulers, loaders, objects = lists
    accelerator.prepare(*models, *optimizers, *schedulers)
    accelerator._dataloaders.extend(loaders)
    accelerator._custom_objects.extend(objects)
    accelerator.step = step
    return accelerator


class _Fp32Outputs:
    """A forward hook that returns floating-point outputs in fp32; one object serves all models."""

    convert: Callable[[Any], Any]

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        return self.convert(output)


_to_fp32 = _Fp32Outputs()


def _check_quantized(model: nn.Module) -> None:
    """Refuse to train a model of bitsandbytes whose layers are not on the device."""
    is_quantized = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    placed: Any = getattr(model, "hf_device_map", None)
    if not is_quantized or not placed:
        return
    places = {str(place) for place in placed.values()}
    can_compute_on_cpu = is_bitsandbytes_multi_backend_available() and not is_xpu_available(False)
    is_offloaded = "disk" in places or ("cpu" in places and not can_compute_on_cpu)
    if is_offloaded:
        raise InvalidValueError(
            f"{type(model).__name__} was loaded in 8 or 4 bits, and its device_map puts layers on {sorted(places)}",
            "Quantized layers are trained on the device only, without CPU or disk offload",
            "Load it with device_map={'': accelerator.device}",
        )


def _fp8_recipe(given: AORecipeKwargs | None, is_enabled: bool) -> AORecipeKwargs | None:
    """How torchao computes in 8-bit floats; None where nothing does."""
    if given is not None and not is_enabled:
        raise InvalidValueError(
            "AORecipeKwargs is passed, and mixed_precision is not fp8",
            "Nothing would compute in 8-bit floats",
            "Pass mixed_precision='fp8', or leave the handler out",
        )
    if given is not None or not is_enabled:
        return given
    backend = parse_choice_from_env("ACCELERATE_FP8_BACKEND", "AO").upper()
    if backend not in ("AO", "AUTO"):
        raise UnsupportedError(
            f"8-bit floats are to be computed by {backend}", "paceline drives torchao", "Use the backend AO"
        )
    return AORecipeKwargs()


def _shared_mesh() -> DeviceMesh | None:
    """The mesh of the run."""
    mesh: DeviceMesh | None = AcceleratorState().device_mesh
    return mesh


def _refuse_megatron(plugin: Any) -> None:
    if plugin is not None or parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise UnsupportedError(
            "Megatron-LM is asked for",
            "paceline does not drive it",
            "Use FullyShardedDataParallelPlugin or DeepSpeedPlugin",
        )


def _one_of(one: Any, other: Any) -> Any:
    if one is not None and other is not None:
        raise InvalidValueError(
            "deepspeed_plugin and deepspeed_plugins are both given", "They mean the same", "Pass one of them"
        )
    plugins = one if one is not None else other
    for each in plugins.values() if isinstance(plugins, dict) else [plugins]:
        if each is not None and not isinstance(each, DeepSpeedPlugin):
            raise WrongTypeError(
                f"deepspeed_plugin is a {type(each).__name__}",
                "DeepSpeed's settings have a class of their own",
                "Pass a DeepSpeedPlugin, or several by name",
            )
    present = _first_state_deepspeed()
    if plugins is not None and present is not None and plugins is not present:
        raise UnsupportedError(
            "A second Accelerator is made with a plugin of DeepSpeed",
            "All Accelerators of a program share the plugins of the first",
            "Pass all of them by name to the first one, and select one with state.select_deepspeed_plugin",
        )
    return plugins


def _sharding(deepspeed: Any, fsdp: Any) -> tuple[Any, Any]:
    """The plugins, also where only the launcher asks for them; what comes later in the program reads the variables."""
    if deepspeed is None and parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        deepspeed = _first_state_deepspeed() or DeepSpeedPlugin()
    if fsdp is not None and not isinstance(fsdp, FullyShardedDataParallelPlugin):
        raise WrongTypeError(
            f"fsdp_plugin is a {type(fsdp).__name__}",
            "FSDP's settings have a class of their own",
            "Pass a FullyShardedDataParallelPlugin",
        )
    if fsdp is None and deepspeed is None and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        fsdp = FullyShardedDataParallelPlugin()
    if deepspeed is not None:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if fsdp is not None:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ["FSDP_VERSION"] = str(fsdp.fsdp_version)
    return deepspeed, fsdp


def _first_state_deepspeed() -> Any:
    """The plugins that the first Accelerator of the program was made with."""
    return AcceleratorState().deepspeed_plugins if AcceleratorState._shared_state else None


def _compile_plugin(plugin: TorchDynamoPlugin | None, backend: Any) -> TorchDynamoPlugin:
    if plugin is not None and backend is not None:
        raise InvalidValueError("dynamo_plugin and dynamo_backend are both given", "They overlap", "Pass one of them")
    return plugin if plugin is not None else TorchDynamoPlugin(backend=backend)


def _sizes(given: ParallelismConfig | None, plugin: Any) -> ParallelismConfig | None:
    if given is not None:
        return given
    if plugin is not None:
        return ParallelismConfig(tp_size=plugin.tp_size)
    is_set = parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG")
    return ParallelismConfig() if is_set else None


def _accumulation(plugin: GradientAccumulationPlugin | None, steps: int) -> GradientAccumulationPlugin | None:
    """The settings of accumulation; None where the launcher's configuration decides."""
    if plugin is not None:
        if steps != 1:
            raise InvalidValueError(
                f"gradient_accumulation_steps is {steps}, beside a gradient_accumulation_plugin",
                "Both say how many micro-batches make a step",
                "Pass one of them",
            )
        return plugin
    launched = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if launched is not None:
        return GradientAccumulationPlugin(num_steps=int(launched))
    return GradientAccumulationPlugin(num_steps=steps) if steps != 1 else None


def _warn_of_other_accumulation(plugin: GradientAccumulationPlugin) -> None:
    """Say that the launcher's number is not used: a plugin goes before it, as it does in Accelerate."""
    from paceline.config import worker_config

    resolved, key = worker_config(os.environ), "gradient_accumulation_steps"
    launched, origin = resolved.config.gradient_accumulation_steps, resolved.origin(key)
    is_used = not origin.is_explicit or launched in (1, plugin.num_steps)
    if not is_used and resolved.config.strategy != "deepspeed":
        _LOG.warning(
            "%s %s (%s) is not used: the script's own number is, since it passes a gradient_accumulation_plugin. The "
            "Trainer of transformers does so, and uses that of its TrainingArguments.",
            key, launched, origin.where,
        )  # fmt: skip


def _launched_precision() -> str | None:
    """The precision in the launcher's configuration, where that says one."""
    # The schema (pydantic) is imported when an Accelerator is made, not with its class.
    from paceline.config import worker_config

    resolved = worker_config(os.environ)
    return resolved.config.mixed_precision if resolved.origin("mixed_precision").is_explicit else None


def _chosen_trackers(log_with: Any, logging_dir: Any) -> list[Any]:
    if log_with is None:
        return []
    from paceline.compat.accelerate.tracking import filter_trackers

    return list(filter_trackers(log_with, logging_dir))


def _has_only_tensors(data: Any) -> bool:
    """Whether every leaf is a tensor."""
    if isinstance(data, Mapping):
        return all(map(_has_only_tensors, data.values()))
    if isinstance(data, (list, tuple)):
        return all(map(_has_only_tensors, data))
    return isinstance(data, torch.Tensor)
