"""DeepSpeed's engine shards optimizer states, gradients and parameters (ZeRO), and can offload them to host memory.

The engine owns backward and step, but a step means the same as under every other strategy: window, true means,
clipping, skipped steps and the scheduler are paceline's. So the engine is configured for windows of one micro-batch
and without clipping, and this class sets where a window ends and clips.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from typing_extensions import override

from paceline.checkpoint.format.shards import OptimizerState, TensorShard
from paceline.config import DeepSpeedPlugin
from paceline.environment.device import describe_device
from paceline.errors import (
    ForeignOptimizerError,
    MissingExtraError,
    PrecisionError,
    PrepareError,
    StateError,
    SteppingError,
    counted,
    named,
)
from paceline.strategies.base import (
    Strategy,
    check_dense_gradients,
    check_needs_no_closure,
    check_trainable,
    refuse_join,
)
from paceline.strategies.compilation import protect_linear
from paceline.strategies.context import DistributedType
from paceline.strategies.deepspeed import state as zero_state
from paceline.strategies.deepspeed.backward_check import (
    explain_empty_parameters,
    refuse_autograd,
    refusing_foreign_gradients,
)
from paceline.strategies.deepspeed.build import (
    as_bytes,
    as_groups,
    cast_inputs,
    check_activations,
    check_compiler,
    check_disk,
    check_dtypes,
    check_elementwise,
    check_monitors,
    configure_checkpointing,
    early_settings,
    engine_settings,
    exact_values,
    keeping_adagrad,
    make_scheduler,
    mark_leaves,
    name_ranks,
    parameters_in,
    prepare_package,
    restore_exact,
    updates_any_of,
    updates_only,
)
from paceline.strategies.deepspeed.clip_check import watch_clipping
from paceline.strategies.deepspeed.engine import EngineRegistry, ZeroEngine
from paceline.strategies.deepspeed.gradients import clip_norm, clip_value, local_gradients
from paceline.strategies.deepspeed.partitions import partitions_of
from paceline.strategies.deepspeed.settings import AutoValues, hidden_size_of, resolve_scheduler, resolve_settings
from paceline.strategies.deepspeed.state import gather_whole, is_sharded, value_of
from paceline.strategies.deepspeed.transformers import announce
from paceline.strategies.deepspeed.weight_check import WeightCheck
from paceline.strategies.placeholders import DummyOptim, DummyScheduler
from paceline.strategies.precision import autocast_forward, short_dtype
from paceline.strategies.protocols import multiply
from paceline.strategies.state import saved_buffers
from paceline.strategies.use_check import UseCheck

try:
    import deepspeed
    from deepspeed.accelerator import get_accelerator
except ImportError as error:
    raise MissingExtraError("deepspeed", "deepspeed", "strategy='deepspeed'") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.optim import Optimizer

    from paceline.checkpoint.format.shards import Number, Slot
    from paceline.strategies.context import RunContext


class DeepSpeedStrategy(Strategy):
    """ZeRO: stage 1 shards the optimizer's states, 2 gradients as well, 3 parameters as well.

    Attributes:
        engines: The engines of the prepared models.
    """

    name = "deepspeed"
    prepares_again = False
    keeps_gradients = True

    def __init__(self, context: RunContext) -> None:
        super().__init__(context)
        self.engines = EngineRegistry()
        self._plugin = context.config.deepspeed_config or DeepSpeedPlugin()
        self._stage = self._plugin.zero_stage
        # The script's own max_norm, once it has clipped.
        self._script_max_norm: float | None = None
        # Whether the schedule that the configuration describes was prepared.
        self._scheduled = False
        # Whether the current micro-batch is the last of its window.
        self._window_ends = True
        # DeepSpeed's description of process groups whose ranks share each sequence, and their size.
        self._sequence_groups: Any = None
        self._sequence_ranks = 1
        self._check_context()
        prepare_package()
        name_ranks()
        self._early = early_settings(self._plugin, self.context.precision.mode)
        self._announced = announce(self._early) if self._shards_while_building else None

    @property
    @override
    def distributed_type(self) -> DistributedType:
        return DistributedType.DEEPSPEED

    @property
    @override
    def scales_loss(self) -> bool:  # type: ignore[override]
        return self._dtype == torch.float16

    @property
    @override
    def settings(self) -> dict[str, Any]:
        """DeepSpeed's configuration with every `"auto"` resolved, as the user would write it.

        Empty until a model is prepared.
        """
        settings = copy.deepcopy(self.engines.settings)
        if settings and self._script_max_norm is not None:
            settings["gradient_clipping"] = self._script_max_norm
        return settings

    @property
    def _dtype(self) -> torch.dtype | None:
        """The dtype of the parameters in the forward, where that is not fp32."""
        dtype = self.context.precision.compute_dtype
        return None if self._stage == 0 or dtype is torch.float32 else dtype

    @property
    def _shards_while_building(self) -> bool:
        flag = self._plugin.zero3_init_flag
        return self._stage == 3 and (flag is None or flag)

    def _check_context(self) -> None:
        device = self.context.device
        engine = get_accelerator().device_name()
        if engine != device.type:
            raise PrepareError(
                f"DeepSpeed has chosen the accelerator {engine}, and this run computes on {device.type}",
                "DeepSpeed decides when it is imported",
                f"Start the script with `paceline launch`, or set DS_ACCELERATOR={device.type} before it starts",
            )
        if self.context.precision.mode == "fp16":
            if not get_accelerator().is_fp16_supported():
                raise PrecisionError("fp16", f"DeepSpeed on {describe_device(device)}", {"no", "bf16"})
            if self._stage == 0:
                raise PrepareError(
                    "mixed_precision='fp16' with zero_stage 0",
                    "DeepSpeed scales the loss in its sharded optimizers only",
                    "Use zero_stage 1, 2 or 3, mixed_precision='bf16', or strategy='ddp'",
                )

    # Models and optimizers

    def share_sequences(self, groups: Any, ranks: int) -> None:
        """Build engines whose ranks share each sequence, and so the samples.

        Args:
            groups: DeepSpeed's description of the process groups (`mpu`).
            ranks: How many ranks share a sequence.
        """
        self._sequence_groups, self._sequence_ranks = groups, ranks

    @override
    def prepare(
        self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer], *, place: Sequence[bool]
    ) -> list[nn.Module]:
        return self.prepare_training(models, optimizers, place=place)

    @override
    def prepare_training(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        *,
        place: Sequence[bool],
        micro_batch: int | None = None,
        schedules: Sequence[DummyScheduler] = (),
    ) -> list[nn.Module]:
        # Whether a script's own or one that an engine built in place of a DummyOptim, it has its model.
        free = [optimizer for optimizer in optimizers if self.engines.find(optimizer) is None]
        if self._stage > 0:
            self._refuse_shared(models, free)
            watch_clipping(self.engines, refuses=not self.context.leniency.clip_inside_window)
        prepared: list[nn.Module] = []
        for model, move in zip(models, place, strict=True):
            check_trainable(model)
            optimizer = self._optimizer_for(model, free)
            free = [other for other in free if other is not optimizer]
            auto = AutoValues(
                world_size=self._sample_ranks,
                micro_batch=micro_batch,
                hidden_size=hidden_size_of(model),
                optimizer=optimizer,
                schedule=next((s for s in schedules if s.optimizer is optimizer), None),
                on_cpu=self.context.device.type == "cpu",
            )
            prepared.append(self._build(model, optimizer, auto, move=move))
            self._models.append(model)
            self._parameters = None
        self._refuse_late(free)
        if self._stage > 0:
            self._note_foreign()
        return prepared

    def _refuse_shared(self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        """Refuse parameters that two engines would step: each would overwrite the steps of the other."""
        owners = self.engines.owners()
        remaining = list(optimizers)
        for model in models:
            chosen = [optimizer for optimizer in remaining if updates_only(optimizer, model)]
            remaining = [optimizer for optimizer in remaining if optimizer not in chosen]
            stepped = {id(p) for optimizer in chosen for p in parameters_in(optimizer)}
            shared = stepped & owners.keys()
            if shared:
                raise _shared_error(model, shared, next(owners[key] for key in shared))
            owners |= dict.fromkeys(stepped, model)

    def _note_foreign(self) -> None:
        """Note in each engine the parameters of its model that another one trains."""
        owners = self.engines.owners()
        for zero in self.engines:
            named_parameters = zero.model.named_parameters()
            zero.foreign = {name: p for name, p in named_parameters if owners.get(id(p), zero.model) is not zero.model}

    def _refuse_late(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse an optimizer whose model has an engine already; others may wait for their model."""
        for optimizer in optimizers:
            if any(updates_any_of(optimizer, zero.model) for zero in self.engines):
                raise PrepareError(
                    f"{type(optimizer).__name__} was prepared after its model",
                    "DeepSpeed's engine is built from a model and its optimizer in one step",
                    "Pass both to one call: prepare(model, optimizer)",
                )

    def _optimizer_for(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> Optimizer:
        own = {id(p) for p in model.parameters()}
        matching = [optimizer for optimizer in optimizers if updates_any_of(optimizer, model)]
        if len(matching) == 1 and all(id(p) in own for p in parameters_in(matching[0])):
            return matching[0]
        if len(optimizers) == 1 and not matching:
            foreign = parameters_in(optimizers[0])
            raise ForeignOptimizerError([tuple(p.shape) for p in foreign], len(foreign))
        saw = f"{type(model).__name__} was prepared with {len(matching)} optimizers of its parameters"
        if len(matching) == 1:
            saw = f"{type(matching[0]).__name__} holds parameters of {type(model).__name__} and of other models"
        raise PrepareError(
            saw,
            "DeepSpeed's engine trains one model with one optimizer",
            "Pass both to one call, prepare(model, optimizer), with one optimizer for each model; for a model that "
            "is not trained use prepare_model(model, evaluation_mode=True)",
        )

    def _build(self, model: nn.Module, optimizer: Optimizer, auto: AutoValues, *, move: bool) -> nn.Module:
        if not move:
            raise PrepareError(
                f"device_placement=False was passed for {type(model).__name__}",
                "DeepSpeed places what it shards",
                "Leave device_placement out",
            )
        check_dtypes(model)
        check_needs_no_closure(optimizer, "DeepSpeed", "Its engine cannot compute the gradients again inside a step")
        if self._stage > 0:
            check_dense_gradients(model, "ZeRO")
        groups = [list(group["params"]) for group in optimizer.param_groups]
        dtypes = {id(p): self._saved_dtype(p) for p in model.parameters()}
        exact = exact_values(model, self._dtype, is_main=self.context.world.is_main)
        settings = self.engines.settings = resolve_settings(
            self._plugin, self.context.config, auto, script_wins=self.context.leniency.script_wins
        )
        check_compiler(settings, optimizer)
        if self._stage > 0:
            check_elementwise(settings, optimizer, refuses=not self.context.leniency.script_wins)
        check_disk(settings)
        check_activations(settings, self.context.device)
        check_monitors(settings)
        if self._stage == 3 and self._plugin.transformer_moe_cls_names:
            mark_leaves(model, self._plugin.transformer_moe_cls_names)
        placeholder = optimizer if isinstance(optimizer, DummyOptim) else None
        self.compiler.compile(model)
        config = engine_settings(settings, self._stage, self._sample_ranks, builds_optimizer=placeholder is not None)
        with as_bytes(model, self._stage, self.context.group), keeping_adagrad():
            engine = self._initialize(
                model=model,
                optimizer=optimizer if placeholder is None else None,
                model_parameters=None if placeholder is None else as_groups(placeholder),
                config=config,
                mpu=self._sequence_groups,
            )
        # It has replaced a function of torch, if that had not been done before.
        protect_linear()
        # It looks for DeepSpeed's own process groups, which exist from here on.
        configure_checkpointing(settings)
        partitions = partitions_of(engine, self._stage)
        weights = WeightCheck(partitions, list(model.named_parameters()))
        weights.accept_loads(engine)
        zero = ZeroEngine(engine, model, optimizer, partitions, groups, dtypes, weights, self._new_use_check())
        engine.set_gradient_accumulation_boundary(True)
        self._watch(zero)
        refuse_autograd(zero)
        engine.__deepcopy__ = partial(_refuse_copy, model)
        self.engines.add(zero)
        if placeholder is not None:
            placeholder.attach(zero.optimizer)
        restore_exact(zero, exact, self.context)
        prepared: nn.Module = engine
        return prepared

    @property
    def _sample_ranks(self) -> int:
        """The number of ranks, or of groups of them that share sequences, with samples of their own."""
        return self.context.group.size // self._sequence_ranks

    def _new_use_check(self) -> UseCheck:
        remedy = "use strategy='ddp' or 'fsdp' with find_unused_parameters"
        return UseCheck(self.context.group, "ZeRO", remedy)

    def _saved_dtype(self, parameter: nn.Parameter) -> torch.dtype:
        """The parameter's own dtype; fp32 if it was built sharded, where 16 bits are the engine's choice."""
        own = parameter.dtype
        return torch.float32 if hasattr(parameter, "ds_id") and own == self._dtype else own

    def _initialize(self, **arguments: Any) -> Any:
        return deepspeed.initialize(**arguments)[0]

    def _watch(self, zero: ZeroEngine) -> None:
        """Note which engines a loss may come from, and pass 16-bit inputs to 16-bit models."""
        dtype = self._dtype
        trained = list(zero.model.parameters()) if self._stage > 0 else []
        flags = [p.requires_grad for p in trained]

        def before(_module: nn.Module, inputs: Any, keywords: Any) -> Any:
            if torch.is_grad_enabled():
                zero.awaits_backward = True
                now = [p.requires_grad for p in trained]
                if now != flags:
                    _refuse_change(zero, flags, now)
            return None if dtype is None else (cast_inputs(inputs, dtype), cast_inputs(keywords, dtype))

        zero.model.register_forward_pre_hook(before, with_kwargs=True)
        if dtype is None:
            autocast_forward(zero.model, self.context.precision)

    @override
    def prepare_model(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        raise PrepareError(
            f"{type(model).__name__} was prepared without an optimizer",
            "DeepSpeed's engine is built from a model and its optimizer in one step",
            "Pass both to one call: prepare(model, optimizer)",
        )

    @override
    def prepare_evaluation(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        if not any(hasattr(p, "ds_id") for p in model.parameters()):
            return super().prepare_evaluation(model, place=place)
        engine = self._initialize(model=model, config=self._early)
        self.engines.add_evaluated(engine)
        prepared: nn.Module = engine
        return prepared

    @override
    def unwrap(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, deepspeed.DeepSpeedEngine) else model

    @override
    def parameters_of(self, optimizer: Optimizer) -> list[nn.Parameter]:
        zero = self.engines.find(optimizer)
        return super().parameters_of(optimizer) if zero is None else [p for group in zero.groups for p in group]

    @override
    def add_group(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        if self.engines.find(optimizer) is not None:
            raise PrepareError(
                "add_param_group() was called after the optimizer was prepared",
                "DeepSpeed's engine partitions the groups once, when it is built",
                "Put all parameters into the optimizer before prepare(), with lr=0 for those to be trained later",
            )
        super().add_group(optimizer, group)

    @override
    def resolve_placeholder_optimizer(self, optimizer: Optimizer) -> Optimizer:
        zero = self.engines.find(optimizer)
        if zero is None or not isinstance(optimizer, DummyOptim):
            return optimizer
        built: Optimizer = zero.optimizer
        return built

    @override
    def resolve_placeholder_scheduler(self, scheduler: Any) -> Any:
        described = self.engines.settings.get("scheduler")
        if not isinstance(scheduler, DummyScheduler):
            if described is not None:
                raise PrepareError(
                    f"{type(scheduler).__name__} was prepared, and the DeepSpeed configuration has a scheduler section",
                    "The two conflict; one would be ignored",
                    "Prepare a DummyScheduler in its place, or remove the section",
                )
            return scheduler
        zero = self.engines.find(scheduler.optimizer)
        given = scheduler.optimizer if zero is None else zero.given_optimizer
        scheduler.optimizer = optimizer = self.resolve_placeholder_optimizer(scheduler.optimizer)
        self._scheduled = True
        if scheduler.lr_scheduler_callable is not None:
            return scheduler.lr_scheduler_callable(optimizer)
        if described is None:
            raise PrepareError(
                "A DummyScheduler was prepared, and the DeepSpeed configuration has no scheduler section",
                "The placeholder gets its schedule from that section",
                "Add the section, or pass a scheduler of torch.optim.lr_scheduler",
            )
        section = resolve_scheduler(self.engines.settings, scheduler, given)
        self.engines.settings["scheduler"] = section
        return make_scheduler(section, optimizer)

    @staticmethod
    @override
    def join_process_group() -> None:
        prepare_package()
        # Without it DeepSpeed's configuration counts a single rank.
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)

    @override
    def close(self) -> None:
        super().close()
        self.engines.close()

    # Models that are built sharded

    @override
    @contextmanager
    def init_module(self) -> Iterator[None]:
        if self._stage != 3:
            yield
            return
        with deepspeed.zero.Init(config_dict_or_path=self._early):
            yield

    @override
    def gather_parameters(
        self, parameters: Sequence[nn.Parameter], modifier_rank: int | None
    ) -> AbstractContextManager[Any]:
        whole = super().gather_parameters(parameters, modifier_rank)
        if self._stage == 3:
            whole = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=modifier_rank)
        return self._gathered(list(parameters), modifier_rank, whole)

    @contextmanager
    def _gathered(
        self, parameters: list[nn.Parameter], modifier_rank: int | None, whole: AbstractContextManager[Any]
    ) -> Iterator[None]:
        with whole:
            yield
        if modifier_rank is None:
            return
        # The optimizer's fp32 values must follow, or the next step would undo the change.
        for zero in self.engines:
            for parameter in parameters:
                zero.partitions.transfer_changes(parameter)
            zero.partitions.write_back()
            zero.weights.accept()

    # One step

    @override
    def set_gradient_sync(self, model: nn.Module, enabled: bool) -> None:
        zero = self.engines.engine_of(model)
        if zero is not None:
            zero.syncs = enabled

    @override
    def set_window_end(self, ends: bool) -> None:
        self._window_ends = ends

    @override
    def backward(self, loss: Tensor, scale: Tensor | None = None, **kwargs: Any) -> None:
        retain = kwargs.pop("retain_graph", False)
        if kwargs or loss.ndim:
            saw = f"backward() got {', '.join(kwargs)}" if kwargs else f"backward() got a loss of shape {[*loss.shape]}"
            raise SteppingError(
                saw,
                "DeepSpeed's engine computes the gradients of a scalar and accepts only retain_graph",
                "Pass a loss of shape [], or use another strategy",
            )
        zero = self.engines.source_of_loss()
        if zero.window_ended:
            raise SteppingError(
                f"backward() was called again on {type(zero.model).__name__} after the backward that ended its window",
                "DeepSpeed's engine would drop the gradients of the first one",
                "Add the losses up and call backward() once",
            )
        ends_window = self._window_ends and zero.syncs
        zero.engine.set_gradient_accumulation_boundary(ends_window)
        zero.awaits_backward, zero.is_clipped, zero.window_ended = False, False, ends_window
        try:
            with self._noting_uses(zero), refusing_foreign_gradients(zero):
                zero.engine.backward(loss if scale is None else loss * scale, retain_graph=retain, scale_wrt_gas=False)
        except RuntimeError as error:
            explain_empty_parameters(zero, error)
            raise

    @contextmanager
    def _noting_uses(self, zero: ZeroEngine) -> Iterator[None]:
        """Note which parameters the backward inside reaches, where the next step is one to compare before."""
        if not zero.uses.is_due:
            yield
            return

        def note(parameter: Tensor) -> None:
            zero.used.add(id(parameter))

        trained = [p for group in zero.groups for p in group if p.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(note) for p in trained]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _compare_uses(self, zero: ZeroEngine) -> None:
        if zero.uses.is_due:
            trained = [p for group in zero.groups for p in group if p.requires_grad]
            names = {id(p): name for name, p in zero.model.named_parameters()}
            zero.uses.compare(trained, [id(p) in zero.used for p in trained], lambda p: names[id(p)])
        zero.used.clear()
        zero.uses.stepped()

    @override
    @torch.no_grad()
    def scale_gradients(self, parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
        for _, gradients in local_gradients(self.engines, parameters, self.context.device):
            multiply(gradients, factor)

    @override
    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float) -> Tensor:
        self._check_clip(max_norm)
        if max_norm != float("inf"):
            self._script_max_norm = max_norm
        gradients = local_gradients(self.engines, parameters, self.context.device)
        for zero, _ in gradients:
            zero.is_clipped = True
        return clip_norm(gradients, max_norm, norm_type, self.context.group, self.context.device)

    @override
    def clip_value(self, parameters: Iterable[nn.Parameter], value: float) -> None:
        clip_value(local_gradients(self.engines, parameters, self.context.device), value)

    def _check_clip(self, max_norm: float) -> None:
        """Make sure that the script and the configuration do not clip to different norms."""
        configured = self._configured_max_norm
        if configured is not None and max_norm not in (configured, float("inf")):
            raise SteppingError(
                f"clip_grad_norm_(max_norm={max_norm:g}) was called, and the DeepSpeed configuration says "
                f"gradient_clipping {configured:g}",
                "The two conflict; one would be ignored",
                'Write "auto" into the configuration, or pass the same value',
            )

    @property
    def _configured_max_norm(self) -> float | None:
        """The `gradient_clipping` of the configuration; None where the script decides."""
        configured = self._plugin.gradient_clipping
        return float(configured) if isinstance(configured, (int, float)) and configured > 0 else None

    @override
    def check_first_backward(self) -> None:
        if "scheduler" in self.engines.settings and not self._scheduled:
            raise PrepareError(
                "The DeepSpeed configuration has a scheduler section, and no DummyScheduler was prepared",
                "Nothing would step the schedule that it describes",
                "Prepare a DummyScheduler(optimizer), or remove the section",
            )

    @override
    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            raise SteppingError(
                "optimizer.step(closure) was called under DeepSpeed",
                "Its engine computes the gradients before the step and cannot compute them again inside it",
                "Use an optimizer that needs no closure, or strategy='ddp'",
            )
        zero = self.engines.find(optimizer)
        assert zero is not None
        configured = self._configured_max_norm
        if configured is not None and not zero.is_clipped and zero.partitions.reaches_gradients:
            self.clip_norm([p for group in zero.groups for p in group], configured, 2.0)
        zero.weights.before_step()
        self._compare_uses(zero)
        zero.engine.step()
        # Where a group is one weight that needs no padding, the engine writes into that very tensor.
        zero.weights.accept()
        zero.window_ended = False
        return None

    @override
    def step_was_skipped(self, optimizer: Optimizer) -> bool:
        zero = self.engines.find(optimizer)
        return zero is not None and bool(getattr(zero.engine.optimizer, "overflow", False))

    @override
    def zero_grad(self, optimizer: Optimizer, set_to_none: bool = True) -> None:
        zero = self.engines.find(optimizer)
        assert zero is not None
        zero.partitions.drop_gradients()
        zero.window_ended = False

    @override
    def join(self, models: Sequence[nn.Module]) -> AbstractContextManager[Any]:
        raise refuse_join("DeepSpeed")

    # Training state

    @override
    def num_elements(self, model: nn.Module) -> int:
        # Stage 3 leaves empty parameters behind.
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())

    @override
    def model_state(self, model: nn.Module) -> dict[str, TensorShard]:
        zero = self.engines.engine_of(model)
        if zero is not None:
            zero.weights.check_writes()
        inner = self.unwrap(model)
        shards = {name: value_of(zero, parameter) for name, parameter in inner.named_parameters()}
        return shards | {name: TensorShard.whole(buffer) for name, buffer in saved_buffers(inner)}

    @override
    def optimizer_state(self, optimizer: Optimizer, names: Mapping[int, str]) -> OptimizerState:
        return zero_state.optimizer_state(self._prepared_engine(optimizer), names)

    @override
    def make_slots(
        self,
        optimizer: Optimizer,
        names: Mapping[int, str],
        slots: Mapping[str, Mapping[str, Slot]],
        numbers: Mapping[str, Mapping[str, Number]],
    ) -> None:
        zero_state.make_slots(self._prepared_engine(optimizer), names, slots, numbers)

    @override
    def set_groups(self, optimizer: Optimizer, names: Mapping[int, str], groups: Sequence[Mapping[str, Any]]) -> None:
        zero_state.set_groups(self._prepared_engine(optimizer), names, groups)

    @override
    def state_written(self) -> None:
        for zero in self.engines:
            zero_state.state_written(zero)
            zero.weights.accept()

    @override
    def engine_state(self) -> dict[str, Any]:
        return {"loss_scalers": [zero_state.scaler_state(zero.engine.optimizer) for zero in self.engines]}

    @override
    def load_engine_state(self, state: Mapping[str, Any]) -> None:
        for zero, saved in zip(self.engines, state.get("loss_scalers", ()), strict=False):
            zero_state.load_scaler_state(zero.engine.optimizer, saved)

    def _prepared_engine(self, optimizer: Optimizer) -> ZeroEngine:
        zero = self.engines.find(optimizer)
        if zero is None:
            raise StateError(
                f"The state of a {type(optimizer).__name__} was requested that has no DeepSpeed engine",
                "DeepSpeed's engine owns the state of its optimizer",
                "Pass the optimizer to prepare() together with its model",
            )
        return zero

    @override
    @torch.no_grad()
    def gather_state(self, model: nn.Module, *, without: Container[str] = ()) -> dict[str, Tensor]:
        zero = self.engines.engine_of(model)
        state: dict[str, Tensor] = {}
        sharded = {name for name, p in self.unwrap(model).named_parameters() if is_sharded(zero, p)}
        for name, shard in self.model_state(model).items():
            if name in without:
                continue
            whole = (
                gather_whole(shard, self.context.group, self.context.device)
                if name in sharded
                else shard.values.reshape(shard.shape).cpu()
            )
            if self.context.world.is_main:
                state[name] = whole
        if not state:
            return {}
        self._cast_saved(zero, self.unwrap(model), state)
        state.update((alias, state[first]) for alias, first in self.tied_names(model).items() if first in state)
        return state

    def _cast_saved(self, zero: ZeroEngine | None, inner: nn.Module, state: dict[str, Tensor]) -> None:
        """Give weights the dtype that they came in, or 16 bits if the configuration says so."""
        if zero is None:
            return
        short = self._dtype if self._plugin.zero3_save_16bit_model else None
        for name, parameter in inner.named_parameters():
            if name not in state:
                continue
            state[name] = state[name].to(short or zero.dtypes.get(id(parameter), state[name].dtype))

    # Descriptions

    @override
    def describe(self) -> list[str]:
        size = self.context.group.size
        shards = [
            "whole on each of",
            "optimizer states sharded over",
            "optimizer states and gradients sharded over",
            "parameters, gradients and optimizer states sharded over",
        ][self._stage]
        ranks = counted(size, "rank")
        line = f"DeepSpeed {deepspeed.__version__}, ZeRO stage {self._stage}: {shards} {ranks}"
        zero = self._plugin.zero_section()
        offloaded = [
            f"{what} on {zero[key]['device']}"
            for key, what in (("offload_optimizer", "optimizer"), ("offload_param", "parameters"))
            if zero.get(key, {}).get("device", "none") != "none"
        ]
        return ["; ".join([line, *offloaded])]

    @override
    def dtypes(self) -> dict[str, str]:
        table = super().dtypes()
        if self._dtype is not None:
            short = short_dtype(self._dtype)
            reduce = self.engines.settings.get("communication_data_type") or short
            table |= {"stored": short, "compute": short, "reduce": reduce, "optimizer": "fp32", "saved": "fp32"}
            if self._plugin.zero3_save_16bit_model:
                table["saved"] = short
        return table


def _shared_error(model: nn.Module, shared: Container[int], other: nn.Module) -> PrepareError:
    """The error for parameters of a model, by their `id`, that another engine steps already."""
    names = [name for name, p in model.named_parameters() if id(p) in shared]
    return PrepareError(
        f"{named(names, 4)} of {type(model).__name__} {'is' if len(names) == 1 else 'are'} in {type(other).__name__}, "
        "too, which was prepared with another optimizer",
        "Each optimizer has an engine of its own under ZeRO, with its own fp32 values of its parameters: one would "
        "overwrite the steps of the other",
        "Put both into one module that calls them, and prepare that with one optimizer; or use zero_stage 0 or "
        "strategy='ddp'",
    )


def _refuse_copy(model: nn.Module, _memo: dict[int, Any]) -> NoReturn:
    """Refuse to deep-copy an engine.

    Raises:
        PrepareError: Always.
    """
    raise PrepareError(
        f"copy.deepcopy was called on {type(model).__name__}, which DeepSpeed's engine trains; AveragedModel calls it, "
        "too",
        "The engine has process groups and an optimizer, which cannot be copied",
        "Copy the model before prepare(); under zero_stage 0, 1 or 2 accelerator.unwrap_model(model) can be copied "
        "later",
    )


def _refuse_change(zero: ZeroEngine, before: Sequence[bool], now: Sequence[bool]) -> None:
    """Refuse to train what was frozen, or the other way round: the engine has its own list of trained parameters."""
    if not any(now):
        # Frozen as a whole, as a discriminator is while its generator learns: no step of it follows.
        return
    names = [name for name, _ in zero.model.named_parameters()]
    changed = [name for name, was, is_now in zip(names, before, now, strict=True) if was != is_now]
    raise SteppingError(
        f"{named(changed)} of {type(zero.model).__name__} {'was' if len(changed) == 1 else 'were'} frozen or unfrozen "
        "after prepare()",
        "ZeRO partitions the parameters that required a gradient when its engine was built: it would not train those "
        "unfrozen later, and would keep updating those frozen later",
        "Freeze before prepare(), or give the parameters their own group with lr=0 while they must not change; "
        "with zero_stage 0, strategy='ddp' or 'fsdp' they may be frozen and unfrozen at any time",
    )
