"""DeepSpeed's engine shards optimizer states, gradients and parameters (ZeRO), and may keep them in host memory.

The engine owns backward and step; what a step *is* stays paceline's: the window, true means, clipping, skipped steps
and the scheduler are the same as under every other strategy. So the engine is told that a window has one
micro-batch and that nothing is to be clipped, and this class says where a window ends and clips by itself.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import override

from paceline.checkpoint.parts import OptimizerState, Part
from paceline.config import DeepSpeedPlugin
from paceline.environment.device import describe_device
from paceline.errors import (
    ForeignOptimizerError,
    MissingExtraError,
    PrecisionError,
    PrepareError,
    StateError,
    SteppingError,
)
from paceline.precision import autocast_forward
from paceline.strategies import zero_state
from paceline.strategies.base import DistributedType, Strategy, check_trainable, multiply, refuse_join, short_dtype
from paceline.strategies.compiled import compile_model
from paceline.strategies.deepspeed_build import (
    DTYPES,
    as_groups,
    cast_inputs,
    check_compiler,
    check_disk,
    configure_checkpointing,
    early_settings,
    engine_settings,
    exact_values,
    holds,
    make_scheduler,
    mark_leaves,
    name_ranks,
    parameters_in,
    prepare_package,
    restore_exact,
)
from paceline.strategies.deepspeed_settings import Known, hidden_size_of, resolve_scheduler, resolve_settings
from paceline.strategies.dummies import DummyOptim, DummyScheduler
from paceline.strategies.state import saved_buffers
from paceline.strategies.transformers_init import announce
from paceline.strategies.zero import partitions_of, piece_of
from paceline.strategies.zero_engine import Bound
from paceline.strategies.zero_gradients import clip_norm, clip_value, runs_of
from paceline.strategies.zero_state import gather_whole, is_cut, value_of

try:
    import deepspeed
    from deepspeed.accelerator import get_accelerator
except ImportError as error:
    raise MissingExtraError("deepspeed", "deepspeed", "strategy='deepspeed'") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.optim import Optimizer

    from paceline.checkpoint.parts import Number, Slot
    from paceline.strategies.base import Surroundings


class DeepSpeedStrategy(Strategy):
    """ZeRO: stage 1 shards the optimizer's states, 2 gradients as well, 3 parameters as well."""

    name = "deepspeed"
    prepares_again = False

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__(surroundings)
        self._plugin = surroundings.config.deepspeed_config or DeepSpeedPlugin()
        self._stage = self._plugin.zero_stage
        self._engines: list[Bound] = []
        self._references: list[Any] = []
        self._settings: dict[str, Any] = {}
        # Whether somebody steps the schedule that the configuration describes.
        self._scheduled = False
        self._check_surroundings()
        prepare_package()
        name_ranks()
        self._early = early_settings(self._plugin, self.around.precision.mode)
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
        """DeepSpeed's configuration with every `auto` filled in, as the user would write it.

        Empty until a model was prepared.
        """
        return copy.deepcopy(self._settings)

    @property
    def _dtype(self) -> torch.dtype | None:
        """The dtype of the parameters that the forward uses, where that is not fp32."""
        return DTYPES.get(self.around.precision.mode) if self._stage > 0 else None

    @property
    def _shards_while_building(self) -> bool:
        flag = self._plugin.zero3_init_flag
        return self._stage == 3 and (flag is None or flag)

    def _check_surroundings(self) -> None:
        device = self.around.device
        engine = get_accelerator().device_name()
        if engine != device.type:
            raise PrepareError(
                f"DeepSpeed has chosen the accelerator {engine}, and this run computes on {device.type}",
                "DeepSpeed decides when it is imported",
                f"Start the script with `paceline launch`, or set DS_ACCELERATOR={device.type} before it starts",
            )
        if self.around.precision.mode == "fp16":
            if not get_accelerator().is_fp16_supported():
                raise PrecisionError("fp16", f"DeepSpeed on {describe_device(device)}", {"no", "bf16"})
            if self._stage == 0:
                raise PrepareError(
                    "mixed_precision='fp16' with zero_stage 0",
                    "DeepSpeed scales the loss in its sharded optimizers only",
                    "Use zero_stage 1, 2 or 3, mixed_precision='bf16', or strategy='ddp'",
                )

    # What becomes of models and optimizers

    @override
    def prepare(
        self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer], *, place: Sequence[bool]
    ) -> list[nn.Module]:
        taken = {id(bound.given) for bound in self._engines}
        free = [optimizer for optimizer in optimizers if id(optimizer) not in taken]
        prepared: list[nn.Module] = []
        for model, move in zip(models, place, strict=True):
            check_trainable(model)
            optimizer = self._optimizer_for(model, free)
            free = [other for other in free if other is not optimizer]
            prepared.append(self._build(model, optimizer, move=move))
            self._models.append(model)
            self._parameters = None
        # An optimizer may wait for its model; one whose model has an engine already comes too late.
        late = next((optimizer for optimizer in free if any(holds(optimizer, b.model) for b in self._engines)), None)
        if late is not None:
            raise PrepareError(
                f"{type(late).__name__} was prepared after its model",
                "DeepSpeed's engine is built from a model and its optimizer together",
                "Pass both to one call: prepare(model, optimizer)",
            )
        return prepared

    def _optimizer_for(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> Optimizer:
        own = {id(p) for p in model.parameters()}
        matching = [optimizer for optimizer in optimizers if holds(optimizer, model)]
        if len(matching) == 1 and all(id(p) in own for p in parameters_in(matching[0])):
            return matching[0]
        if len(optimizers) == 1 and not matching:
            held = parameters_in(optimizers[0])
            raise ForeignOptimizerError([tuple(p.shape) for p in held], len(held))
        saw = f"{type(model).__name__} was prepared with {len(matching)} optimizers of its parameters"
        if len(matching) == 1:
            saw = f"{type(matching[0]).__name__} holds parameters of {type(model).__name__} and of other models"
        raise PrepareError(
            saw,
            "DeepSpeed's engine trains one model with one optimizer",
            "Pass both to one call, prepare(model, optimizer), with one optimizer for each model; for a model that "
            "is not trained use prepare_model(model, evaluation_mode=True)",
        )

    def _build(self, model: nn.Module, optimizer: Optimizer, *, move: bool) -> nn.Module:
        if not move:
            raise PrepareError(
                f"device_placement=False was given for {type(model).__name__}",
                "DeepSpeed places what it shards",
                "Leave device_placement out",
            )
        groups = [list(group["params"]) for group in optimizer.param_groups]
        dtypes = {id(p): self._dtype_of(p) for p in model.parameters()}
        exact = exact_values(model, self._dtype, is_main=self.around.world.is_main)
        known = Known(
            world_size=self.around.group.size,
            micro_batch=self.micro_batch,
            hidden_size=hidden_size_of(model),
            optimizer=optimizer,
            schedule=next((s for s in self.schedules if s.optimizer is optimizer), None),
            on_cpu=self.around.device.type == "cpu",
        )
        self._settings = resolve_settings(self._plugin, self.around.config, known)
        check_compiler(self._settings, optimizer)
        check_disk(self._settings)
        if self._stage == 3 and self._plugin.transformer_moe_cls_names:
            mark_leaves(model, self._plugin.transformer_moe_cls_names)
        configure_checkpointing(self._settings)
        stand_in = optimizer if isinstance(optimizer, DummyOptim) else None
        compile_model(model, self.around.config.dynamo_config)
        engine = self._initialize(
            model=model,
            optimizer=optimizer if stand_in is None else None,
            model_parameters=None if stand_in is None else as_groups(stand_in),
            config=engine_settings(self._settings, self._stage, self.around.group.size, stand_in=stand_in is not None),
        )
        bound = Bound(engine, model, optimizer, partitions_of(engine, self._stage), groups, dtypes)
        engine.set_gradient_accumulation_boundary(True)
        self._watch(bound)
        self._engines.append(bound)
        restore_exact(bound, exact, self.around)
        prepared: nn.Module = engine
        return prepared

    def _dtype_of(self, parameter: nn.Parameter) -> torch.dtype:
        """The dtype to save a parameter in: its own, but that one built sharded got 16 bits from the engine only."""
        own = parameter.dtype
        return torch.float32 if hasattr(parameter, "ds_id") and own == self._dtype else own

    def _initialize(self, **arguments: Any) -> Any:
        return deepspeed.initialize(**arguments)[0]

    def _watch(self, bound: Bound) -> None:
        """Note which engines a loss may come from, and hand 16-bit models 16-bit inputs."""
        dtype = self._dtype

        def before(_module: nn.Module, inputs: Any, keywords: Any) -> Any:
            if torch.is_grad_enabled():
                bound.pending = True
            return None if dtype is None else (cast_inputs(inputs, dtype), cast_inputs(keywords, dtype))

        bound.model.register_forward_pre_hook(before, with_kwargs=True)
        if dtype is None:
            autocast_forward(bound.model, self.around.precision)

    @override
    def prepare_model(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        raise PrepareError(
            f"{type(model).__name__} was prepared without an optimizer",
            "DeepSpeed's engine is built from a model and its optimizer together",
            "Pass both to one call: prepare(model, optimizer)",
        )

    @override
    def prepare_evaluation(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        if not any(hasattr(p, "ds_id") for p in model.parameters()):
            return super().prepare_evaluation(model, place=place)
        engine = self._initialize(model=model, config=self._early)
        self._references.append(engine)
        prepared: nn.Module = engine
        return prepared

    @override
    def unwrap(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, deepspeed.DeepSpeedEngine) else model

    @override
    def parameters_of(self, optimizer: Optimizer) -> list[nn.Parameter]:
        bound = self._find(optimizer)
        return super().parameters_of(optimizer) if bound is None else [p for group in bound.groups for p in group]

    @override
    def successor(self, optimizer: Optimizer) -> Optimizer:
        bound = self._find(optimizer)
        if bound is None or not isinstance(optimizer, DummyOptim):
            return optimizer
        made: Optimizer = bound.optimizer
        return made

    @override
    def adopt_scheduler(self, scheduler: Any) -> Any:
        described = self._settings.get("scheduler")
        if not isinstance(scheduler, DummyScheduler):
            if described is not None:
                raise PrepareError(
                    f"{type(scheduler).__name__} was prepared, and the DeepSpeed configuration has a scheduler section",
                    "One of the two would silently lose",
                    "Prepare a DummyScheduler in its place, or remove the section",
                )
            return scheduler
        bound = self._find(scheduler.optimizer)
        given = scheduler.optimizer if bound is None else bound.given
        scheduler.optimizer = optimizer = self.successor(scheduler.optimizer)
        self._scheduled = True
        if scheduler.lr_scheduler_callable is not None:
            return scheduler.lr_scheduler_callable(optimizer)
        if described is None:
            raise PrepareError(
                "A DummyScheduler was prepared",
                "It stands for the scheduler section of the DeepSpeed configuration, and there is none",
                "Add the section, or pass a scheduler of torch.optim.lr_scheduler",
            )
        section = resolve_scheduler(self._settings, scheduler, given)
        self._settings["scheduler"] = section
        return make_scheduler(section, optimizer)

    def _find(self, optimizer: object) -> Bound | None:
        return next((b for b in self._engines if b.given is optimizer or b.optimizer is optimizer), None)

    def _engine_of(self, model: nn.Module) -> Bound | None:
        return next((b for b in self._engines if b.engine is model or b.model is model), None)

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
        if self._stage != 3:
            return super().gather_parameters(parameters, modifier_rank)
        return self._gathered(list(parameters), modifier_rank)

    @contextmanager
    def _gathered(self, parameters: list[nn.Parameter], modifier_rank: int | None) -> Iterator[None]:
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank):
            yield
        if modifier_rank is None:
            return
        # The optimizer's fp32 values follow, or the next step would undo the change.
        for bound in self._engines:
            for parameter in parameters:
                if bound.partitions.place(parameter) is not None:
                    bound.partitions.value(parameter).values.copy_(piece_of(parameter).values)
            bound.partitions.put_away()

    # One step

    @override
    def set_gradient_sync(self, model: nn.Module, enabled: bool) -> None:
        bound = self._engine_of(model)
        if bound is not None:
            bound.ends = enabled
            bound.engine.set_gradient_accumulation_boundary(enabled)

    @override
    def backward(self, loss: Tensor, scale: Tensor | None = None, **kwargs: Any) -> None:
        retain = kwargs.pop("retain_graph", False)
        if kwargs or loss.ndim:
            saw = f"backward() got {', '.join(kwargs)}" if kwargs else f"backward() got a loss of shape {[*loss.shape]}"
            raise SteppingError(
                saw,
                "DeepSpeed's engine computes the gradients of one number and takes only retain_graph",
                "Pass a loss of shape [], or use another strategy",
            )
        bound = self._source()
        if bound.ended:
            raise SteppingError(
                f"backward() was called again on {type(bound.model).__name__} after the backward that ended its window",
                "DeepSpeed's engine would forget the gradients of the first one",
                "Add the losses up and call backward() once, or train under accumulate() without sync_each_batch",
            )
        bound.pending, bound.clipped, bound.ended = False, False, bound.ends
        bound.engine.backward(loss if scale is None else loss * scale, retain_graph=retain, scale_wrt_gas=False)

    def _source(self) -> Bound:
        """The engine that this loss comes from: the one whose forward ran since its last backward."""
        if len(self._engines) == 1:
            return self._engines[0]
        pending = [bound for bound in self._engines if bound.pending]
        if len(pending) == 1:
            return pending[0]
        names = ", ".join(type(bound.model).__name__ for bound in pending) or "none"
        raise SteppingError(
            f"backward() was called after the forward of several trained models: {names}",
            "Each has its own DeepSpeed engine, which must run the backward of its own loss",
            "Call forward and backward of one model before the forward of the next, with torch.no_grad() around a "
            "forward that needs no gradient; or use strategy='fsdp'",
        )

    @override
    @torch.no_grad()
    def scale_gradients(self, parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
        for _, runs in runs_of(self._engines, parameters, self.around.device):
            multiply(runs, factor)

    @override
    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float) -> Tensor:
        self._check_clip(max_norm)
        if max_norm != float("inf"):
            self._settings["gradient_clipping"] = max_norm
        found = runs_of(self._engines, parameters, self.around.device)
        for bound, _ in found:
            bound.clipped = True
        return clip_norm(found, max_norm, norm_type, self.around.group, self.around.device)

    @override
    def clip_value(self, parameters: Iterable[nn.Parameter], value: float) -> None:
        clip_value(runs_of(self._engines, parameters, self.around.device), value)

    def _check_clip(self, max_norm: float) -> None:
        """One owner for the largest norm: the script, or the configuration."""
        asked = self._clipping
        if asked is not None and max_norm not in (asked, float("inf")):
            raise SteppingError(
                f"clip_grad_norm_(max_norm={max_norm:g}) was called, and the DeepSpeed configuration says "
                f"gradient_clipping {asked:g}",
                "Only one of them can hold",
                'Write "auto" into the configuration, or pass the same value',
            )

    @property
    def _clipping(self) -> float | None:
        """The largest norm that the configuration asks for; None where the script decides."""
        asked = self._plugin.gradient_clipping
        return float(asked) if isinstance(asked, (int, float)) and asked > 0 else None

    @override
    def check_first_backward(self) -> None:
        if "scheduler" in self._settings and not self._scheduled:
            raise PrepareError(
                "The DeepSpeed configuration has a scheduler section, and no DummyScheduler was prepared",
                "Nobody would step what it describes",
                "Prepare a DummyScheduler(optimizer), or remove the section",
            )

    @override
    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            raise SteppingError(
                "optimizer.step(closure) was called under DeepSpeed",
                "Its engine computes the gradients before the step and cannot compute them again inside",
                "Use an optimizer that needs no closure, or strategy='ddp'",
            )
        bound = self._find(optimizer)
        assert bound is not None
        asked = self._clipping
        if asked is not None and not bound.clipped and bound.partitions.reaches_gradients:
            self.clip_norm([p for group in bound.groups for p in group], asked, 2.0)
        bound.engine.step()
        bound.ended = False
        return None

    @override
    def step_was_skipped(self, optimizer: Optimizer) -> bool:
        bound = self._find(optimizer)
        return bound is not None and bool(getattr(bound.engine.optimizer, "overflow", False))

    @override
    def zero_grad(self, optimizer: Optimizer, set_to_none: bool = True) -> None:
        bound = self._find(optimizer)
        assert bound is not None
        bound.partitions.drop_gradients()
        bound.ended = False

    @override
    def join(self, models: Sequence[nn.Module]) -> AbstractContextManager[Any]:
        raise refuse_join("DeepSpeed")

    # State, in and out

    @override
    def num_elements(self, model: nn.Module) -> int:
        # Stage 3 leaves empty parameters behind.
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())

    @override
    def model_state(self, model: nn.Module) -> dict[str, Part]:
        bound = self._engine_of(model)
        inner = self.unwrap(model)
        parts = {name: value_of(bound, parameter) for name, parameter in inner.named_parameters()}
        return parts | {name: Part.whole(buffer) for name, buffer in saved_buffers(inner)}

    @override
    def optimizer_state(self, optimizer: Optimizer, names: Mapping[int, str]) -> OptimizerState:
        return zero_state.optimizer_state(self._bound(optimizer), names)

    @override
    def make_slots(
        self,
        optimizer: Optimizer,
        names: Mapping[int, str],
        slots: Mapping[str, Mapping[str, Slot]],
        numbers: Mapping[str, Mapping[str, Number]],
    ) -> None:
        zero_state.make_slots(self._bound(optimizer), names, slots, numbers)

    @override
    def set_groups(self, optimizer: Optimizer, names: Mapping[int, str], groups: Sequence[Mapping[str, Any]]) -> None:
        zero_state.set_groups(self._bound(optimizer), names, groups)

    @override
    def state_written(self) -> None:
        for bound in self._engines:
            zero_state.state_written(bound)

    @override
    def engine_state(self) -> dict[str, Any]:
        return {"loss_scalers": [zero_state.scaler_state(bound.engine.optimizer) for bound in self._engines]}

    @override
    def load_engine_state(self, state: Mapping[str, Any]) -> None:
        for bound, held in zip(self._engines, state.get("loss_scalers", ()), strict=False):
            zero_state.take_scaler_state(bound.engine.optimizer, held)

    def _bound(self, optimizer: Optimizer) -> Bound:
        bound = self._find(optimizer)
        if bound is None:
            raise StateError(f"The state of a {type(optimizer).__name__} was asked for that was not prepared")
        return bound

    @override
    @torch.no_grad()
    def gather_state(self, model: nn.Module) -> dict[str, Tensor]:
        bound = self._engine_of(model)
        state: dict[str, Tensor] = {}
        cut = {name for name, p in self.unwrap(model).named_parameters() if is_cut(bound, p)}
        for name, part in self.model_state(model).items():
            whole = (
                gather_whole(part, self.around.group, self.around.device)
                if name in cut
                else part.values.reshape(part.shape).cpu()
            )
            if self.around.world.is_main:
                state[name] = whole
        if not state:
            return {}
        self._round(bound, self.unwrap(model), state)
        for alias, first in self.tied_names(model).items():
            state[alias] = state[first]
        return state

    def _round(self, bound: Bound | None, inner: nn.Module, state: dict[str, Tensor]) -> None:
        """Give weights the dtype they came in, or 16 bits where the configuration asks for it."""
        if bound is None:
            return
        short = self._dtype if self._plugin.zero3_save_16bit_model else None
        for name, parameter in inner.named_parameters():
            state[name] = state[name].to(short or bound.dtypes.get(id(parameter), state[name].dtype))

    # What others want to know

    @override
    def describe(self) -> list[str]:
        size = self.around.group.size
        held = ["whole on each", "optimizer states cut over", "optimizer states and gradients cut over"]
        shards = [*held, "parameters, gradients and optimizer states cut over"][self._stage]
        line = f"DeepSpeed {deepspeed.__version__}, ZeRO stage {self._stage}: {shards} of {size} ranks"
        zero = self._plugin.zero_section()
        away = [
            f"{what} on {zero[key]['device']}"
            for key, what in (("offload_optimizer", "optimizer"), ("offload_param", "parameters"))
            if zero.get(key, {}).get("device", "none") != "none"
        ]
        return ["; ".join([line, *away])]

    @override
    def dtypes(self) -> dict[str, str]:
        table = super().dtypes()
        if self._dtype is not None:
            short = short_dtype(self._dtype)
            reduce = self._settings.get("communication_data_type") or short
            table |= {"stored": short, "compute": short, "reduce": reduce, "optimizer": "fp32", "saved": "fp32"}
            if self._plugin.zero3_save_16bit_model:
                table["saved"] = short
        return table
